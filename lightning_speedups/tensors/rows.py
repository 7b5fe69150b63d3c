"""Whether the rows of a loader's batches are its sampler's samples, by a trial of a ``collate_fn`` on a few of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, default_collate

from lightning_speedups.tensors.feature_store import evenly_spaced, fingerprint

TRIED = 8
"""Samples that are tried."""


def keeps_rows(loader: DataLoader[Any]) -> bool:
    """Tell whether each sample gets the row that its place in the batch says; also where a trial does not show it.

    It runs where the loader's batches are made: in a worker, if there are any, and else among the caller's random
    states.

    Args:
        loader: A loader over a map-style dataset.
    """
    if loader.collate_fn is default_collate or loader.batch_sampler is None:
        return True
    try:
        samples, workers = evenly_spaced(TRIED, len(loader.dataset)), min(1, loader.num_workers)  # type: ignore[arg-type]
        (moved,) = DataLoader(
            loader.dataset, batch_sampler=[samples], collate_fn=_Trial(loader.collate_fn), num_workers=workers,
            timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )  # fmt: skip
    except Exception:  # it wants other samples than these; what is wrong with it, the first batch will say
        return True
    return not moved


class _Trial:
    """Collates samples in their order and the other way round, twice each; says whether rows then stand elsewhere."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> bool:
        if not isinstance(samples, list):  # a whole batch already
            return False
        ways = [copy.deepcopy(way) for way in (samples, samples[::-1]) * 2]  # some take samples apart
        batches = [self.collate(way) for way in ways]
        return batches[0] is not ways[0] and are_moved(*(list(tables_in(batch, len(samples))) for batch in batches))


def are_moved(*tables: Sequence[list[str]]) -> bool:
    """Tell whether the rows of a batch do not follow its samples.

    They do if one table says so, as others may hold random numbers. They do not if none does, and one has the same few
    rows in other places, or some of them more than once.

    Args:
        *tables: The tables of a batch of some samples, of the same in reverse, and of both again.

    Example:
        >>> are_moved([["a", "b"]], [["b", "a"]]), are_moved([["a", "b"]], [["a", "b"]])
        (False, True)
        >>> are_moved([["0", "0"], ["a", "b"]], [["0", "0"], ["b", "a"]]), are_moved([["a", "b"]], [["c", "d"]])
        (False, False)
    """
    moved = False
    for table in zip(*tables, strict=False) if len(set(map(len, tables))) == 1 else ():
        if all(back == there[::-1] for there, back in zip(table[::2], table[1::2], strict=True)):
            if table[0] != table[1]:
                return False
        else:
            moved |= len({row for rows in table for row in rows}) <= len(table[0])
    return moved


def tables_in(batch: Any, rows: int, seen: set[int] | None = None) -> Iterator[list[str]]:
    """Yield what has so many rows in a batch, nested as it may be: a fingerprint of each row; not what numbers them.

    Args:
        batch: Where to look.
        rows: How many, 1 or more.
        seen: Of what it is not to look into: the ids.

    Example:
        >>> import torch
        >>> x, y = tables_in({"x": torch.zeros(2, 3), "one": torch.zeros(1, 2), "more": [("a", "b")]}, 2)
        >>> x[0] == x[1], y[0] == y[1]
        (True, False)
    """
    seen = set() if seen is None else seen
    if id(batch) in seen:
        return
    seen.add(id(batch))
    is_array, is_list = len(getattr(batch, "shape", ())) > 0, isinstance(batch, (list, tuple))
    if (is_array or is_list) and len(batch) == rows and not _are_places(batch):
        yield [fingerprint(batch[row]) for row in range(rows)]
    if not is_array:
        several = batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", {})
        for inner in batch if is_list else [*several.values()]:
            yield from tables_in(inner, rows, seen)


def _are_places(rows: Any) -> bool:
    """Tell whether these are the numbers of rows, in whichever order, as a PackedSequence has them."""
    return getattr(rows, "shape", None) == (len(rows),) and sorted(rows.tolist()) == list(range(len(rows)))
