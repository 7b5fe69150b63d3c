"""A schedule for label smoothing: strong at first and weak or none later, which Xu et al. (arXiv:2006.11653) find to
converge faster than smoothing to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_speedups.attach.batches import batch_number
from lightning_speedups.attach.run_length import run_length
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.schedules import Shape, pick_shape
from lightning_speedups.tricks.labels.base import Smoothing


def factor_at(progress: float, shape: Shape, start: float, stop: float) -> float:
    """Return the factor on ε at one place of a run.

    Args:
        progress: Part of the run that is over, in [0, 1].
        shape: Its curve between ``start`` and ``stop``, as a function of progress in [0, 1].
        start: Part of the run, in [0, 1], before which the factor is the curve's first one.
        stop: Part of the run, from ``start`` to 1, from which on it is the curve's last one.

    Example:
        >>> [factor_at(p, lambda part: 1 - part, 0.5, 0.75) for p in (0.0, 0.5, 0.625, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if progress >= stop:
        return shape(1.0)
    return shape((progress - start) / (stop - start) if progress > start else 0.0)


@dataclass
class Driven:
    """What belongs to a run.

    Attributes:
        losses: The losses that it drives.
        batches: Training batches of the whole run.
    """

    losses: list[Smoothing] = field(default_factory=list)
    batches: int = 0


class SmoothingSchedule(Trick):
    """Multiplies the ε of this package's label smoothing losses by a curve over the run.

    It drives every ``LabelSmoothingLoss`` and ``BinaryLabelSmoothing`` among the LightningModule's submodules, in
    training steps alone: validation, checkpoints and what comes after the fit see ε as it was given, so that a
    validation loss stays comparable from epoch to epoch. The place on the curve is the number of training batches done
    over that of the whole run: a resumed run goes on exactly, one of another length is stretched over the new total.

    The two stages of the paper, smoothing and then none, are ``SmoothingSchedule(start=0.6, stop=0.6)``. At factor 1 a
    loss is the same, to the bit, as without a schedule. A compiled loss is compiled twice, not once for each ε.

    When not to use it: beside a distillation loss, or where the ε given has not been seen to help: a curve cannot mend
    it. It saves no time in a step: it can buy accuracy, and so epochs.

    Args:
        shape: ``"linear"``, ``"cosine"``, ``"step"``, ``"polynomial"``, ``"exponential"``, ``"slow_start_fast_decay"``
            or ``"cosine_restarts"``; or your own function of progress in [0, 1] that returns a factor of 0 or more.
        end_factor: Factor at the end of a named shape, 0 or more; above 1 it grows. None: the shape's own: 0, or 0.01
            where it falls exponentially. Not for the step and your own.
        start: Where the curve begins, as a fraction of the run in [0, 1].
        stop: Where it ends, as a fraction of the run from ``start`` to 1; with ``stop=start`` it is a jump.
        options: More arguments of a named shape, those of ``LRCurve``: ``power``, ``milestones`` and ``gamma``,
            ``start`` and ``rise``, ``cycles`` and ``growth``.

    Raises:
        ValueError: If an argument is out of range, or if the curve of a shape stays at 1 unasked.
        MisconfigurationException: At fit start, if the module has no such loss, if an ε would reach 1, if the
            length of the run is unknown, or if there are two schedules.

    Source:
        Xu et al., arXiv:2006.11653.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SmoothingSchedule("cosine", start=0.5)])
    """

    run_as = Driven
    run: Driven

    def __init__(
        self,
        shape: str | Callable[[float], float] = "linear",
        end_factor: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_number("end_factor", end_factor, 0, optional=True)
        check_number("start", start, 0, 1)
        check_number("stop", stop, 0, 1)
        if stop < start:
            raise ValueError(f"Expected `stop` to be `start` or more, but got {stop} after {start}.")
        end = {} if end_factor is None else {"end": end_factor}
        self.shape = pick_shape(shape, {**options, **end} if isinstance(options, dict) else options or end)
        factors = [factor_at(place / 100, self.shape, start, stop) for place in range(101)]
        if end_factor is None and all(factor == 1 for factor in factors):
            raise ValueError(
                f"Expected `shape` {shape!r} to change the smoothing, but its factor stays at 1. Give another one."
            )
        self.start, self.stop = start, stop
        self._highest = max(factors)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the losses, and refuse what cannot work."""
        super().on_fit_start(trainer, pl_module)
        others = [one for one in callbacks_of(trainer) if isinstance(one, SmoothingSchedule) and one is not self]
        if others:
            raise self.refusal("multiplies the ε of every loss, and there are two such callbacks", "Remove one.")
        losses = [module for module in pl_module.modules() if isinstance(module, Smoothing)]
        if not losses:
            raise self.refusal(
                f"drives losses of this package, but among the submodules of {type(pl_module).__name__} there are none",
                "Assign one in its `__init__`, as `self.criterion = LabelSmoothingLoss(0.1)`, and let `training_step` "
                "use it.",
            )
        for loss in losses:
            if (most := loss.highest * self._highest) >= 1:
                kind = f"{type(loss).__name__}(smoothing={loss.highest:g})"
                what = f"would take {kind} up to {most:g}, but ε must stay below 1"
                raise self.refusal(what, "Give a lower `end_factor` or ε.")
        self.run.losses = losses

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the length of the run."""
        super().on_train_start(trainer, pl_module)
        batches = run_length(trainer).batches
        if batches is None:
            what = "needs the length of the run, and this one's is unknown (an endless loader, or no `max_epochs`)"
            raise self.refusal(what, "Give `Trainer(max_steps=...)`.")
        self.run.batches = batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the losses the factor of this batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        done = batch_number(trainer) - 1  # it counts this one already
        factor = factor_at(min(1.0, done / self.run.batches), self.shape, self.start, self.stop)
        # A new tensor, as the old one may be saved for a backward pass; filled on the device: no copy to wait for.
        self._set(None if factor == 1 else torch.full((), factor, dtype=torch.float32, device=pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the losses their own ε back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._set(None)

    def _set(self, strength: Tensor | None) -> None:
        for loss in self.run.losses:
            loss.strength = strength

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the losses their own ε back, and forget them."""
        self._set(None)
        super().undo(trainer, pl_module)
