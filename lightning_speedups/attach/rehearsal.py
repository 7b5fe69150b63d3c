"""Training steps that leave no trace: run on a copy of the module that shares its parameters.

They tell whether a model takes a batch, and which statistics its normalisation would have on it. The copy has buffers,
metrics, counters and lists of its own; nothing is logged, no gradient is computed, and random states are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.attach.trick import Trick, callbacks_of, copy_module, may_split_model, same_randomness

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Running mean and variance of each normalising module, by its name."""


class NoRehearsalError(RuntimeError):
    """A training step of this module cannot be run without a trace; the message says why."""


@contextmanager
def rehearsal(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[LightningModule, Callable[[Any], None]]]:
    """Yield a copy of the module, in the modes of training, and a function that runs its ``training_step`` on a batch.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        pl_module: Its module, without a wrapper.

    Raises:
        NoRehearsalError: If the optimization is manual (the step would step), if the strategy splits parameters
            between devices, or if the module cannot be copied.
    """
    twin = _copy_module(trainer, pl_module)
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]

    def step(batch: Any) -> None:
        takes_index = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            twin.training_step(*((batch, 0) if takes_index else (batch,)))

    try:
        with same_randomness(trainer):
            yield twin, step
    finally:
        for buffer, value in buffers:  # a function that has captured the module itself goes on to use it
            buffer.copy_(value)


def fresh_statistics(trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any]) -> Statistics:
    """Return the statistics that BatchNorm modules in training have on some batches: the mean over these.

    Each rank computes its own, as BatchNorm does.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        pl_module: Its module, without a wrapper.
        batches: As ``training_step`` takes them, on the device.

    Raises:
        NoRehearsalError: As for [rehearsal][lightning_speedups.attach.rehearsal.rehearsal].
    """
    with rehearsal(trainer, pl_module) as (twin, step):
        norms = {name: module for name, module in norms_of(twin).items() if module.training}
        for module in norms.values():
            module.reset_running_stats()
            module.momentum = None  # which makes it average
        for batch in batches if norms else ():
            step(batch)
        return {
            name: (module.running_mean, module.running_var)  # type: ignore[misc]  # norms_of left those without out
            for name, module in norms.items()
            if module.num_batches_tracked
        }


def norms_of(module: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm modules that keep running statistics, by name.

    Args:
        module: Where to look.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    }


def swap_statistics(module: torch.nn.Module, statistics: Statistics) -> Statistics:
    """Give BatchNorm modules other statistics, and return those that they had.

    Args:
        module: Where they are.
        statistics: What to give them; modules that are not named keep theirs.
    """
    norms, before = norms_of(module), Statistics()
    with torch.no_grad():
        for name, values in statistics.items():
            own = (norms[name].running_mean, norms[name].running_var)
            before[name] = tuple(value.clone() for value in own)  # type: ignore[assignment,union-attr]
            for value, new in zip(own, values, strict=True):
                value.copy_(new)  # type: ignore[union-attr]
    return before


def _copy_module(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise NoRehearsalError(f"{name} optimizes manually")
    if may_split_model(trainer):
        raise NoRehearsalError(f"{type(trainer.strategy).__name__} may split the model between devices")
    values = [value for module in pl_module.modules() for value in vars(module).values()]
    surroundings = (LightningDataModule, Trainer, Trick, Dataset, DataLoader)
    shared: list[Any] = [trainer, trainer.strategy, *callbacks_of(trainer), *trainer.loggers, *pl_module.parameters()]
    shared += [value for value in values if isinstance(value, surroundings)]
    # What a step has left behind with its graph cannot be copied.
    shared += [value for value in _flat(values) if isinstance(value, Tensor) and value.grad_fn is not None]
    modes = _modes(trainer, pl_module)
    try:
        twin = copy_module(pl_module, shared)
    except Exception as error:
        raise NoRehearsalError(f"{name} cannot be copied ({error})") from error
    for part, module in twin.named_modules():
        module.training = modes.get(part, module.training)
    # The step may speak to the loggers, and tell the Trainer to stop.
    surrogate = copy.copy(trainer)
    surrogate.loggers = [DummyLogger() for _ in trainer.loggers]
    twin.trainer = surrogate
    for hook in ("log", "log_dict"):
        twin.__dict__[hook] = _nothing
    return twin


def _modes(trainer: Trainer, pl_module: LightningModule) -> dict[str, bool]:
    """Return which modules train, by name; validation has switched all of them to evaluation."""
    if trainer.validating:
        return dict(trainer.fit_loop.epoch_loop.val_loop._module_mode.mode)
    return {name: module.training for name, module in pl_module.named_modules()}


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
