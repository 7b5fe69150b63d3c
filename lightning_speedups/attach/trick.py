"""What all tricks that are callbacks share: the right kind of Trainer, and everything put back at the end."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups.core.durations import Run

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Trick(Callback):
    """Base of the callbacks of this package.

    A subclass changes what it must in ``setup`` (for stage ``"fit"``) or later, and puts it back in ``undo``, which
    runs after the fit and also after an exception, when Lightning calls no ``teardown``.
    """

    @property
    def name(self) -> str:
        """The trick's name in messages."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of the other package."""
        if not isinstance(trainer, Trainer):
            raise MisconfigurationException(
                f"{self.name} is a callback of `lightning.pytorch`, but it was given to a Trainer of "
                f"`{type(trainer).__module__}`, whose classes are different ones. Use `from lightning.pytorch import "
                "Trainer, LightningModule`."
            )

    def is_active(self, trainer: Trainer) -> bool:
        """Tell whether the Trainer runs this trick: Lightning's tuners take the callbacks away for their trial runs."""
        return self in callbacks_of(trainer)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back everything that was changed; may be called twice, or without a fit before it."""
        for name in ("log", "log_dict"):  # Lightning leaves the module's there, which would be pickled with the trick
            self.__dict__.pop(name, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self.undo(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self.undo(trainer, pl_module)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return callbacks


def batches_in_epoch(trainer: Trainer, epoch: int) -> int | None:
    """Return the number of training batches in an epoch, or None when the loader does not know; valid from
    ``on_train_start`` on.
    """
    # Tricks that change the loader make epochs of different lengths.
    planned = getattr(trainer.strategy.__dict__.get("process_dataloader"), "batches_in_epoch", None)
    if planned is not None:
        return planned(epoch)  # type: ignore[no-any-return]
    batches = trainer.num_training_batches
    return None if batches == float("inf") else int(batches)


def steps_in_epochs(trainer: Trainer, epochs: float) -> int | None:
    """Return the optimizer steps in the run's first epochs, or None when the loader does not know its length.

    Unlike ``trainer.estimated_stepping_batches`` it is right under ``GradientAccumulationScheduler``, and it neither
    loads data nor disturbs a resumed loader.

    Args:
        trainer: A fitting Trainer, in ``on_train_start`` or later.
        epochs: How many; a part of an epoch counts in proportion.
    """
    if epochs == 0:
        return 0
    if batches_in_epoch(trainer, 0) is None:
        return None
    whole = (
        math.ceil((batches_in_epoch(trainer, epoch) or 0) / accumulation(trainer, epoch))
        for epoch in range(math.ceil(epochs))
    )
    return round(sum(steps * min(1.0, epochs - epoch) for epoch, steps in enumerate(whole)))


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Return how many batches make one optimizer step in an epoch.

    ``trainer.accumulate_grad_batches`` follows a ``GradientAccumulationScheduler`` only once that had its turn.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def total_batches(trainer: Trainer) -> int | None:
    """Return the training batches of the whole run, or None when it is open-ended; valid from ``on_train_start`` on."""
    first, steps_left = batches_in_epoch(trainer, 0), trainer.max_steps
    epochs = None if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    if first is None:
        return None if steps_left < 0 else steps_left * accumulation(trainer, 0)
    if epochs is None and (steps_left < 0 or first == 0):
        return None
    total = 0
    for epoch in itertools.count() if epochs is None else range(epochs):
        batches, size = batches_in_epoch(trainer, epoch) or 0, accumulation(trainer, epoch)
        if 0 <= steps_left * size <= batches:
            return total + steps_left * size
        steps_left -= math.ceil(batches / size) if steps_left >= 0 else 0
        total += batches
    return total


def total_steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps of the whole run, or None when it is open-ended; valid from ``on_train_start`` on."""
    epochs = trainer.max_epochs
    by_epochs = None if epochs is None or epochs < 0 else steps_in_epochs(trainer, epochs)
    limits = [limit for limit in (by_epochs, trainer.max_steps) if limit is not None and limit >= 0]
    return min(limits) if limits else None


def facts(trainer: Trainer, pl_module: LightningModule) -> Run:
    """Return what schedules can know of a run; valid from ``on_train_start`` on.

    In manual optimization the steps are the module's own: nobody knows how many there will be, and an epoch is taken to
    have one in each batch.
    """
    size = loader_batch_size(trainer)
    return Run(
        steps=total_steps(trainer) if pl_module.automatic_optimization else None,
        steps_in_epochs=partial(steps_in_epochs, trainer),
        batch_size=size and size * trainer.world_size * accumulation(trainer, trainer.current_epoch),
        optimizers=tuple(type(optimizer).__name__ for optimizer in raw_optimizers(trainer)),
    )


def loader_batch_size(trainer: Trainer) -> int | None:
    """Return the batch size of the training loader in one process, in samples, or None where it does not say.

    Tricks that change it from epoch to epoch do not count.
    """
    loader = trainer.train_dataloader
    for size in (
        getattr(trainer.strategy.__dict__.get("process_dataloader"), "own_batch_size", None),
        getattr(loader, "batch_size", None),
        getattr(getattr(loader, "batch_sampler", None), "batch_size", None),
    ):
        if isinstance(size, int):
            return size
    # Whole batches as samples, so that the loader itself does not batch.
    size = getattr(getattr(loader, "sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def raw_optimizers(trainer: Trainer) -> list[Optimizer]:
    """Return the run's torch optimizers, without Lightning's wrapper."""
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.strategy.optimizers]


@contextmanager
def same_randomness(trainer: Trainer) -> Iterator[None]:
    """Put the random states back, also after an exception, for which Lightning's ``isolate_rng`` does not care."""
    states = _collect_rng_states(trainer.strategy.root_device.type == "cuda" or torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _set_rng_states(states)


def random_states(trainer: Trainer) -> tuple[Any, ...]:
    """Return the random states of torch, Python and NumPy, which are equal as long as nobody draws from them."""
    cuda = trainer.strategy.root_device.type == "cuda"
    states: dict[str, Any] = _collect_rng_states(cuda)
    tensors = [states["torch"], *states.get("torch.cuda", ())]
    numpys = [part if isinstance(part, (str, int, float)) else part.tobytes() for part in states.get("numpy", ())]
    return (states["python"], *numpys, *(tensor.numpy().tobytes() for tensor in tensors))


def may_split_model(trainer: Trainer) -> bool:
    """Tell whether the strategy may hold parts of the module on several devices, so that no copy has all of it."""
    strategy = trainer.strategy
    return isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))


def copy_module(pl_module: LightningModule, shared: Iterable[Any]) -> LightningModule:
    """Copy a module with all it holds, uncompiled.

    Args:
        pl_module: The module, without a wrapper.
        shared: What the copy shares with it.
    """
    twin = copy.deepcopy(pl_module, {id(thing): thing for thing in shared if thing is not None})
    vars(twin).pop("_compiled_call_impl", None)
    if twin._compiler_ctx is not None:
        to_uncompiled(twin)
    return twin


def patch(owner: Any, name: str, stand_in: Any) -> None:
    """Put a stand-in for a method on one instance."""
    owner.__dict__[name] = stand_in


def unpatch(owner: Any, name: str, original: Any) -> None:
    """Give an instance back the method it had: one of its own, or its class's."""
    if getattr(original, "__func__", None) is getattr(type(owner), name, None):
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = original
