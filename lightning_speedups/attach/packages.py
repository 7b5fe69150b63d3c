"""Lightning under its two names: which of them something comes from, and the classes that go with it.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code with different classes. Whoever asks for a class here,
rather than importing it, goes with the Trainer that it was given. Callbacks and errors of ours are both packages'.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from typing import Any

from lightning_utilities.core import rank_zero

ROOTS = ("lightning.pytorch", "pytorch_lightning")

# The package that is imported last says under which name both log, and users silence theirs by that name. Who sorts
# imports has `lightning` before this package, and `pytorch_lightning` after it.
_said = {name: getattr(rank_zero, name) for name in ("log", "rank_zero_deprecation_category")}
_is_chosen = any(root in sys.modules for root in ROOTS)

import lightning.pytorch  # noqa: E402
import pytorch_lightning  # noqa: E402
from lightning.pytorch.utilities import exceptions as lightnings_exceptions  # noqa: E402
from pytorch_lightning.utilities import exceptions  # noqa: E402

if _is_chosen:
    vars(rank_zero).update(_said)


class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """A callback that the Trainers of both packages take for one of their own."""


class MisconfigurationException(
    lightnings_exceptions.MisconfigurationException,
    exceptions.MisconfigurationException,  # type: ignore[misc]
):
    """An error that is caught under the name of either package."""


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
    return _named(package_of(thing), path)


def is_overridden(hook: str, owner: Any) -> bool:
    """Tell whether a LightningModule, a DataModule or a Callback has a hook of its own."""
    return bool(class_of(owner, "utilities.model_helpers.is_overridden")(hook, owner))


def require_served(trainer: Any, name: str, *others: Any) -> None:
    """Refuse what is no Trainer of Lightning's, and what comes from the other package than the Trainer.

    Args:
        trainer: What was given for a Trainer.
        name: Who needs it, in the message.
        *others: What is to go with it, such as a module; what is of neither package does.

    Raises:
        MisconfigurationException: If the Trainer is of neither package, or something else of the other.
    """
    package = package_of(trainer)
    if package is None or not is_a(trainer, "Trainer"):
        raise MisconfigurationException(
            f"{name} needs a Trainer of `{ROOTS[0]}` or `{ROOTS[1]}`, but got {type(trainer).__name__} of "
            f"`{type(trainer).__module__}`."
        )
    for other in others:
        if (theirs := package_of(other)) not in (None, package):
            kind = next(kind.__name__ for kind in type(other).__mro__ if _root(kind))
            raise MisconfigurationException(
                f"{name} got a Trainer of `{package}`, but {type(other).__name__} is a {kind} of `{theirs}`. These are "
                f"two packages with a class each. Use `from {package} import {kind}` for {type(other).__name__}, or "
                f"`from {theirs} import Trainer`."
            )


@functools.cache
def _named(package: str | None, path: str) -> Any:
    where, _, name = f".{path}".rpartition(".")
    return getattr(import_module(f"{package}{where}"), name)


def _root(kind: type) -> str | None:
    return next((root for root in ROOTS if f"{kind.__module__}.".startswith(f"{root}.")), None)
