"""The random states of a process: read, and put back."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer


@contextmanager
def same_randomness(trainer: Trainer) -> Iterator[None]:
    """Put the random states back, also after an exception, for which Lightning's ``isolate_rng`` does not care."""
    states = _collect_rng_states(trainer.strategy.root_device.type == "cuda" or torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _set_rng_states(states)


def random_states(trainer: Trainer) -> dict[str, Any]:
    """Return the random states of Python, NumPy and torch, which are equal as long as nobody draws from them."""
    states: dict[str, Any] = _collect_rng_states(trainer.strategy.root_device.type == "cuda")
    torchs = [tensor.numpy().tobytes() for tensor in (states["torch"], *states.get("torch.cuda", ()))]
    return {"Python": states["python"], "NumPy": pickle.dumps(states.get("numpy")), "torch": torchs}
