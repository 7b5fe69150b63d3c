"""What a recipe takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

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


def pair_of_tensors(data: Any) -> tuple[Tensor, Tensor] | None:
    """Return the two tensors of a data set, or None where it is none of two.

    Args:
        data: A pair of tensors, or a ``TensorDataset`` of them.

    Example:
        >>> import torch
        >>> pair_of_tensors([torch.ones(2), torch.zeros(2)]), pair_of_tensors(torch.ones(2, 3))
        ((tensor([1., 1.]), tensor([0., 0.])), None)
    """
    parts = data.tensors if type(data) is TensorDataset else data
    if isinstance(parts, tuple | list) and len(parts) == 2 and all(isinstance(one, Tensor) for one in parts):
        return parts[0], parts[1]
    return None
