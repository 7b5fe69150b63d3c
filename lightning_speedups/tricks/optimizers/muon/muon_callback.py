"""Muon in the place of the optimizer that an unmodified module configures (Liu et al., arXiv:2502.16982)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import SGD
from torch.optim.lr_scheduler import CyclicLR

from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.optimizers import Birth, born_as
from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.schedulers import noting_schedulers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.step_share import StepShare
from lightning_speedups.attach.steps import Group
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.orthogonal import MOST_STEPS
from lightning_speedups.modules.parameter_roles import Role, looks_trained, parameter_roles
from lightning_speedups.tricks.optimizers.muon.muon import Muon, Rest
from lightning_speedups.tricks.optimizers.muon.rules import RULE_OF, RULES, kept_groups, move_peaks

UNKNOWN = ("amsgrad", "maximize", "differentiable")
"""Switches of theirs that Muon does not have."""
FASTER = "`steps=3` makes three iterations of five; larger batches make its part smaller."
"""What to do when it takes too long."""


class MuonCallback(Trick):
    """Lets `Muon` take the place of the optimizer that the module configures: torch's SGD, Adam or AdamW.

    Without ``lr``, under Adam or AdamW, the module's groups and rates stay: in each, matrices and filters go under Muon
    with updates as large as AdamW's, and the rest goes on as it was. With ``lr`` the groups are those of `Muon.groups`
    instead, and all but matrices and filters follow the module's own rule, or ``rest``: rates that were found for one
    rule, such as a recipe's, are far off for another, which is what this ninth argument is for. The module's
    schedulers, and everything else that it builds on the optimizer, have Muon from the start; a OneCycleLR peaks at the
    new rates. A checkpoint resumes with the callback only. On a CPU a line says so if the optimizer takes more than a
    third of the first steps.

    When not to use it: to finetune all of a network that Adam or SGD has trained (it warns); with small batches of a
    wide network on a CPU; with several optimizers, manual optimization, parameters that are split between devices, or
    Lightning's own finetuning callbacks (it refuses). Where the module is yours, `MuonMixin` and `Muon.groups` say the
    same in the module itself.

    Args:
        lr: Rate of matrices and filters, 0 or more. None: the module's, for updates that match AdamW's.
        rest_lr: Rate of all others; None: the module's. Only with ``lr``, as all up to ``norm_bias_factor``.
        head_lr: Rate of the head; None: ``rest_lr``.
        norm_bias_factor: Rate of norms' biases over ``rest_lr``, above 0.
        momentum: Of matrices and filters, in [0, 1).
        weight_decay: Over the rate, 0 or more, not for norms, biases and gains; None: the module's. Only with ``lr``.
        steps: Newton–Schulz iterations, 1 to 5; airbench does three, which saves a third of the time.
        normalized: Set each matrix's norm to √rows before its update instead of decaying it. Only with ``lr``.
        rest: Rule of all others as in `Muon.groups`: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``; None: the
            module's, with its own settings. Only with ``lr`` and ``rest_lr``.

    Raises:
        ValueError: If an argument is out of range, or needs ``lr`` or ``rest_lr``.
        MisconfigurationException: In ``setup``, in those cases; when optimizers are made, if the module's cannot be
            replaced, or is SGD and there is no ``lr``; on resume, if the checkpoint was made without it.

    Source:
        Jordan, https://kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982; airbench, arXiv:2404.00498;
        finetuning: arXiv:2605.10468.

    Example:
        >>> trainer = Trainer(callbacks=[MuonCallback()])
        >>> airbench = MuonCallback(lr=0.24, norm_bias_factor=64, momentum=0.6, steps=3, normalized=True)
    """

    def __init__(
        self,
        lr: float | None = None,
        rest_lr: float | None = None,
        head_lr: float | None = None,
        norm_bias_factor: float = 1.0,
        momentum: float = 0.95,
        weight_decay: float | None = None,
        steps: int = MOST_STEPS,
        normalized: bool = False,
        rest: Rest | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"lr": lr, "rest_lr": rest_lr, "head_lr": head_lr, "weight_decay": weight_decay}.items():
            check_number(name, value, 0, optional=True)
        check_number("norm_bias_factor", norm_bias_factor, 0, above=True)
        check_number("momentum", momentum, 0, 1, below=True)
        check_number("steps", steps, 1, MOST_STEPS, whole=True)
        check_choice("rest", rest, ("sgd", "adamw"), optional=True)
        own = {"rest_lr": rest_lr, "head_lr": head_lr, "weight_decay": weight_decay, "rest": rest}
        own |= {
            "normalized": normalized or None,
            "norm_bias_factor": None if norm_bias_factor == 1 else norm_bias_factor,
        }
        given = [name for name, value in own.items() if value is not None]
        if lr is None and given:
            raise ValueError(f"Expected `lr` with {given}: without it the module's groups and rates stay.")
        if rest is not None and rest_lr is None:
            raise ValueError(f"Expected `rest_lr` with `rest`={rest!r}: the module's rate may be for another rule.")
        self.grips = (StepShare(self, FASTER),)
        self.lr, self.rest_lr, self.head_lr, self.norm_bias_factor = lr, rest_lr, head_lr, norm_bias_factor
        self.momentum, self.weight_decay, self.steps, self.normalized = momentum, weight_decay, steps, normalized
        self.rest = rest

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take a place where optimizers are made."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._require_fit(trainer, pl_module)
            # Further in than who puts schedulers to rest, and the rates from before them back.
            Station.of(trainer.strategy, "setup_optimizers").join(self, self.make, order=-1)

    def _require_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several optimizers, matrices in parts, and groups that come later."""
        if not pl_module.automatic_optimization:
            raise self.refusal("does not know which optimizer to replace in manual optimization", "Use `Muon` itself.")
        require_whole(self, trainer, "matrices")
        if any(is_a(one, "BaseFinetuning") for one in callbacks_of(trainer)):
            what = "has no rule for the groups that a BaseFinetuning of Lightning adds in the middle of a run"
            raise self.refusal(what, "Use `FreezeBackboneFinetune`.")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of another optimizer."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        groups = [group for state in checkpoint.get("optimizer_states", ()) for group in state.get("param_groups", ())]
        if trainer.state.fn == "fit" and any("rule" not in group for group in groups):
            what = "cannot go on with the optimizer in the checkpoint, which is not Muon"
            raise self.refusal(what, "Resume without it, or load the weights alone, without `ckpt_path`.")

    def make(self, original: Callable[..., Any], trainer: Trainer) -> None:
        """Make the module's optimizers, as Muon."""
        module = trainer.lightning_module
        with noting_schedulers() as (schedulers, before), born_as(lambda birth: self.replaced(birth, module)) as born:
            try:
                original(trainer)
            except Exception as error:
                if born:
                    error.add_note(f"{self.name} changed the parameter groups; a list of values for each does not fit.")
                raise
        if len(born) != 1 or born[0].kind not in RULE_OF or len(trainer.strategy.optimizers) != 1:
            kinds = sorted(birth.kind.__name__ for birth in born)
            what = f"replaces one SGD, Adam or AdamW of torch made in `configure_optimizers`, but found {kinds} there"
            way_out = "Make one of these, or leave it out where the module has `Muon` or `MuonMixin`, with an `lr`."
            raise self.refusal(what, way_out)
        if self.lr is None:
            return
        if any(isinstance(one, CyclicLR) for one in schedulers):
            raise self.refusal("has rates that CyclicLR would overwrite", "Use `CyclicMomentum`.", lr=self.lr)
        optimizer = raw_optimizers(trainer)[0]
        move_peaks(optimizer.param_groups, before.get(optimizer, ()))

    def replaced(self, birth: Birth, module: LightningModule) -> Birth | None:
        """Return with what Muon is born in the place of an optimizer, or None for one that it cannot replace.

        Args:
            birth: With what that would be born.
            module: The module.
        """
        if birth.kind not in RULE_OF:
            return None
        if wrong := [name for name in UNKNOWN if birth.defaults.get(name) or any(g.get(name) for g in birth.groups)]:
            raise self.refusal(f"has no {wrong}, which {birth.kind.__name__} asks for", "Leave it out.")
        if self.lr is not None:
            groups = self.own_groups(birth, module)
        elif birth.kind is SGD:
            what = "keeps the rates of Adam and AdamW, but the module has SGD, whose rates say nothing of Muon's"
            raise self.refusal(what, "Give `lr`, such as `MuonCallback(lr=0.02)`.")
        else:
            roles = parameter_roles(module)
            matrices = {id(p) for name, p in module.named_parameters() if roles[name] is Role.MATRIX}
            groups = kept_groups(birth, matrices)
        of_muon, of_rest = self.values(birth)
        groups = [{**group, **of_muon} if group["rule"] == "muon" else {**of_rest, **group} for group in groups]
        return Birth(Muon, groups, {**birth.defaults, **of_muon})

    def values(self, birth: Birth) -> tuple[Group, Group]:
        """Return what groups under Muon hold, and what others do that say nothing else. Schedulers move momentum under
        the name that the module's optimizer has.

        Args:
            birth: With what that would be born.
        """
        defaults, scale = birth.defaults, "match_rms_adamw" if self.lr is None else "original"
        own = {"steps": self.steps, "scale": scale, "normalized": self.normalized, "nesterov": True}
        rest = RULES[self.rest] if self.rest else {key: defaults[key] for key in RULES[RULE_OF[birth.kind]]}
        both: tuple[Group, Group] = {"momentum": self.momentum, **own}, {**rest}
        for values in both:
            if "betas" in defaults and "momentum" in values:
                values["betas"] = (values.pop("momentum"), defaults["betas"][1])
        return both

    def own_groups(self, birth: Birth, module: LightningModule) -> list[Group]:
        """Return the groups of `Muon.groups`, of the parameters that the module's optimizer would have.

        Args:
            birth: With what that would be born.
            module: The module.
        """
        defaults = birth.defaults
        rule: Rest = self.rest or ("adamw" if RULE_OF[birth.kind] == "adamw" else "sgd")
        assert self.lr is not None
        groups = Muon.groups(
            module,
            self.lr,
            rest=rule,
            rest_lr=defaults["lr"] if self.rest_lr is None else self.rest_lr,
            head_lr=self.head_lr,
            norm_bias_factor=self.norm_bias_factor,
            weight_decay=defaults["weight_decay"] if self.weight_decay is None else self.weight_decay,
        )
        held = {id(p[1] if isinstance(p, tuple) else p) for group in birth.groups for p in group["params"]}
        if strange := held - {id(p) for group in groups for p in group["params"]}:
            what = f"finds {len(strange)} parameters in the optimizer that are not the module's"
            raise self.refusal(what, "Make what holds them a submodule.", lr=self.lr)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in held]
        return [group for group in groups if group["params"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of weights that were trained before."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and looks_trained(pl_module):
            rank_zero_warn(
                f"{self.name}: norms show that {type(pl_module).__name__} was trained before. If Adam or SGD did that, "
                "full finetuning with Muon gets worse (arXiv:2605.10468). Leave it out, or start anew."
            )

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the place."""
        super().undo(trainer, pl_module)
        Station.of(trainer.strategy, "setup_optimizers").leave(self)
