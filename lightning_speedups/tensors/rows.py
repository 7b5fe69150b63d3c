"""Whether the rows of a loader's batches are its sampler's samples, by a trial of a ``collate_fn`` on a few of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor
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
    batcher: Any = loader.batch_sampler
    if loader.collate_fn is default_collate or batcher is None or batcher.batch_size == 1:
        return True
    try:
        (kept,) = DataLoader(
            loader.dataset, batch_sampler=[evenly_spaced(TRIED, len(loader.dataset))],  # type: ignore[arg-type]
            collate_fn=partial(_try, loader.collate_fn), num_workers=min(1, loader.num_workers), timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
        )  # fmt: skip
    except Exception:  # it wants other samples than these, or its batches have no end: the first batch will say
        return True
    return bool(kept)


def _try(collate: Callable[[Any], Any], samples: Any) -> bool:
    """Collate samples in their order and the other way round, twice each; tell whether rows follow them."""
    ways = [copy.deepcopy(way) for way in (samples, samples[::-1]) * 2]  # some take samples apart
    batches = [collate(way) for way in ways]
    if batches[0] is ways[0]:  # it may be a whole batch already
        return True
    signs = {follows(tables, len(samples)) for tables in zip(*map(tables_in, batches), strict=True)}
    return True in signs or False not in signs  # what else there is may be random


def tables_in(part: Any) -> Iterator[Any]:
    """Yield all that may have a row for each sample in something, nested as it may be: tensors and lists.

    Args:
        part: Where to look.

    Example:
        >>> list(tables_in({"sizes": [(1, 2), (3, 4)], "name": "a"}))
        [[(1, 2), (3, 4)], (1, 2), (3, 4)]
    """
    is_list = isinstance(part, (list, tuple))
    if is_list or isinstance(part, Tensor):
        yield part
    several = part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
    for inner in part if is_list else [*several.values()]:
        yield from tables_in(inner)


def follows(tables: Sequence[Any], rows: int) -> bool | None:
    """Tell whether the rows of a table follow its batch's samples; None if it does not show that.

    They do not if it has the same few rows in other places, or some of them more than once.

    Args:
        tables: The one of some samples, that of the same in reverse, and both again.
        rows: How many samples.

    Example:
        >>> follows([[5, 3], [3, 5]] * 2, 2), follows([[5, 3]] * 4, 2), follows([[5, 5]] * 4, 2)
        (True, False, None)
    """
    if any(getattr(table, "ndim", 1) == 0 or len(table) != rows for table in tables):
        return None
    marks = [[fingerprint(row) for row in table] for table in tables]
    if all(back == there[::-1] for there, back in zip(marks[::2], marks[1::2], strict=True)):
        return marks[0] != marks[1] or None
    is_random = any(sorted(one) != sorted(other) for one, other in zip(marks[:2], marks[2:], strict=True))
    # A PackedSequence has the places of rows.
    are_places = isinstance(tables[0], Tensor) and sorted(tables[0].tolist()) == list(range(rows))
    return None if is_random or are_places or len({*chain(*marks)}) > rows else False
