"""The optimizer's step in one pass over memory (Jiang et al., arXiv:2104.00237, on such fusions): ``fused=True`` where
torch has it, also beside gradient clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedups.attach.copies import may_split_model
from lightning_speedups.attach.packages import is_overridden
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.steps import Group
from lightning_speedups.attach.trick import Trick
from lightning_speedups.modules.memory_format import match_state

DEVICES = ("cpu", "cuda", "mps")
UNSCALES = "_step_supports_amp_scaling"
"""Torch's mark of an optimizer that takes the scale off gradients itself."""


def sparse_weights(root: nn.Module) -> list[Tensor]:
    """Return the weights whose gradients are sparse, which no fused step takes.

    Example:
        >>> len(sparse_weights(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Embedding(5, 4))))
        1
    """
    sparse = (module for module in root.modules() if getattr(module, "sparse", False) is True)
    return [weight for module in sparse for weight in module.parameters(recurse=False)]


def can_fuse(group: Mapping[str, Any], without: Collection[Tensor] = ()) -> bool:
    """Tell whether an optimizer has a fused step for a parameter group: SGD, Adam, AdamW and Adagrad of torch.

    Args:
        group: Of an optimizer. All parameters must be real, in one piece of memory, and on a device with such steps.
        without: Parameters for which there is none.

    Example:
        >>> weights = [nn.Parameter(torch.ones(3))]
        >>> [can_fuse(kind(weights).param_groups[0]) for kind in (torch.optim.AdamW, torch.optim.RMSprop)]
        [True, False]
    """
    left_out = {id(one) for one in without}
    devices = DEVICES[:1] if "lr_decay" in group else DEVICES  # Adagrad's, in torch 2.11
    return (
        group.keys() >= {"fused", "foreach", "differentiable"}
        and not group["differentiable"]
        and all(
            one.is_floating_point()
            and one.device.type in devices
            and id(one) not in left_out
            and torch.empty_like(one, device="meta").stride() == one.stride()  # a CPU's step walks through all of it
            for one in group["params"]
        )
    )


def set_fused(optimizer: Optimizer, group: Group, fused: bool | None, foreach: bool | None) -> None:
    """Choose how an optimizer steps a parameter group; what it remembers stays.

    Args:
        optimizer: Torch's.
        group: One of its groups.
        fused: As its constructor takes it.
        foreach: As its constructor takes it.

    Example:
        >>> optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))])
        >>> set_fused(optimizer, optimizer.param_groups[0], fused=True, foreach=False)
        >>> optimizer.param_groups[0]["fused"]
        True
    """
    group["fused"], group["foreach"] = fused, foreach
    precise = torch.float32 if fused or torch.get_default_dtype() != torch.float64 else torch.float64
    for parameter in group["params"]:
        kept = optimizer.state.get(parameter, {})
        if isinstance(kept.get("step"), Tensor) and not group.get("capturable"):
            kept["step"] = kept["step"].to(parameter.device if fused else "cpu", precise)


@dataclass
class Switched:
    """What belongs to a run.

    Attributes:
        groups: Optimizers, their groups and what these had as ``fused`` and ``foreach``.
        marked: Optimizers whose mark was taken off.
    """

    groups: list[tuple[Optimizer, Group, bool | None, bool | None]] = field(default_factory=list)
    marked: list[Optimizer] = field(default_factory=list)


class FusedOptimizer(Trick):
    """Gives torch's SGD, Adam, AdamW and Adagrad their fused step, for the time of the fit.

    The step's arithmetic stays, its order within an element does not: results differ in the last digits. Checkpoints
    hold what the module configured. An optimizer that the module itself made with ``fused=True`` may be clipped too:
    Lightning 2.6 refuses that under mixed precision, as such an optimizer takes the scale off gradients only within its
    step; here GradScaler does it before, where there is a scaler.

    When not to use it: where the step of the optimizer is no part worth naming, as in most networks of convolutions. It
    does nothing, and says so in one line, with other optimizers, and with FSDP and model parallelism. A group with
    complex or sparse parts, or under ``differentiable=True``, stays as it is.

    Raises:
        MisconfigurationException: In ``setup``, if the Trainer is none of Lightning's.

    Source:
        Jiang et al., arXiv:2104.00237; torch's ``fused`` argument.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FusedOptimizer()], gradient_clip_val=1.0)
    """

    run_as = Switched
    run: Switched

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand where the optimizers' state is saved."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            Station.of(trainer.strategy, "optimizer_state").join(self, self._state)

    def _state(self, state: Callable[[Optimizer], dict[str, Any]], optimizer: Optimizer) -> dict[str, Any]:
        """Return what the module's own optimizer would: whoever loads it may not have this trick."""
        for _, group, fused, foreach in self.run.groups:
            group.update(fused=fused, foreach=foreach)
        try:
            return state(optimizer)
        finally:
            for _, group, *_ in self.run.groups:
                group.update(fused=True, foreach=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the groups, when their state is loaded."""
        super().on_train_start(trainer, pl_module)
        self._switch(trainer, pl_module)
        if not self.run.groups and not self._fused(trainer):
            kinds = ", ".join(sorted({type(one).__name__ for one in raw_optimizers(trainer)}))
            rank_zero_info(f"{self.name} does nothing: it finds no parameters that torch steps fused in {kinds}.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch groups that have come since."""
        super().on_train_epoch_start(trainer, pl_module)
        self._switch(trainer, pl_module)

    def _switch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if may_split_model(trainer):
            return
        sparse = sparse_weights(pl_module)
        for optimizer in raw_optimizers(trainer):
            for group in optimizer.param_groups:
                if can_fuse(group, sparse) and not group["fused"]:
                    self.run.groups.append((optimizer, group, group["fused"], group["foreach"]))
                    set_fused(optimizer, group, fused=True, foreach=False)
        self._mend_clipping(trainer, pl_module)

    def _fused(self, trainer: Trainer) -> list[Optimizer]:
        return [one for one in raw_optimizers(trainer) if any(group.get("fused") for group in one.param_groups)]

    def _mend_clipping(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module)
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        for optimizer in self._fused(trainer):
            match_state(optimizer)
            if (clips or not has_scaler) and vars(optimizer).get(UNSCALES):
                self.run.marked.append(optimizer)
                setattr(optimizer, UNSCALES, False)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch back."""
        Station.of(trainer.strategy, "optimizer_state").leave(self)
        for optimizer, group, fused, foreach in self.run.groups:
            set_fused(optimizer, group, fused, foreach)
        for optimizer in self.run.marked:
            setattr(optimizer, UNSCALES, True)
        super().undo(trainer, pl_module)
