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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedups.attach.copies import copy_module
from lightning_speedups.attach.randomness import same_randomness

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Running mean and variance of each normalising module, by its name."""


@contextmanager
def rehearsal(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[LightningModule, Callable[[Any], None]]]:
    """Yield a copy of the module, in the modes of training, and a function that runs its ``training_step`` on a batch.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        pl_module: Its module, without a wrapper.

    Raises:
        NoCopyError: If the optimization is manual (the step would step), if the strategy splits parameters
            between devices, or if the module cannot be copied.
    """
    twin = _double(trainer, pl_module)
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
        NoCopyError: As for [rehearsal][lightning_speedups.attach.rehearsal.rehearsal].
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
    for name, values in statistics.items():
        own: Any = (norms[name].running_mean, norms[name].running_var)
        before[name] = own[0].clone(), own[1].clone()
        for value, new in zip(own, values, strict=True):
            value.copy_(new)
    return before


def _double(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    twin = copy_module(trainer, pl_module, shared=pl_module.parameters())
    # Validation has switched all modules to evaluation; it remembers their modes.
    modes = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.validating else {}
    for part, module in twin.named_modules():
        module.training = modes.get(part, module.training)
    # The step may speak to the loggers, and tell the Trainer to stop.
    surrogate = copy.copy(trainer)
    surrogate.loggers = [DummyLogger() for _ in trainer.loggers]
    twin.trainer = surrogate
    for hook in ("log", "log_dict"):
        twin.__dict__[hook] = lambda *_, **__: None
    return twin
