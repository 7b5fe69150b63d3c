"""Some samples of the data, loaded to see whether it is random, and whether it is what it was."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_speedups.attach.batches import transferred
from lightning_speedups.attach.loaders import take_batch
from lightning_speedups.attach.randomness import load_twice
from lightning_speedups.tensors.feature_store import evenly_spaced, fingerprint
from lightning_speedups.tricks.transfer.feature_cache.cuts import Refuse

PROBES = 16
"""Samples that are looked at."""


def probe(trainer: Any, loader: DataLoader[Any], refuse: Refuse) -> str:
    """Return a fingerprint of the data by some samples as they come to the model; refuse random ones.

    Args:
        trainer: A fitting Trainer with a trick in its pipeline.
        loader: Its training loader.
        refuse: Makes an exception of what was found and the way out.
    """
    dataset: Any = loader.dataset
    indices = evenly_spaced(PROBES, len(dataset))
    one, found = load_twice(trainer, lambda: transferred(trainer, take_batch(loader, indices)))
    if found:
        transform = getattr(dataset, "transform", None) or "its transforms"
        raise refuse(
            f"samples of the {type(dataset).__name__} {found}",
            f"Leave out random augmentation, in the dataset ({transform}), in `collate_fn` and in the transfer hooks",
        )
    return fingerprint([one, len(dataset)])
