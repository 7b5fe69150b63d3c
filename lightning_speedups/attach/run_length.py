"""What a Trainer says of the length of its run; valid from ``on_train_start`` on, and without loading data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_speedups.attach.loaders import find_loaders, find_selection
from lightning_speedups.attach.trick import Grip, callbacks_of
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.core.run_length import RunLength
from lightning_speedups.core.schedules import is_cut_off

if TYPE_CHECKING:
    from torch.optim import Optimizer


def run_length(trainer: Trainer) -> RunLength:
    """Return what the run's length follows from.

    Unlike ``trainer.estimated_stepping_batches`` it is right where accumulation changes over the run, and it neither
    loads data nor disturbs a resumed loader. In manual optimization, where nobody knows how often a module steps, each
    batch counts as one step; ``max_steps``, which counts the steps of all optimizers together, is then that of a module
    in which each of them steps once in a batch.

    Args:
        trainer: A fitting Trainer, in ``on_train_start`` or later.
    """
    epochs, steps, loop, before = trainer.max_epochs, trainer.max_steps, trainer.fit_loop, trainer.global_step
    progress: Any = loop.epoch_progress.current
    in_epoch: int = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    if not trainer.lightning_module.automatic_optimization:
        over: Any = loop.epoch_loop.batch_progress
        steps = math.ceil(steps / max(1, len(trainer.strategy.optimizers))) if steps > 0 else steps
        before, in_epoch = over.total.processed, over.current.processed
    if progress.started > progress.processed:  # an epoch is under way
        before -= in_epoch
    return RunLength(
        None if epochs is None or epochs < 0 else epochs,
        None if steps < 0 else steps,
        _batches_by_epoch(trainer),
        _accumulation_by_epoch(trainer),
        progress.processed,
        before,
    )


def _batches_by_epoch(trainer: Trainer) -> Callable[[int], int | None]:
    if (selection := find_selection(trainer)) is not None:
        return selection.batches_in_epoch
    batches = trainer.num_training_batches
    return lambda _: None if batches == float("inf") else int(batches)


def _accumulation_by_epoch(trainer: Trainer) -> Callable[[int], int]:
    batches = trainer.accumulate_grad_batches
    # Lightning's GradientAccumulationScheduler has it, and so has EffectiveBatchSize.
    told = (getattr(callback, "get_accumulate_grad_batches", None) for callback in callbacks_of(trainer))
    return next(filter(None, told), lambda _: batches)


def batches_in_epoch(trainer: Trainer, epoch: int) -> int | None:
    """Return the number of training batches in an epoch, or None when the loader does not know."""
    return _batches_by_epoch(trainer)(epoch)


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Return how many batches make one optimizer step in an epoch.

    ``trainer.accumulate_grad_batches`` follows a callback that changes it only once that had its turn.
    """
    return _accumulation_by_epoch(trainer)(epoch)


def loader_batch_size(trainer: Trainer, loader: Any = None) -> int | None:
    """Return the batch size of the training loader in one process, in samples, or None where it does not say.

    Tricks that change it from epoch to epoch do not count.

    Args:
        trainer: A fitting Trainer.
        loader: A training loader that it is about to use; None: the one that it has.
    """
    loader = trainer.train_dataloader if loader is None else loader
    # The last one: whole batches as samples, so that the loader itself does not batch.
    samplers = (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    sizes = (getattr(holder, "batch_size", None) for holder in (find_loaders(trainer), loader, *samplers))
    return next((size for size in sizes if isinstance(size, int)), None)


def raw_optimizers(trainer: Trainer) -> list[Optimizer]:
    """Return the run's torch optimizers, without Lightning's wrapper."""
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.strategy.optimizers]


def facts(trainer: Trainer, pl_module: LightningModule) -> RunFacts:
    """Return what schedules can know of a run.

    In manual optimization the steps are the module's own, and nobody knows how many there will be: batches stand in
    their place.
    """
    size, length, automatic = loader_batch_size(trainer), run_length(trainer), pl_module.automatic_optimization
    return RunFacts(
        steps=length.steps if automatic else None,
        steps_in_epochs=length.steps_in_epochs,
        batch_size=size and size * trainer.world_size * length.accumulation(trainer.current_epoch),
        optimizers=tuple(type(optimizer).__name__ for optimizer in raw_optimizers(trainer)),
        told=length.told,
        batches=None if automatic else length.steps,
    )


