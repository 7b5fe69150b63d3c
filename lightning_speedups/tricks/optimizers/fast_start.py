"""A start from which a network needs fewer epochs, made from the first batch: a whitened first convolution, identity
filters and more (Jordan, arXiv:2404.00498; branches at zero: Goyal et al., arXiv:1706.02677).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedups.attach.copies import NoCopyError, require_copyable
from lightning_speedups.attach.packages import MisconfigurationException
from lightning_speedups.attach.rehearsal import first_inputs
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.attach.wrapping import require_rewrapping, rewrapped
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.modules.initialization import (
    find_stem,
    fingerprint,
    identity_convolutions,
    patch_moments,
    plain_convolutions,
    scale_logits,
    set_momentum,
    start_as_identity,
    weights_of_one,
    whiten,
    zero_residual_branches,
)
from lightning_speedups.modules.parameter_roles import looks_trained
from lightning_speedups.modules.weights import find_heads

MARK = "_fast_start"
"""Under which name a network remembers the weights that it had before its start."""


@dataclass
class Started:
    """What a checkpoint holds of a fast start.

    Attributes:
        started: Whether the run began with it.
    """

    started: bool = False


@dataclass
class Starting:
    """What else belongs to a run of a fast start.

    Attributes:
        waits: Whether the start is to be made on the next batch.
        stem: The first convolution and its name in the network; None if it is not whitened.
        frozen: The parameters that were frozen.
        momenta: Momentum of each BatchNorm before.
    """

    waits: bool = False
    stem: tuple[str, nn.Conv2d] | None = None
    frozen: list[nn.Parameter] = field(default_factory=list)
    momenta: list[tuple[_BatchNorm, float | None]] = field(default_factory=list)


class FastStart(Trick):
    """Gives a fresh network a start from which it learns sooner, before its first training step.

    The first batch, as the first convolution sees it, is the sample for whitening: its patches come out uncorrelated,
    with unit variance, each direction with both signs. A frozen first convolution rests to the bit and needs no
    backward pass. Random states and the order of the data stay as they are. Weights are set once for a network: a
    resumed run and a second fit go on with theirs, the first convolution frozen as before. What does not train is left
    alone. After the fit everything can train again, and norms have their own momentum.

    In four epochs of 10,000 CIFAR-10 images under SGD with one cycle (``benchmarks/starts.py``) the whitened, frozen
    first convolution brought 10.8 points (3.2 to 18.3), trained on 8.7; identity filters beside it took 5.8 of them
    away, and small logits, momentum and fixed weights alone brought nothing that five seeds could tell. A ResNet-18 at
    a rate it hardly bears went from 17 to 36 % with ``whiten=None, zero_residual=True``.

    When not to use it: on pretrained weights, which it would overwrite (norms tell, and it refuses; without norms
    nothing does). Whitening by a small batch of images: its patches should be ten times as many as
    the numbers in one. Identity filters where channels are not features of one kind. In long runs the head start fades.

    Args:
        whiten: ``"frozen"``: the first convolution whitens its patches and does not train; ``"trained"``: it goes on
            from there; None: it stays as it is.
        dirac: Whether convolutions of odd kernels above 1×1 but the first begin as the identity, as far as channels go;
            in the speedrun, where Muon trains them.
        zero_residual: Whether residual blocks, also of transformers, begin as their shortcuts.
        logit_scale: Multiplies the head's first weights, above 0, so that the first logits are small: 1/9 in the
            speedrun. To scale logits in all of the run, also multiply the head's rate by its square.
        batch_norm_momentum: Share of a batch in BatchNorm's running statistics during the fit, in (0, 1]; 0.4 in the
            speedrun. None for the network's own.
        fixed_norm_weights: Whether the weights of BatchNorms that are 1 stay so. Not with ``zero_residual``: a branch
            that is fixed at 0 never opens.
        network: Attribute path of the network in the module; None for all of it.

    Raises:
        ValueError: If an argument is out of range, or ``zero_residual`` and ``fixed_norm_weights`` are both on.
        MisconfigurationException: At fit start, if the network was trained before, has no such convolution, or the
            strategy cannot freeze; for whitening, if the step cannot be tried or calls another convolution first, or if
            the first batch is too small.

    Source:
        Jordan, arXiv:2404.00498.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FastStart(whiten="frozen")])
    """

    saved_as, run_as = Started, Starting
    saved: Started
    run: Starting

    def __init__(
        self,
        whiten: str | None = "frozen",
        dirac: bool = False,
        zero_residual: bool = False,
        logit_scale: float | None = None,
        batch_norm_momentum: float | None = None,
        fixed_norm_weights: bool = False,
        network: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("whiten", whiten, ("frozen", "trained"), optional=True)
        check_number("logit_scale", logit_scale, 0, above=True, optional=True)
        check_number("batch_norm_momentum", batch_norm_momentum, 0, 1, above=True, optional=True)
        if zero_residual and fixed_norm_weights:
            raise ValueError("Expected `fixed_norm_weights` to be False with `zero_residual`, but got True.")
        self.whiten, self.dirac, self.zero_residual, self.logit_scale = whiten, dirac, zero_residual, logit_scale
        self.batch_norm_momentum, self.fixed_norm_weights = batch_norm_momentum, fixed_norm_weights
        self.network = network

    def network_of(self, pl_module: LightningModule) -> nn.Module:
        """Return the network."""
        try:
            return pl_module.get_submodule(self.network or "")
        except AttributeError as error:
            raise self.refusal(f"finds no such part ({error})", "Name one.", network=self.network) from error

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which nothing can be frozen."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            require_rewrapping(trainer, self.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out what is to be done, and freeze."""
        super().on_fit_start(trainer, pl_module)
        network = self.network_of(pl_module)
        if any(type(one).__name__ == "FeatureCache" for one in callbacks_of(trainer)):
            what = "changes a fresh network in its first step, for which FeatureCache cannot keep its features"
            raise self.refusal(what, "Leave out one of them.")
        if trainer.ckpt_path is not None and not self.resumed:
            rank_zero_warn(f"{self.name} does nothing in a run that began without it. Leave it out.")
            return
        before = vars(network).get(MARK)
        writes = bool(self.whiten or self.dirac or self.zero_residual or self.logit_scale)
        self.run.waits = writes and not self.saved.started and before in (None, fingerprint(network))
        if self.run.waits and before is None and looks_trained(network):
            what = "would overwrite weights that were trained, as norms show"
            raise self.refusal(what, "Leave it out, or begin with a fresh network.")
        if not self.run.waits:
            self.saved.started = True
            vars(network).setdefault(MARK, ())  # a resumed network is no fresh one in the next fit either
        self._find(trainer, pl_module, network)
        self._settle(trainer, pl_module, network)

    def _find(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        if self.whiten is None:
            return
        self.run.stem = find_stem(network)
        if self.run.stem is None:
            raise self._no_whitening("finds no first convolution that is plain and can train")
        if self.run.waits:
            try:
                require_copyable(trainer, pl_module)
            except NoCopyError as error:
                raise self._no_whitening(f"cannot try the first training step: {error}") from error

    def _no_whitening(self, what: str) -> MisconfigurationException:
        way_out = "Use `whiten=None`, and `lightning_speedups.modules.initialization.whiten` on images of your own."
        return self.refusal(what, way_out, whiten=self.whiten)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        """Freeze, and set momenta: in each fit, since neither is in a checkpoint."""
        if self.batch_norm_momentum is not None:
            self.run.momenta = set_momentum(network, self.batch_norm_momentum)
        self.run.frozen = weights_of_one(network) if self.fixed_norm_weights else []
        if self.run.stem is not None and self.whiten == "frozen":
            self.run.frozen += [parameter for parameter in self.run.stem[1].parameters() if parameter.requires_grad]
        with rewrapped(trainer, pl_module):
            for parameter in self.run.frozen:
                parameter.requires_grad_(False)
                parameter.grad = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the start, once."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.run.waits:
            return
        network = self.network_of(pl_module)
        before = fingerprint(network)
        done = self._start(trainer, pl_module, batch, network)
        for parameter in network.parameters() if trainer.world_size > 1 else ():
            parameter.detach().copy_(trainer.strategy.broadcast(parameter.detach().cpu()))
        vars(network)[MARK] = before
        self.run.waits, self.saved.started = False, True
        rank_zero_info(f"{self.name}: {', '.join(f'{count} {what}' for what, count in done.items())}.")
        if nothing := [what for what, count in done.items() if not count]:
            rank_zero_warn(f"{self.name} finds no {' and no '.join(nothing)} in {type(network).__name__}.")

    def _start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, network: nn.Module) -> dict[str, int]:
        """Change the weights, and return how much of what was changed."""
        done = {}
        if self.run.stem is not None:
            name, stem = self.run.stem
            try:
                images = first_inputs(trainer, pl_module, batch, stem, plain_convolutions(network).values())
                done[f"whitening filters in `{name}`"] = whiten(stem, *patch_moments(images, stem))
            except (NoCopyError, ValueError) as error:
                raise self._no_whitening(f"cannot whiten by the first batch: {error}") from error
        if self.dirac:
            done["convolutions to begin as the identity"] = start_as_identity(identity_convolutions(network).values())
        if self.zero_residual:
            done["residual blocks to begin as their shortcuts"] = len(zero_residual_branches(network))
        if self.logit_scale is not None:
            done["head to scale"] = scale_logits(find_heads(network), self.logit_scale)
        return done

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let everything train again, and give norms their momentum."""
        for parameter in self.run.frozen:
            parameter.requires_grad_(True)
        for norm, momentum in self.run.momenta:
            norm.momentum = momentum
        super().undo(trainer, pl_module)
