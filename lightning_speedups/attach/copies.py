"""Copies of a module to try something on, which leave the module as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.attach.packages import class_of, is_a
from lightning_speedups.attach.trick import Trick, callbacks_of


class NoCopyError(RuntimeError):
    """A module cannot be copied; the message says why."""


def may_split_model(trainer: Trainer) -> bool:
    """Tell whether the strategy may hold parts of the module on several devices, so that no copy has all of it."""
    strategy = trainer.strategy
    return is_a(strategy, "DeepSpeedStrategy") or not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")


def require_whole(trick: Trick, trainer: Trainer, parts: str) -> None:
    """Refuse a strategy that may split the model.

    Args:
        trick: Who needs it whole.
        trainer: Its Trainer.
        parts: What of it, in the message: ``"weights"``.

    Raises:
        MisconfigurationException: If it may.
    """
    if may_split_model(trainer):
        what = f"needs whole {parts}, which {type(trainer.strategy).__name__} may split"
        raise trick.refusal(what, "Use `strategy='ddp'`, or a single device.")


def require_copyable(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a module of which a copy cannot be trained.

    Raises:
        NoCopyError: If the optimization is manual (a copy's step would step the module's optimizers), or if the
            strategy splits parameters between devices.
    """
    if not pl_module.automatic_optimization:
        raise NoCopyError(f"{type(pl_module).__name__} optimizes manually")
    if may_split_model(trainer):
        raise NoCopyError(f"{type(trainer.strategy).__name__} may split the model between devices")


def copy_module(trainer: Trainer, pl_module: LightningModule, shared: Iterable[Any] = ()) -> LightningModule:
    """Copy a module with all it holds, uncompiled; its surroundings and its data are shared.

    Args:
        trainer: Its Trainer.
        pl_module: The module, without a wrapper.
        shared: What else the copy shares with it.

    Raises:
        NoCopyError: If it is not copyable, or something in it is not.
    """
    require_copyable(trainer, pl_module)
    held = [value for module in pl_module.modules() for value in vars(module).values()]
    around = [trainer, trainer.strategy, *callbacks_of(trainer), *trainer.loggers, *shared]
    around += [value for value in held if isinstance(value, (Trick, Dataset, DataLoader))]
    around += [value for value in held if is_a(value, "LightningDataModule", "Trainer")]
    # What a step has left behind with its graph cannot be copied.
    around += [value for value in flat(held) if isinstance(value, Tensor) and value.grad_fn is not None]
    try:
        twin = copy.deepcopy(pl_module, {id(thing): thing for thing in around if thing is not None})
    except Exception as error:
        raise NoCopyError(f"{type(pl_module).__name__} cannot be copied ({error})") from error
    vars(twin).pop("_compiled_call_impl", None)
    if twin._compiler_ctx is not None:
        class_of(twin, "utilities.compile.to_uncompiled")(twin)
    return twin


def dummy_loggers(trainer: Trainer) -> list[Any]:
    """Return a logger that logs nothing for each of the Trainer's: a copied ``training_step`` may speak to them."""
    return [class_of(trainer, "loggers.logger.DummyLogger")() for _ in trainer.loggers]


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Return what stands in lists, tuples and dicts, however deep, instead of these.

    Example:
        >>> list(flat([1, (2, {"a": [3]})]))
        [1, 2, 3]
    """
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        elif isinstance(value, dict):
            yield from flat(value.values())
        else:
            yield value