def steps_until_it_may_stop(trainer: Trainer) -> int | None:
    """Return how many more steps the Trainer must do for its ``min_epochs`` and ``min_steps``, or None if nobody knows.

    Args:
        trainer: A fitting Trainer, in ``on_train_start`` or later.
    """
    if trainer.fit_loop._can_stop_early:
        return 0
    epochs = run_length(trainer).steps_in_epochs(trainer.min_epochs or 0)
    if epochs is None or not trainer.lightning_module.automatic_optimization:
        return None
    return max(epochs, trainer.min_steps or 0) - trainer.global_step


def logger_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs an epoch's metrics: it counts the batches that stepped, from 0.

    Args:
        trainer: A fitting Trainer, in ``on_validation_end`` or ``on_train_epoch_end``, where the count is one ahead.
    """
    return max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - (not trainer.validating))


class GoesByBatches(Protocol):
    """A trick whose values follow from how far the run is, where it optimizes manually."""

    @property
    def goes_by_batches(self) -> bool:
        """Whether it asks for that; else it goes by the steps of each optimizer."""


class BatchClock(Grip):
    """Tells a trick how far a run is that optimizes manually.

    There a module steps as it likes: two optimizers in turn, one of them several times in a batch or in every third
    one. So a batch is a step of the trick's, whatever is done in it, and all optimizers stand at the same place. Where
    ``max_steps`` may end the run, which counts the steps of all optimizers together, the part of it that is used up
    tells how far the run is, if that is further than the part of the batches.

    Args:
        trick: Whose.

    Attributes:
        runs: Whether the run optimizes manually, and the trick wants to go by batches.
        has_max_steps: Whether ``max_steps`` may end it.
    """

    trick: GoesByBatches  # type: ignore[assignment]
    _batches: Any
    _steps: Any

    def __init__(self, trick: GoesByBatches) -> None:
        super().__init__(trick)  # type: ignore[arg-type]
        self.leave()

    def on_train_start(self, trainer: Trainer) -> None:
        """Find out what ends the run."""
        if trainer.lightning_module.automatic_optimization or not self.trick.goes_by_batches:
            return
        loop, length, self.runs = trainer.fit_loop.epoch_loop, run_length(trainer), True
        self._batches, self._steps = loop.batch_progress.total, loop.manual_optimization.optim_step_progress.total
        self._total, self._max_steps = length.told or 0, max(0, trainer.max_steps)
        self._by_epochs = replace(length, max_steps=None).told or 0

    def leave(self, trainer: Trainer | None = None) -> None:
        """Stand still."""
        self.runs, self._batches, self._steps = False, None, None
        self._total = self._max_steps = self._by_epochs = 0
        self._seen = (-1, 0)  # a batch, and the steps before it: both optimizers of a GAN stand at the same place

    @property
    def has_max_steps(self) -> bool:
        """Whether ``max_steps`` may end the run."""
        return self._max_steps > 0

    @property
    def batches(self) -> int:
        """How many batches are over."""
        return int(self._batches.processed)

    @property
    def of_run(self) -> int:
        """How many are over, on the scale on which the run ends at its length as it was planned."""
        if not self._max_steps:
            return self.batches
        if self.batches != self._seen[0]:
            self._seen = (self.batches, self._steps.completed)
        by_epochs = self.batches * self._total // self._by_epochs if self._by_epochs else 0
        return max(by_epochs, self._seen[1] * self._total // self._max_steps)


class ShorterRun(Grip):
    """Says so if schedulers of the module's own, stepped in each step, count on steps that a trick makes fewer: by
    shorter epochs, or by accumulating more batches later in the run.
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Compare what the schedulers count on with what will be."""
        length, selection = run_length(trainer), find_selection(trainer)
        if length.steps is None or not trainer.lightning_module.automatic_optimization:
            return
        full = length.batches_in if selection is None else lambda _: selection.batches_in_epoch(None)
        told = replace(length, batches_in=full, accumulation=lambda _: length.accumulation(0)).told or 0
        for config in trainer.lr_scheduler_configs:
            counts = config.interval == "step" and not config.reduce_on_plateau
            if counts and is_cut_off(config.scheduler, length.steps // config.frequency, told // config.frequency):
                rank_zero_warn(
                    f"{self.trick.name}: the run has {length.steps} optimizer steps, where "
                    f"`trainer.estimated_stepping_batches` says {told}, so that the scheduler "
                    f"{type(config.scheduler).__name__} from configure_optimizers does not come to its end. Give it "
                    f"{length.steps} steps, or use a schedule of this package instead, which knows the length."
                )
