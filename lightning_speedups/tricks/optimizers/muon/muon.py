"""Muon: momentum whose matrices are made orthogonal before they are added to the weights (Jordan, 2024;
arXiv:2502.16982), with SGD or AdamW for all that is no matrix, in one optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_speedups.attach.steps import Group
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.orthogonal import MOST_STEPS, Scale
from lightning_speedups.modules.parameter_roles import Role, check_groups, parameter_roles
from lightning_speedups.tricks.optimizers.muon.rules import RULES, STEPS

Rest = Literal["sgd", "adamw"]

# Name, roles, whether it is decayed.
PARTS: tuple[tuple[str, tuple[Role, ...], bool], ...] = (
    ("muon", (Role.MATRIX,), True),
    ("head", (Role.HEAD,), True),
    ("head biases", (Role.HEAD_BIAS,), False),
    ("embeddings", (Role.EMBEDDING,), True),
    ("depthwise filters", (Role.DEPTHWISE,), True),
    ("norm biases", (Role.NORM_BIAS,), False),
    ("norms, biases and gains", (Role.NORM, Role.BIAS, Role.GAIN), False),
)


class Muon(Optimizer):
    """Muon for matrices and filters, and SGD or AdamW for the rest: one optimizer, as Lightning wants it.

    Each parameter group follows its ``"rule"``. Under ``"muon"`` the momentum of each matrix, or of each bank of
    filters, flattened to (outputs, inputs · places), becomes a nearly orthogonal matrix, which is added to the weight;
    all matrices of one shape go through at once. ``"sgd"`` is torch's SGD with Nesterov momentum, ``"adamw"`` torch's
    AdamW. `groups` makes such groups of a module. A group may have keys of its own: ``lr``, ``momentum`` (``betas``
    under AdamW), ``weight_decay``, ``steps``. Parameters without a gradient rest, without decay too.

    airbench's form: ``lr=0.24, momentum=0.6, steps=3, normalized=True``.

    When not to use it: to finetune all of a network that Adam or SGD has trained, which gets worse (arXiv:2605.10468);
    where the optimizer is a large part of the step, as with wide networks and small batches on a CPU; with parameters
    that are split between devices. Clipping gradients before it does nothing for matrices.

    Args:
        params: Parameters, or groups; those without a ``"rule"`` follow ``"muon"``.
        lr: Learning rate, 0 or more.
        momentum: Of matrices, in [0, 1).
        weight_decay: Decay of weights over the rate, 0 or more; not for normalized ones.
        steps: Newton–Schulz iterations, 1 to 5; airbench does three, which saves a third of the time.
        scale: ``"original"``: updates times √max(1, rows/columns). ``"match_rms_adamw"``: times 0.2·√max(rows,
            columns), for a rate that was chosen for AdamW.
        normalized: Set each matrix's norm to √rows before its update instead of decaying it.
        nesterov: Look ahead by the momentum.

    Raises:
        ValueError: If an argument is out of range, a group follows an unknown rule, or what follows
            ``"muon"`` has less than two dimensions.

    Source:
        Jordan, https://kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982; airbench, arXiv:2404.00498.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(2))
        >>> loss = net(torch.ones(4, 3, 5, 5)).sum()
        >>> optimizer = Muon(Muon.groups(net, lr=0.02, rest_lr=0.1))
        >>> [group["name"] for group in optimizer.param_groups]
        ['muon', 'head', 'head biases', 'norm biases', 'norms, biases and gains']
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = MOST_STEPS,
        scale: Scale = "original",
        normalized: bool = False,
        nesterov: bool = True,
    ) -> None:
        check_choice("scale", scale, ("original", "match_rms_adamw"))
        defaults = {
            "lr": check_number("lr", lr, 0),
            "momentum": check_number("momentum", momentum, 0, 1, below=True),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "steps": check_number("steps", steps, 1, MOST_STEPS, whole=True),
            "scale": scale,
            "normalized": bool(normalized),
            "nesterov": bool(nesterov),
        }
        super().__init__(params, defaults)

    @staticmethod
    def groups(
        module: nn.Module,
        lr: float = 0.02,
        *,
        rest: Rest = "sgd",
        rest_lr: float | None = None,
        head_lr: float | None = None,
        norm_bias_factor: float = 1.0,
        weight_decay: float = 0.0,
        head: str | None = None,
    ) -> list[Group]:
        """Return parameter groups for a module: matrices and filters under Muon; head, embeddings, depthwise filters,
        norms, biases and gains under another rule.

        Norms, biases and gains are not decayed. Frozen parameters are in the groups, for they may thaw.

        Args:
            module: The module.
            lr: Rate of matrices, 0 or more.
            rest: Rule of all others: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``.
            rest_lr: Their rate; None: ``lr``, which is too high for AdamW unless updates are scaled to match its own.
            head_lr: Rate of the head; None: ``rest_lr``.
            norm_bias_factor: Rate of norms' biases over ``rest_lr``, above 0; airbench has 64.
            weight_decay: Of all that is decayed, 0 or more.
            head: Path of the head; None: timm's classifier, or the last layer, if that is linear.

        Raises:
            ValueError: If an argument is out of range, there is no such head, or a parameter is complex or has no shape
                yet.
        """
        check_choice("rest", rest, ("sgd", "adamw"))
        lr = check_number("lr", lr, 0)
        rest_lr = lr if rest_lr is None else check_number("rest_lr", rest_lr, 0)
        head_lr = rest_lr if head_lr is None else check_number("head_lr", head_lr, 0)
        factor = check_number("norm_bias_factor", norm_bias_factor, 0, above=True)
        decay = check_number("weight_decay", weight_decay, 0)
        rates = {"muon": lr, "head": head_lr, "head biases": head_lr, "norm biases": rest_lr * factor}
        held: dict[Role, list[nn.Parameter]] = defaultdict(list)
        for name, role in parameter_roles(module, head).items():
            held[role].append(module.get_parameter(name))
        groups: list[Group] = [
            {
                "params": [parameter for role in roles for parameter in held[role]],
                "name": name,
                "rule": "muon" if name == "muon" else rest,
                "lr": rates.get(name, rest_lr),
                "weight_decay": decay if is_decayed else 0.0,
            }
            for name, roles, is_decayed in PARTS
        ]
        check_groups(module, groups)
        return [group for group in groups if group["params"]]

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with what its rule needs.

        Args:
            param_group: Its ``"rule"`` is ``"muon"`` unless it says otherwise.

        Raises:
            ValueError: If there is no such rule, or what follows Muon's is no matrix.
        """
        rule = param_group.get("rule", "muon")
        check_choice("rule", rule, RULES)
        known = {"lr", "weight_decay", *RULES[rule], *(["betas"] if rule == "muon" else ())}
        defaults, own = self.defaults, RULES[rule] if rule != "muon" else {}
        # Of Muon's values the others have but these; momentum for one rule is none for another.
        self.defaults = {key: value for key, value in defaults.items() if key in known - own.keys()}
        try:
            super().add_param_group({"rule": rule, **own, **param_group})
        finally:
            self.defaults = defaults
        matrices = [p for group in self.param_groups if group["rule"] == "muon" for p in group["params"]]
        if flat := [p for p in matrices if p.ndim < 2]:
            raise ValueError(
                f"Expected parameters under the rule 'muon' to have two dimensions or more, but got one of shape "
                f"{tuple(flat[0].shape)}. `Muon.groups(module)` puts such ones under another rule."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Computes the gradients, and returns the loss.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                STEPS[group["rule"]](group, params, self.state)
        return loss


class MuonMixin:
    """Brings a LightningModule, of either package, its `configure_optimizers`: Muon, with the groups of `Muon.groups`.

    ``class Net(MuonMixin, LightningModule)``; settings are those of `Muon` and `Muon.groups`, in ``muon_options``, of
    the class or set in ``__init__``. For a scheduler, take what ``super().configure_optimizers()`` returns.

    When not to use it: where the module is not yours, which `MuonCallback` is for; and where `Muon` is not.

    Raises:
        ValueError: In ``configure_optimizers``, if an option is out of range; TypeError, if there is none of that name.

    Source:
        Jordan, https://kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Net(MuonMixin, LightningModule):
        ...     muon_options = {"lr": 0.24, "rest_lr": 0.8, "momentum": 0.6, "steps": 3, "normalized": True}
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(group["name"], group["lr"]) for group in Net().configure_optimizers().param_groups]
        [('muon', 0.24), ('head', 0.8), ('head biases', 0.8), ('norms, biases and gains', 0.8)]
    """

    muon_options: Mapping[str, Any] = {}
    """Arguments of `Muon` and `Muon.groups`, by name."""

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        of_groups = dict(self.muon_options)
        of_muon = {key: of_groups.pop(key) for key in RULES["muon"] if key in of_groups}
        return Muon(Muon.groups(self, **of_groups), **of_muon)  # type: ignore[arg-type]
