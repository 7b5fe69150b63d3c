"""Cutting a batch into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lightning_speedups.core.batch import replace_part


def micro_sizes(samples: int, size: int | None) -> list[int]:
    """Return the sizes of as few micro-batches as there must be, which differ by one sample at most.

    Args:
        samples: In the batch.
        size: So many at a time at most, 1 or more; None for all.

    Example:
        >>> micro_sizes(10, 4), micro_sizes(8, 4), micro_sizes(8, None)
        ([4, 3, 3], [4, 4], [8])
    """
    count = 1 if size is None else max(1, -(-samples // size))
    return [samples // count + (i < samples % count) for i in range(count)]


def split_batch(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return a batch as micro-batches; nothing is copied but containers.

    Tensors and arrays are cut along their first dimension, and so are lists of names or numbers as long as the batch.
    Tensors without dimensions, and all else, go into each micro-batch.

    Args:
        batch: A tensor, or a list, tuple, mapping, dataclass or other object, nested as it may be.
        sizes: Samples of each micro-batch: together those of the batch.

    Raises:
        ValueError: If there are no samples, if a tensor has another number, or if a container cannot be copied.

    Example:
        >>> split_batch({"number": [1, 2, 3], "name": ["a", "b", "c"], "scale": 2.0}, [2, 1])
        [{'number': [1, 2], 'name': ['a', 'b'], 'scale': 2.0}, {'number': [3], 'name': ['c'], 'scale': 2.0}]
    """
    if not sum(sizes):
        raise ValueError("Expected a batch to have tensors with samples, but found none.")
    return [_cut(batch, slice(end - size, end), sum(sizes)) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _cut(part: Any, rows: slice, samples: int) -> Any:
    if getattr(part, "ndim", 0):  # NumPy's arrays, too
        if len(part) != samples:
            shape = tuple(part.shape)
            raise ValueError(f"Expected each tensor to have the batch's {samples} samples first, but got {shape}.")
        return part[rows]
    is_list = isinstance(part, (list, tuple))
    if is_list and len(part) == samples and isinstance(part[0], (str, int, float)):
        return part[rows]
    inner = dict(enumerate(part)) if is_list else part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
    for step, value in [*inner.items()]:
        if (cut := _cut(value, rows, samples)) is not value:
            part = replace_part(part, step, cut)
    return part
