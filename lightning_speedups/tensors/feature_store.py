"""Features of samples, each kept once, in memory or in a file that several processes share."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_speedups.core.batch import tensors_in

_ALIGNMENT = 64  # bytes; any type may begin at a multiple


class Kind(NamedTuple):
    """What one feature of a sample looks like.

    Attributes:
        shape: Without the dimension of the samples.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


def fingerprint(things: Any) -> str:
    """Return the SHA-256 of tensors, numbers, texts and whatever else pickles, nested as they may be.

    Args:
        things: What it is about. Objects count by the tensors in them; what has none, and cannot be pickled, by its
            type alone.

    Example:
        >>> weights = {"weight": torch.ones(2), "bias": torch.zeros(1)}
        >>> fingerprint(weights) == fingerprint(dict(weights)), fingerprint(weights) == fingerprint([torch.ones(2)])
        (True, False)
    """
    leaves, spec = tree_flatten(things)
    digest = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        tensors = list(tensors_in(leaf))
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        if not tensors:
            try:
                digest.update(pickle.dumps(leaf))
            except Exception:
                digest.update(str(type(leaf)).encode())
    return digest.hexdigest()


def bytes_needed(kinds: Mapping[str, Kind], samples: int) -> int:
    """Return the size of a store.

    Args:
        kinds: Its features, by key.
        samples: Number of samples.

    Example:
        >>> bytes_needed({"head": Kind((512,), torch.float32)}, 1000)
        2049024
    """
    return _plan(kinds, samples)[1]


def _plan(kinds: Mapping[str, Kind], samples: int) -> tuple[dict[str, int], int]:
    """Return where each feature begins, in bytes, behind one byte for each sample, and the end."""
    end, begins = samples, {}
    for key, (shape, dtype) in kinds.items():
        begins[key] = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        end = begins[key] + samples * math.prod(shape) * dtype.itemsize
    return begins, end


class FeatureStore:
    """Room for the features of all samples of a dataset, and which of them are there.

    Args:
        kinds: The features of a sample, by key.
        samples: Number of samples in the dataset.
        folder: Where to keep them in a file, which is opened if it is there already; None: in memory. Several processes
            may use it at a time.

    Attributes:
        was_there: Whether the file was there already.

    Raises:
        OSError: If the disk has no room for it.
        RuntimeError: If it cannot be opened, or the memory has no room for it.

    Example:
        >>> store = FeatureStore({"head": Kind((2,), torch.float32)}, samples=4)
        >>> store.write(torch.tensor([3, 1]), {"head": torch.tensor([[3.0, 3.5], [1.0, 1.5]])})
        >>> store.has(torch.tensor([1, 3])), store.has(torch.tensor([0, 1]))
        (True, False)
        >>> store.read("head", torch.tensor([1, 3]))
        tensor([[1.0000, 1.5000],
                [3.0000, 3.5000]])
    """

    def __init__(self, kinds: Mapping[str, Kind], samples: int, folder: Path | None = None) -> None:
        self.kinds, self.samples, self.folder = dict(kinds), samples, folder
        self.was_there = False
        begins, size = _plan(self.kinds, samples)
        if folder is None:
            memory = torch.zeros(size, dtype=torch.uint8)
        else:
            file = _file(folder, self.kinds, samples)
            self.was_there = file.exists() and file.stat().st_size == size
            if file.exists() and not self.was_there:  # somebody has cut it off
                file.unlink()
            if not self.was_there:
                _create(file, self.kinds, samples, size)
            memory = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        self._is_there = memory[:samples]
        self._values = {
            key: memory[begin : begin + samples * math.prod(shape) * dtype.itemsize].view(dtype).view(samples, *shape)
            for (key, (shape, dtype)), begin in zip(self.kinds.items(), begins.values(), strict=True)
        }

    def anew(self) -> FeatureStore:
        """Return an empty store in place of this one."""
        if self.folder is not None:
            _file(self.folder, self.kinds, self.samples).unlink(missing_ok=True)
        return FeatureStore(self.kinds, self.samples, self.folder)

    def has(self, samples: Tensor) -> bool:
        """Tell whether the features of all these samples are there.

        Args:
            samples: Their indices, int64, on the CPU.
        """
        return bool(self._is_there[samples].all())

    def read(self, key: str, samples: Tensor) -> Tensor:
        """Return a feature of some samples, ``(len(samples), *shape)``, as a new tensor on the CPU.

        Args:
            key: Which feature.
            samples: Their indices, int64, on the CPU.
        """
        return self._values[key].index_select(0, samples)

    def write(self, samples: Tensor, features: Mapping[str, Tensor]) -> None:
        """Keep all features of some samples.

        Args:
            samples: Their indices, int64, on the CPU.
            features: For each key a tensor ``(len(samples), *shape)``, on any device.
        """
        assert features.keys() == self.kinds.keys()
        for key, values in features.items():
            self._values[key][samples] = values.cpu()
        self._is_there[samples] = 1  # last: another process may read it any time


def _file(folder: Path, kinds: Mapping[str, Kind], samples: int) -> Path:
    return folder / f"{fingerprint([sorted(_plain(kinds).items()), samples])[:16]}.bin"


def _plain(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    return {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in kinds.items()}


def _create(file: Path, kinds: Mapping[str, Kind], samples: int, size: int) -> None:
    """Make an empty file of the full size, whole at once, and say beside it what is in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = file.with_suffix(f".{uuid.uuid4().hex}")  # process ids of several machines may be equal
    try:
        with mine.open("xb") as opened:
            _reserve(opened.fileno(), size, file.parent)
        try:
            os.link(mine, file)
        except FileExistsError:  # another process was quicker
            return
        except OSError:  # no such links on this disk
            os.replace(mine, file)
        file.with_suffix(".json").write_text(json.dumps({"samples": samples, "features": _plain(kinds)}, indent=1))
    finally:
        mine.unlink(missing_ok=True)


def _reserve(file: int, size: int, folder: Path) -> None:
    """Let a file have its full size on the disk: one that is full later would end the process."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"the disk of {folder} has {free:,} bytes left")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def spread(count: int, length: int) -> list[int]:
    """Return some indices of a dataset, evenly spaced from its first to its last sample.

    Args:
        count: How many at most, 1 or more.
        length: Of the dataset, 1 or more.

    Example:
        >>> spread(3, 9), spread(3, 2)
        ([0, 4, 8], [0, 1])
    """
    count = min(count, length)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]
