"""The lengths of a dataset's samples: told by itself, or measured once, by the loader's workers if it has some."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.weak import WeakIdKeyDictionary

from lightning_speedups.attach.workers import outline

MEASURED: Any = WeakIdKeyDictionary()
"""By the dataset: what changes when its settings do, and the lengths."""
BATCH = 256
"""Samples that a worker measures at a time."""


class Lengths(Dataset[float]):
    """The lengths of a dataset's samples, each measured when it is asked for.

    Args:
        dataset: A map-style dataset.
        measure: A function of a sample.

    Example:
        >>> Lengths(["one", "three"], len)[1]
        5.0
    """

    def __init__(self, dataset: Any, measure: Callable[[Any], float]) -> None:
        self.dataset, self.measure = dataset, measure

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> float:
        return float(self.measure(self.dataset[index]))


def measured_lengths(loader: DataLoader[Any], measure: Callable[[Any], float]) -> Tensor:
    """Return the lengths of all samples of a loader's dataset, float64, ``(N,)``, with a bar in the meantime.

    They are kept as long as the dataset lives, and measured anew if its settings change, as far as that is seen.

    Args:
        loader: Whose dataset and workers.
        measure: A function of a sample.

    Raises:
        Exception: What the dataset or the function raises.

    Example:
        >>> measured_lengths(DataLoader(["one", "three"]), len).tolist()
        [3.0, 5.0]
    """
    dataset, found = loader.dataset, None
    with suppress(Exception):  # it may hold what cannot be shared, or be a list, which cannot be told from others
        found = outline(dataset, measure) if hasattr(dataset, "__weakref__") else None
    known, lengths = MEASURED.get(dataset) if found else None, Lengths(dataset, measure)
    if known is not None and known[0] == found and len(known[1]) == len(lengths):
        return known[1]  # type: ignore[no-any-return]
    _ = lengths[0]  # an error of the first one comes from here, and not from a worker
    options = {"multiprocessing_context": loader.multiprocessing_context, "worker_init_fn": loader.worker_init_fn}
    batches: Any = DataLoader(
        lengths, BATCH, num_workers=loader.num_workers, generator=torch.Generator(), collate_fn=list, **options
    )
    each = (length for batch in Tqdm(batches, desc="lengths", leave=False) for length in batch)
    measured = torch.tensor([*each], dtype=torch.float64)
    if found:
        MEASURED[dataset] = found, measured
    return measured


def told_lengths(dataset: Any) -> Any:
    """Return the lengths that a dataset, or the one that it is a subset of, has as an attribute; None without.

    Args:
        dataset: A map-style dataset.

    Example:
        >>> class Texts(Dataset):
        ...     lengths = [3, 1, 2]
        >>> told_lengths(Subset(Texts(), [2, 0])).tolist()
        [2, 3]
    """
    if isinstance(dataset, Subset):
        told = told_lengths(dataset.dataset)
        return None if told is None else torch.as_tensor(told)[torch.as_tensor(dataset.indices, dtype=torch.long)]
    told = getattr(dataset, "lengths", None)
    return None if callable(told) else told
