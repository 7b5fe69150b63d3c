"""Gradient accumulation up to a batch of a given size, in which each batch weighs what it holds: a tool for memory and
communication, not for speed on one device (Marek et al., arXiv:2507.07101).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.run_length import ShorterRun, batches_in_epoch, loader_batch_size
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.batch import count_samples
from lightning_speedups.core.counts import counted
from lightning_speedups.core.effective_batch import batches_in_step, checked_by_epoch, factor_to_mean, value_in_epoch

Call = Callable[..., Any]


@dataclass
class Sum:
    """What checkpoints hold.

    Attributes:
        unit: The count of the run's first batch, at which a batch weighs 1; 0 before it came.
        total: What the batches hold that are in the gradients.
    """

    unit: float = 0.0
    total: float | Tensor = 0.0


@dataclass
class Step:
    """The optimizer step under way.

    Attributes:
        plan: How many batches make one, by the epochs in which that begins.
        count: What the batch under way holds; None if it does not weigh, or if the step has its mean.
        uncounted: The same as long as nothing of the batch is in the gradients, then 0.
    """

    plan: dict[int, int] = field(default_factory=dict)
    count: float | Tensor | None = None
    uncounted: float | Tensor = 0.0


class EffectiveBatchSize(Trick):
    """Accumulates the gradients of as many batches as make an optimizer step of a given number of samples.

    How many that are follows from the batch size, which a single training loader must tell as ``batch_size``, and the
    number of processes, exactly, or the fit is refused with the nearest sizes that are possible. Lightning does the
    accumulating, so that only the last batch of a step communicates under DDP, and counts the steps: its schedulers and
    ``trainer.estimated_stepping_batches`` have their true number, and so have this package's tricks
    (``WarmupLRScaler`` the size too), also where the size changes over the run. A run that is resumed within an epoch
    goes on with the epoch's size, which Lightning's ``GradientAccumulationScheduler`` forgets. Tricks that enlarge the
    loader's batches, as ``ProgressiveResizing(fill_batch=True)``, enlarge the step alike, and set the rate for it.

    The gradient of a step is that of one large batch, of all that its batches in all processes hold: the loss of
    ``training_step`` is taken for a mean over so many things as ``count`` says, and weighs as much. So the last, short
    step of an epoch, which Lightning makes too small, has its full size, and tokens count the same, in whatever batch
    they are. In several processes that takes the exchange of one number a step. Losses are logged as ever, by batch.
    The gradients of a step that a checkpoint interrupts are lost, as always with Lightning, and the resumed run makes
    the step of the batches that are left; with ``ExactResume`` beside it, of all.

    It is a tool for memory, where the batch does not fit, and for communication, where several processes exchange
    gradients less often. On one device it makes nothing faster: as many samples take as long, in fewer steps, and small
    batches with a rate that fits them learn as much or more from each (arXiv:2507.07101). With BatchNorm the result is
    not that of the large batch, as statistics are those of the batches by themselves.

    When not to use it: on one device, where the small batch trains as well; with optimizers that compute gradients
    several times a step (LBFGS, SAM: refused).

    Args:
        samples: Samples of one optimizer step, in all processes together: a whole number of 1 or more, or a dict of
            such numbers by the epoch, counted from 0, from which they hold: ``{0: 256, 10: 1024}``. A larger batch may
            take the place of a decay of the rate (arXiv:1711.00489); ``WarmupLRScaler(base_batch_size=...)`` would make
            the rate follow it, so give ``scale=`` there.
        count: Takes a training batch, as ``training_step`` does; returns what its loss is the mean over, as a number or
            a tensor without dimensions: ``lambda batch: (batch["labels"] != -100).sum()`` for tokens, a sum of weights
            for a weighted mean, 1 where all batches are to weigh the same. None: its samples, which are the length of
            the first tensor in it.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if whole batches do not make as many samples, if no single loader
            tells its batch size, or batches differ in size (``LengthBatches(max_tokens=...)``), if something else sets
            the accumulation (``Trainer(accumulate_grad_batches=...)``, ``GradientAccumulationScheduler``,
            ``StochasticWeightAveraging``), in manual optimization, or if the strategy may split gradients; in the first
            step, if a batch has no tensor to count, or if the optimizer computes gradients several times.

    Source:
        Marek et al., arXiv:2507.07101 (what accumulation is for); Smith et al., arXiv:1711.00489 (growing batches).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EffectiveBatchSize(1024)])
    """

    saved_as = Sum
    run_as = Step
    saved: Sum
    run: Step

    def __init__(self, samples: int | dict[int, int], count: Callable[[Any], float | Tensor] | None = None) -> None:
        super().__init__()
        if count is not None and not callable(count):
            raise ValueError(f"Expected `count` to be a function of a batch, or None, but got {count!r}.")
        self.by_epoch = checked_by_epoch("samples", samples)
        self.samples, self.count = samples, count
        if len(self.by_epoch) > 1:
            self.grips = (ShorterRun(self),)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse whatever else accumulates, and join loader, backward pass and step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        others = [type(one).__name__ for one in callbacks_of(trainer) if one is not self and _accumulates(one)]
        if (given := trainer.accumulate_grad_batches) != 1:
            others.append(f"Trainer(accumulate_grad_batches={given})")
        if others:
            what = f"sets how many batches make an optimizer step, and so does {others[0]}"
            raise self.refusal(what, "Use one of them.", samples=self.samples)
        for one in callbacks_of(trainer):
            if any(getattr(grip, "sizes_differ", False) for grip in getattr(one, "grips", ())):
                what = f"counts on batches of one size, but {type(one).__name__} makes them of different ones"
                raise self.refusal(what, "Use `Trainer(accumulate_grad_batches=...)`.", samples=self.samples)
        # Before those who take the loader over on fit start, and ask for the length of the run.
        Station.of(trainer.strategy, "process_dataloader").join(self, partial(self._see, trainer))
        Station.of(trainer.strategy, "backward").join(self, self._weigh)
        Station.of(trainer.strategy, "optimizer_step").join(self, partial(self._step, trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse manual optimization, and gradients in parts."""
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            what = f"lets Lightning accumulate, but {type(pl_module).__name__} optimizes manually"
            raise self.refusal(what, "Accumulate there, or let Lightning optimize.", samples=self.samples)
        require_whole(self, trainer, "gradients")

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return how many batches make one optimizer step in an epoch, once the training loader is known."""
        return value_in_epoch(self.run.plan, epoch)

    def _see(self, trainer: Trainer, process: Call, loader: Any) -> Any:
        """Accumulate from the loader on, which `configure_optimizers` may ask for the length of the run."""
        loader = process(loader)
        if trainer.training and self.is_active(trainer):
            self._accumulate(trainer, loader)
        return loader

    def _accumulate(self, trainer: Trainer, loader: Any = None) -> None:
        """Accumulate as many batches as this epoch should; refuse at once what cannot be in a later one."""
        own = loader_batch_size(trainer, loader)
        if own is None:
            what = "needs the batch size, which only a single training DataLoader with a `batch_size` tells"
            way_out = "Give the loader that attribute, in samples of one process."
            raise self.refusal(what, way_out, samples=self.samples)
        try:
            self.run.plan = {at: batches_in_step(size, own, trainer.world_size) for at, size in self.by_epoch.items()}
        except ValueError as error:
            what, way_out = "asks for what whole batches do not make", "Or change the loader's `batch_size`."
            raise self.refusal(what, f"{error.args[0]} {way_out}", samples=self.samples) from error
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Accumulate, also in an epoch under way; say how much."""
        super().on_train_start(trainer, pl_module)
        self._accumulate(trainer)
        batches, epoch = trainer.accumulate_grad_batches, trainer.current_epoch
        size = counted(value_in_epoch(self.by_epoch, epoch), "sample")
        told = f"{self.name}: a step of {size} takes {counted(batches, 'batch')} of each process"
        rank_zero_info(f"{told}.")
        if (here := batches_in_epoch(trainer, epoch)) is not None and here < batches:
            rank_zero_warn(f"{told}, but an epoch has only {here}. Give fewer `samples`.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Accumulate as many as this epoch should."""
        super().on_train_epoch_start(trainer, pl_module)
        self._accumulate(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count what the batch holds, if several make a step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        run, batches = self.run, trainer.accumulate_grad_batches
        # Lightning drops gradients where a step begins, and on resume, unless ExactResume brings them back.
        if batch_idx % batches == 0 or all(weight.grad is None for weight in pl_module.parameters()):
            self.saved.total = 0.0
        run.count = None
        if batches * trainer.world_size == 1:
            return
        count = count_samples(batch) if self.count is None else self.count(batch)
        if count is None:
            way_out = "Give `count=`, which takes a batch and returns what its loss is the mean over."
            raise self.refusal("counts the samples of a batch, but finds no tensor in it", way_out)
        run.count = run.uncounted = count
        self.saved.unit = self.saved.unit or trainer.strategy.broadcast(float(count) or 1.0)

    def _weigh(self, backward: Call, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Let the loss of a batch, or of a part of one, weigh what the batch holds."""
        run = self.run
        if run.count is not None:
            self.saved.total, run.uncounted = self.saved.total + run.uncounted, 0.0
            loss = loss * (run.count / self.saved.unit)
        return backward(loss, *args, **kwargs)

    def _step(self, trainer: Trainer, step: Call, optimizer: Any, closure: Call, *args: Any, **kwargs: Any) -> Any:
        """Step with the mean, which is there before anybody looks at gradients, or clips them."""

        def averaged() -> Any:
            if self.run.count is None:
                what = f"adds up gradients over batches, but {type(optimizer).__name__} computes them more than once"
                raise self.refusal(f"{what} a step", "Use another optimizer, or larger batches.", samples=self.samples)
            result = closure()
            self._average(trainer, optimizer)
            return result

        return step(optimizer, closure if self.run.count is None else averaged, *args, **kwargs)

    def _average(self, trainer: Trainer, optimizer: Any) -> None:
        """Turn the sum of a step's gradients into the mean over what all its batches hold."""
        total, processes = self.saved.total, trainer.world_size
        if processes > 1:
            total = torch.zeros((), device=trainer.strategy.root_device) + total
            torch.distributed.all_reduce(total)
        factor = factor_to_mean(total, self.saved.unit, trainer.accumulate_grad_batches * processes)
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if gradients and (isinstance(factor, Tensor) or factor != 1):
            torch._foreach_mul_(gradients, factor)
        self.run.count = None

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, and let the Trainer accumulate nothing."""
        if self.run.plan:
            trainer.accumulate_grad_batches = 1
        for method in ("process_dataloader", "backward", "optimizer_step"):
            Station.of(trainer.strategy, method).leave(self)
        super().undo(trainer, pl_module)


def _accumulates(callback: Any) -> bool:
    """Tell whether a callback sets the Trainer's accumulation."""
    return hasattr(callback, "get_accumulate_grad_batches") or is_a(callback, "StochasticWeightAveraging")
