"""The random states of a process: read, and put back; and whether what is loaded is random."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer

from lightning_speedups.tensors.feature_store import fingerprint


@contextmanager
def same_randomness(trainer: Trainer | None = None) -> Iterator[None]:
    """Put the random states back, also after an exception, for which Lightning's ``isolate_rng`` does not care."""
    uses_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
    states = _collect_rng_states(uses_cuda or torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _set_rng_states(states)


def random_states(trainer: Trainer) -> dict[str, Any]:
    """Return the random states of Python, NumPy and torch, which are equal as long as nobody draws from them."""
    states: dict[str, Any] = _collect_rng_states(trainer.strategy.root_device.type == "cuda")
    torchs = [tensor.numpy().tobytes() for tensor in (states["torch"], *states.get("torch.cuda", ()))]
    return {"Python": states["python"], "NumPy": pickle.dumps(states.get("numpy")), "torch": torchs}


def load_twice(trainer: Trainer, load: Callable[[], Any]) -> tuple[str, str | None]:
    """Load something twice, and put the random states back.

    Args:
        trainer: A Trainer.
        load: Loads it, with tensors in it.

    Returns:
        A fingerprint of it, and what shows that it is random, if something does.

    Example:
        >>> load_twice(Trainer(logger=False), lambda: torch.ones(3))[1] is None
        True
        >>> load_twice(Trainer(logger=False), lambda: torch.rand(3))[1]
        'are different when they are loaded twice'
    """
    with same_randomness(trainer):
        before = random_states(trainer)
        one, other = (fingerprint(load()) for _ in range(2))
        drew = random_states(trainer) != before
    if one != other:
        return one, "are different when they are loaded twice"
    return one, "draw random numbers when loaded" if drew else None


def plain_states(trainer: Trainer) -> dict[str, Any]:
    """Return the random states of this process and its device, made of what any checkpoint can hold.

    Args:
        trainer: Whose device counts.
    """
    states: dict[str, Any] = _collect_rng_states(False)
    if (numpys := states.get("numpy")) is not None:
        states["numpy"] = [part.tolist() if hasattr(part, "tolist") else part for part in numpys]
    device = trainer.strategy.root_device
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def put_states(trainer: Trainer, states: dict[str, Any]) -> None:
    """Put random states back that were taken as plain ones; a device's where this run has one of its kind.

    Args:
        trainer: Whose device counts.
        states: As ``plain_states`` returns them, and more.
    """
    _set_rng_states(states)
    device = trainer.strategy.root_device
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
