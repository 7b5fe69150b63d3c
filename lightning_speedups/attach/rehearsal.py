"""Training steps that leave no trace: run on a copy of the module that shares its parameters.

They tell whether a model takes a batch, and which statistics its normalisation would have on it. The copy has buffers,
metrics, counters and lists of its own; nothing is logged, no gradient is computed, and random states are put back.
"""

from __future__ import annotations

import copy
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedups.attach.batches import transferred
from lightning_speedups.attach.copies import NoCopyError, copy_module, dummy_loggers
from lightning_speedups.attach.randomness import same_randomness

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Running mean and variance of each normalising module, by its name."""


@contextmanager
def rehearsal(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[LightningModule, Callable[[Any], Any]]]:
    """Yield a copy of the module, in the modes of training, and a function that runs its ``training_step`` on a batch
    and returns what that returns.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        pl_module: Its module, without a wrapper.

    Raises:
        NoCopyError: If the optimization is manual (the step would step), if the strategy splits parameters
            between devices, or if the module cannot be copied.
    """
    twin = _double(trainer, pl_module)
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]

    def step(batch: Any) -> Any:
        takes_index = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            return twin.training_step(*((batch, 0) if takes_index else (batch,)))

    try:
        with same_randomness(trainer):
            yield twin, step
    finally:
        for buffer, value in buffers:  # a function that has captured the module itself goes on to use it
            buffer.copy_(value)


class _Seen(Exception):
    """Ends a training step in which all was seen that was looked for."""


def first_inputs(
    trainer: Trainer, pl_module: LightningModule, batch: Any, part: nn.Module, others: Iterable[nn.Module] = ()
) -> Tensor:
    """Return what a part of the module is given first in the training step of a batch.

    The step is rehearsed up to there; what is compiled runs as it is written.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        pl_module: Its module, without a wrapper.
        batch: As ``training_step`` takes it, on the device.
        part: The part.
        others: Parts that are not to be called before it.

    Raises:
        NoCopyError: As for [rehearsal][lightning_speedups.attach.rehearsal.rehearsal], and if ``training_step`` fetches
            its batches itself, does not call the part, or calls another one before.
    """
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise NoCopyError(f"{type(pl_module).__name__}.training_step fetches its batches itself")
    names = {module: name for name, module in pl_module.named_modules()}
    seen: dict[nn.Module, Tensor] = {}

    def see(one: nn.Module, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen[one] = [*inputs, *named.values()][0]
        raise _Seen

    with torch.compiler.set_stance("force_eager"), rehearsal(trainer, pl_module) as (twin, step):
        for one in {part, *others}:
            twin.get_submodule(names[one]).register_forward_pre_hook(partial(see, one), with_kwargs=True)
        with suppress(_Seen):
            step(batch)
    if part not in seen:
        instead = "".join(f" first, but `{names[one]}`" for one in seen)
        raise NoCopyError(f"{type(pl_module).__name__}.training_step does not call `{names[part]}`{instead}")
    return seen[part]


def step_seconds(trainer: Trainer, batch: Any) -> float:
    """Return about how many seconds a training step takes: three forward passes, as a backward pass takes two.

    Args:
        trainer: A fitting Trainer, in training or in validation.
        batch: As the loader hands it out.

    Raises:
        NoCopyError: As for [rehearsal][lightning_speedups.attach.rehearsal.rehearsal].
    """

    def forward() -> None:
        step(moved)
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()

    with rehearsal(trainer, trainer.lightning_module) as (_, step):
        moved = transferred(trainer, batch)
        return 3 * min(timeit.repeat(forward, number=1, repeat=3))


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


def norms_of(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm modules that keep running statistics, by name.

    Args:
        module: Where to look.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    }


def swap_statistics(module: nn.Module, statistics: Statistics) -> Statistics:
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
    # A validation under way has switched all modules to evaluation; it remembers their modes.
    is_switched = trainer.validating and not pl_module.training
    modes = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if is_switched else {}
    for part, module in twin.named_modules():
        module.training = modes.get(part, module.training)
    # The step may speak to the loggers, and tell the Trainer to stop.
    surrogate = copy.copy(trainer)
    surrogate.loggers = dummy_loggers(trainer)
    twin.trainer = surrogate
    for hook in ("log", "log_dict"):
        twin.__dict__[hook] = lambda *_, **__: None
    return twin
