"""Lightning under its two names: which of them something comes from, and the classes that go with it.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code with different classes. Whoever asks for a class here,
rather than importing it, goes with the Trainer that it was given.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

ROOTS = ("lightning.pytorch", "pytorch_lightning")


def package_of(thing: Any) -> str | None:
    """Return the package whose classes something is made of, or None where it is of neither.

    Args:
        thing: A Trainer, module, strategy, callback or anything else.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Net(LightningModule): ...
        >>> package_of(Net()), package_of(3)
        ('lightning.pytorch', None)
    """
    return next((root for kind in type(thing).__mro__ if (root := _root(kind))), None)


def is_a(thing: Any, *names: str) -> bool:
    """Tell whether something is of one of Lightning's classes, or of a class made of it, in whichever package.

    Args:
        thing: What is asked about.
        *names: The classes' names.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> is_a(SingleDeviceStrategy(), "DDPStrategy", "SingleDeviceStrategy"), is_a(3, "DDPStrategy")
        (True, False)
    """
    return any(kind.__name__ in names and _root(kind) is not None for kind in type(thing).__mro__)


def class_of(thing: Any, path: str) -> Any:
    """Return a class or function of the package that something comes from.

    Args:
        thing: What it must go with, such as a Trainer.
        path: Where it is in the package, as ``"strategies.DDPStrategy"``.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class_of(LightningModule(), "strategies.SingleDeviceStrategy").__module__
        'lightning.pytorch.strategies.single_device'
    """
    where, _, name = f".{path}".rpartition(".")
    return getattr(import_module(f"{package_of(thing)}{where}"), name)


def is_overridden(hook: str, owner: Any) -> bool:
    """Tell whether a LightningModule, a DataModule or a Callback has a hook of its own."""
    return bool(class_of(owner, "utilities.model_helpers.is_overridden")(hook, owner))


def require_served(trainer: Any, name: str) -> None:
    """Refuse a Trainer that this package does not serve.

    Args:
        trainer: What was given for a Trainer.
        name: Who needs it, in the message.

    Raises:
        MisconfigurationException: If it is not one of ``lightning.pytorch``.
    """
    if not is_a(trainer, "Trainer") or package_of(trainer) != ROOTS[0]:
        raise MisconfigurationException(
            f"{name} needs a Trainer of `lightning.pytorch`, but got one of `{type(trainer).__module__}`, which "
            "has other classes. Use `from lightning.pytorch import Trainer, LightningModule`."
        )


def _root(kind: type) -> str | None:
    return next((root for root in ROOTS if f"{kind.__module__}.".startswith(f"{root}.")), None)
