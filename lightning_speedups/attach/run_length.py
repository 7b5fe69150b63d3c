"""What a Trainer says of the length of its run; valid from ``on_train_start`` on, and without loading data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_speedups.attach.loaders import find_selection
from lightning_speedups.attach.trick import Grip, callbacks_of
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.core.run_length import RunLength
from lightning_speedups.core.schedules import is_cut_off

if TYPE_CHECKING:
    from torch.optim import Optimizer


def run_length(trainer: Trainer) -> RunLength:
    """Return what the run's length follows from.

    Unlike ``trainer.estimated_stepping_batches`` it is right where accumulation changes over the run, and it neither
    loads data nor disturbs a resumed loader.

    Args:
        trainer: A fitting Trainer, in ``on_train_start`` or later.
    """
    epochs, steps, loop, before = trainer.max_epochs, trainer.max_steps, trainer.fit_loop, trainer.global_step
    progress: Any = loop.epoch_progress.current
    if progress.started > progress.processed:  # an epoch is under way
        before -= loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    # In manual optimization all optimizers' steps are counted together, and say nothing of the length.
    automatic = trainer.lightning_module.automatic_optimization
    return RunLength(
        None if epochs is None or epochs < 0 else epochs,
        None if steps < 0 else steps,
        _batches_by_epoch(trainer),
        _accumulation_by_epoch(trainer),
        *((progress.processed, before) if automatic else ()),
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
    sizes = (getattr(holder, "batch_size", None) for holder in (find_selection(trainer), loader, *samplers))
    return next((size for size in sizes if isinstance(size, int)), None)


def raw_optimizers(trainer: Trainer) -> list[Optimizer]:
    """Return the run's torch optimizers, without Lightning's wrapper."""
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.strategy.optimizers]


def facts(trainer: Trainer, pl_module: LightningModule) -> RunFacts:
    """Return what schedules can know of a run.

    In manual optimization the steps are the module's own: nobody knows how many there will be, and an epoch is taken to
    have one in each batch.
    """
    size, length = loader_batch_size(trainer), run_length(trainer)
    return RunFacts(
        steps=length.steps if pl_module.automatic_optimization else None,
        steps_in_epochs=length.steps_in_epochs,
        batch_size=size and size * trainer.world_size * length.accumulation(trainer.current_epoch),
        optimizers=tuple(type(optimizer).__name__ for optimizer in raw_optimizers(trainer)),
        told=length.told,
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
