"""The next batch is on its way to the device while this one trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader

from lightning_speedups.core.batch import tensors_in

CUDA: Any = torch.cuda  # its streams are untyped
END = object()


def copied_ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on a CUDA device, the next one of which is on its way there, through a stream of its own.

    Args:
        batches: Batches in pinned memory.
        device: The device.
    """
    stream = CUDA.Stream(device)

    def begin() -> Any:
        batch = next(batches, END)
        with CUDA.stream(stream):
            return move_data_to_device(batch, device)

    batch = begin()
    while batch is not END:
        current = CUDA.current_stream(device)
        current.wait_stream(stream)
        for tensor in tensors_in(batch):
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is the other stream's
        following = begin()
        yield batch
        batch = following


class Ahead(DataLoader[Any]):
    """Copies its batches to a CUDA device ahead.

    Attributes:
        copies_to: The device.
    """

    copies_to: torch.device

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Asked for more than it has, a sampler may draw.
        return copied_ahead(itertools.islice(super().__iter__(), sized_len(self)), self.copies_to)
