"""What a recipe gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_speedups.tricks.batches.in_memory.in_memory_loader import InMemoryLoader


@dataclass(frozen=True)
class Stack:
    """A recipe's parts: ``Trainer(**stack.trainer).fit(module, stack.loader)``.

    Attributes:
        trainer: Arguments of the Trainer, callbacks included.
        loader: Training loader.
        loss: Training loss of (logits, labels), for the module to use; its own works too, with a little less gain.
    """

    trainer: dict[str, Any]
    loader: InMemoryLoader
    loss: nn.Module
