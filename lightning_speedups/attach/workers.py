"""A DataLoader with worker processes in the place of one without, which hands out the same samples in their order."""

from __future__ import annotations

import copy
import io
import itertools
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

LARGE = 1000
"""Bytes of an array, or items of a container, beyond which none is looked into."""
PATIENCE = 60
"""Seconds in which a worker on trial must load a batch; what hangs in a copy of this process does so for ever."""


def usable_cpus(processes: int = 1, quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use, 1 or more, by its affinity and its container's quota.

    Args:
        processes: How many processes share them.
        quota: Where Linux says how many microseconds the container has in how many.

    Example:
        >>> usable_cpus() >= usable_cpus(processes=4) >= 1
        True
    """
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file; "max"
        given, period = map(int, quota.read_text().split())
        cpus = min(cpus, given / period)
    return max(1, int(cpus / processes))


class Outline(pickle.Pickler):
    """Writes what an object is made of; of large data, tensors and functions only which ones they are."""

    def persistent_id(self, thing: Any) -> Any:
        """Return what stands for a part that is not looked into."""
        if isinstance(thing, Tensor):
            return id(thing), 0 if thing.is_inference() else thing._version
        if isinstance(thing, (FunctionType, ModuleType, type)):
            return id(thing) if multiprocessing.get_start_method() == "fork" else None  # else they are pickled too
        is_data = isinstance(thing, (list, tuple, dict, set, str, bytes))
        return id(thing) if (len(thing) if is_data else getattr(thing, "nbytes", 0)) > LARGE else None


def outline(*things: Any) -> bytes:
    """Return what changes when the settings of objects do, as far as it is seen at little cost.

    Args:
        *things: A dataset, or what else worker processes have copies of.

    Raises:
        Exception: Pickle's, if one holds what processes cannot share: an open file, a connection, a lock.

    Example:
        >>> class Crop:
        ...     size = 24
        >>> crop = Crop()
        >>> before = outline([crop])
        >>> crop.size = 28
        >>> outline([crop]) == before
        False
    """
    stream = io.BytesIO()
    Outline(stream).dump(things)
    return stream.getvalue()


def reason_against(loader: Any) -> str:
    """Return why a loader is not to be given workers; an empty string if it may be.

    Args:
        loader: Any.

    Example:
        >>> reason_against([1, 2]), reason_against(DataLoader(range(8)))
        ('a list is no DataLoader', '')
    """
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} is no DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "an IterableDataset gives other samples to another number of workers"
    if hasattr(loader, "state_dict"):
        return "checkpoints hold its place in an epoch"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{type(loader).__name__} iterates in a way of its own"
    try:
        outline(loader.dataset)
    except Exception as error:
        return f"processes cannot share its {type(loader.dataset).__name__} ({error})"
    return ""


class Exactly:
    """A sampler that is asked for as many as it has and no more: some draw once again when they are asked after that.

    Args:
        sampler: The sampler.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.rest = iter(self.sampler)
        return itertools.islice(self.rest, sized_len(self.sampler))


class Staffed(DataLoader[Any]):
    """Has workers, but draws the seed and the order of an epoch when a loader without any would.

    Those that it keeps go on in the next epoch, if they have handed out all and still have true copies of the dataset.
    Torch's own ``persistent_workers`` keeps outdated copies, ends an iteration under way when another one begins, and
    draws no seed in later epochs, so that these have another order.

    Attributes:
        keeps: Whether it keeps them.
    """

    draws_late = True
    keeps: bool
    _outline: bytes | None = None

    @property
    def _index_sampler(self) -> Any:
        return Exactly(super()._index_sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches(int(torch.empty((), dtype=torch.int64).random_(generator=self.generator)))

    def _batches(self, seed: int) -> Iterator[Any]:
        found, own, kept = None, self.generator, self._iterator
        with suppress(Exception):  # the DataModule's method may be its `collate_fn`
            found = outline(self.dataset, self.collate_fn)
        if kept is None or found is None or found != self._outline or kept._task_info:  # type: ignore[attr-defined]
            self._iterator = None
        settings = {"persistent_workers": self.keeps, "generator": torch.Generator().manual_seed(seed)}
        vars(self).update(_outline=found, **settings)  # past DataLoader's own __setattr__
        try:
            batches: Any = super().__iter__()
        finally:
            vars(self).update(persistent_workers=False, generator=own)
        try:
            yield from batches
            # Who asks for more lets it draw, as without workers.
            if next(batches._index_sampler.rest, None) is not None:
                raise RuntimeError("Expected the sampler to have as many batches as its `len`, but got more.")
        except (ConnectionError, EOFError) as error:
            # A worker that is gone cannot hand over what it has announced. That it is gone torch raises when the system
            # says so, wherever the process is by then: here, and not while others put things back. After a fit in which
            # it was to be told first, it is told no more: Lightning puts back the handlers of signals from before.
            time.sleep(1)
            if gone := [str(worker.pid) for worker in batches._workers if not worker.is_alive()]:
                raise RuntimeError(f"DataLoader worker (pid {', '.join(gone)}) exited unexpectedly.") from error
            raise


def copy_loader(loader: DataLoader[Any], way: type[DataLoader[Any]] | None = None, **attributes: Any) -> Any:
    """Return a copy of a DataLoader over the same data and sampler.

    Args:
        loader: The loader; it stays as it is.
        way: Another base of its class, which iterates in another way.
        **attributes: What is different.
    """
    twin: Any = copy.copy(loader)
    vars(twin).update(_iterator=None, **attributes)  # past DataLoader's own __setattr__
    if way is not None:
        twin.__class__ = type(type(loader).__name__, (way, type(loader)), {})
    return twin


def with_workers(loader: DataLoader[Any], count: int, pin: bool = False, keep: bool = False, **attributes: Any) -> Any:
    """Return a copy of a DataLoader, over the same data and sampler, that has workers.

    Args:
        loader: The loader; it stays as it is.
        count: How many workers, 1 or more, if it has none.
        pin: Whether they copy batches to pinned memory.
        keep: Whether those that it did not have go on from epoch to epoch.
        **attributes: What else is different.

    Example:
        >>> [*with_workers(DataLoader(range(4), batch_size=2), 1)]
        [tensor([0, 1]), tensor([2, 3])]
    """
    attributes["pin_memory"] = pin or loader.pin_memory
    if loader.num_workers:
        return copy_loader(loader, **attributes)
    settings = {"num_workers": count, "prefetch_factor": 2, "in_order": True, "keeps": keep}
    return copy_loader(loader, Staffed, **settings, **attributes)


def try_workers(loader: DataLoader[Any], count: int, indices: Iterable[Any], seconds: float = 0.0) -> tuple[float, Any]:
    """Return how many seconds a batch takes some workers, and a batch.

    Args:
        loader: Whose dataset and settings they get.
        count: How many workers.
        indices: What to load, in the place of its sampler's batches of indices.
        seconds: How long to look on, from when each of them has loaded a batch.

    Raises:
        Exception: What the workers raise.
    """
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    trial: dict[str, Any] = {name: indices, "generator": torch.Generator(), "timeout": loader.timeout or PATIENCE}
    batches = iter(with_workers(loader, count, **trial))
    for _ in range(count):
        batch = next(batches)
    begun, loaded = time.perf_counter(), 0
    while loaded % count or time.perf_counter() - begun < seconds:
        next(batches)
        loaded += 1
    return (time.perf_counter() - begun) / max(1, loaded), batch
