"""Features of samples, each kept once, in memory or in a file that several processes share."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import shutil
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
        2049000
    """
    return max((part.stop for part in _plan(kinds, samples).values()), default=0) + samples


def _plan(kinds: Mapping[str, Kind], samples: int) -> dict[str, slice]:
    """Return where each feature stands, in bytes; behind them there is one byte for each sample."""
    end, parts = 0, {}
    for key, (shape, dtype) in kinds.items():
        begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        end = begin + samples * math.prod(shape) * dtype.itemsize
        parts[key] = slice(begin, end)
    return parts


class FeatureStore:
    """Room for the features of all samples of a dataset, and which of them are there.

    Args:
        kinds: The features of a sample, by key.
        samples: Number of samples in the dataset.
        folder: Where to keep them in a file, which is opened if it is there already; None: in memory. Several processes
            may use it at a time.

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
        self.kinds = dict(kinds)
        size = bytes_needed(kinds, samples)
        memory = torch.zeros(size, dtype=torch.uint8) if folder is None else _open(folder, self.kinds, samples, size)
        self._is_there = memory[size - samples :]
        self._values = {
            key: memory[part].view(self.kinds[key].dtype).view(samples, *self.kinds[key].shape)
            for key, part in _plan(kinds, samples).items()
        }

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


def _open(folder: Path, kinds: Mapping[str, Kind], samples: int, size: int) -> Tensor:
    """Return the bytes of a file, which is made if need be."""
    file = folder / f"{fingerprint([list(kinds.items()), samples])[:16]}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.stat().st_size < size:  # of one that was cut off, the end says what is there: nothing
        reserve(file, size)
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)


def reserve(file: Path, size: int) -> None:
    """Let a file have its full size on the disk: one that is full later would end the process.

    Args:
        file: Which; it is made if it is not there, and is gone again if there is no room.
        size: In bytes.

    Raises:
        OSError: If the disk has no room for it.
    """
    free = shutil.disk_usage(file.parent).free
    if free < size:
        raise OSError(f"the disk of {file.parent} has {free:,} bytes left")
    with file.open("ab") as opened:
        try:
            if hasattr(os, "posix_fallocate"):  # elsewhere it is as long as that when torch has opened it
                os.posix_fallocate(opened.fileno(), 0, size)
        except OSError:
            file.unlink()
            raise


def evenly_spaced(count: int, length: int) -> list[int]:
    """Return some indices of a dataset, evenly spaced from its first to its last sample.

    Args:
        count: How many at most, 1 or more.
        length: Of the dataset, 1 or more.

    Example:
        >>> evenly_spaced(3, 9), evenly_spaced(3, 2)
        ([0, 4, 8], [0, 1])
    """
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().long().tolist()
