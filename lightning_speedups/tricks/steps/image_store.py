"""Photos decoded and resized once, and then read as they are, as FFCV does (Leclerc et al., arXiv:2306.12517)."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.counts import counted
from lightning_speedups.core.resizing import Size
from lightning_speedups.tensors.feature_store import evenly_spaced, reserve

BATCH = 64
"""Photos that a worker makes at a time."""
PROBES = 16
"""Photos that are made at each start, to see whether source and file are what they were."""


class ImageStore(TensorDataset):
    """Photos of one size, uint8, in a file that is mapped into memory; made of a folder or dataset when it is needed.

    The first run decodes and resizes each image once, with a progress bar, and writes them into the file, in the
    safetensors format. Every other run opens it, and reads from it at the speed of memory, or of the disk where memory
    does not hold it; processes share what they have read. It is a ``TensorDataset`` of images ``(N, 3, H, W)`` and
    labels: ``InMemoryLoader(store, 64, shuffle=True)`` takes whole batches out of it, and a ``DataLoader``, with
    workers where the file does not fit in memory, takes it as well. ``RandomResizedCrops`` and ``BatchAugmentation``
    crop and mirror batches on the device; the model makes numbers of bytes, and normalises.

    Several processes may ask for it at a time, as those of DDP do: one of them makes it, and the others wait. The file
    appears when it is whole. What a process that was killed has left is removed by the next one that writes. It is made
    anew when the files (their names, sizes and times), sixteen of the samples or ``size`` are others than they were,
    and when its length, its head or one of these sixteen is damaged. An empty file with ``.lock`` behind its name stays
    beside it. Linux maps no file larger than memory and swap together, unless ``vm.overcommit_memory`` is 1.

    When not to use it: images that a run needs at their full size; a loader that keeps up; fewer than two epochs; disks
    that are slower than decoding, such as those of a busy network.

    Args:
        source: A folder with a subfolder for each class, or a map-style dataset that gives pairs of a PIL image and a
            whole number, its label, without random transforms. Of any but a folder and torchvision's ``ImageFolder``
            (not a ``Subset`` of one: split the store) the files are not known: delete ``file`` when samples change.
        file: Where to keep them: a path, best with the ending ``.safetensors``; one for each source and size.
        size: Side of the images in pixels, or height and width, 1 or more. An image fills it: it is resized, and what
            stands out on two sides is cut off. For random crops choose it somewhat larger than these.
        max_gib: Largest size of the file, in GiB, 0 or more.
        workers: Processes that decode, 0 or more, as for a ``DataLoader``; 0: this one.

    Attributes:
        tensors: The images and the labels.
        classes: Names of the classes, where the source knows them; else None.

    Raises:
        ValueError: If an argument is out of range, the source gives something else or is random, or the file would be
            larger than ``max_gib``.
        OSError: If the disk has no room; nothing is left behind.

    Source:
        Leclerc et al., arXiv:2306.12517.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> photos = [(Image.new("RGB", (30, 20), (value, 0, 0)), value) for value in range(5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = ImageStore(photos, f"{folder}/photos.safetensors", size=16)
        >>> image, label = store[3]
        >>> image.shape, int(image[0, 0, 0]), int(label)
        (torch.Size([3, 16, 16]), 3, 3)
    """

    def __init__(
        self, source: Any, file: str | Path, size: int | Size, max_gib: float = 16.0, workers: int = 0
    ) -> None:
        sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        height, width = (check_number("size", side, 1, whole=True) for side in sides)
        max_gib, workers = check_number("max_gib", max_gib, 0), check_number("workers", workers, 0, whole=True)
        photos, path = Photos(source, (height, width)), Path(file).absolute()
        kept = PhotoFile(path, photos)
        if kept.bytes > max_gib * 2**30:
            need = f"{counted(len(photos), 'image')} of {height} × {width} pixels need {kept.bytes / 2**30:.3g}"
            raise ValueError(f"Expected a file of `max_gib`={max_gib:g} GiB or less, but {need}. Lower `size`.")
        if not kept.is_whole():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not kept.is_whole():  # another process may have made it meanwhile
                    own = torch.Generator()  # so that making and finding a file leave the same random state
                    batches = DataLoader(photos, BATCH, num_workers=workers, generator=own)
                    kept.write(Tqdm(batches, desc="ImageStore", leave=False))
        _, labels, images = kept.parts(path)
        super().__init__(images, labels)
        self.classes = getattr(photos.source, "classes", None)
        self._given = source, path, (height, width), max_gib, workers

    def __reduce__(self) -> Any:
        """Open the file where it is unpickled, as in a worker that is spawned."""
        return type(self), self._given


class Photos(Dataset[tuple[Tensor, int]]):
    """The samples of a source as they are kept.

    Args:
        source: A folder, as torchvision's ``ImageFolder`` takes it, or a map-style dataset of images with labels.
        size: Height and width of the images.

    Raises:
        ValueError: If there are no samples.
    """

    def __init__(self, source: Any, size: Size) -> None:
        from torchvision.datasets import ImageFolder

        self.source, self.size = ImageFolder(source) if isinstance(source, (str, Path)) else source, size
        if len(self.source) == 0:
            raise ValueError("Expected `source` to hold images, but got none.")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        sample = self.source[index]
        pair: Any = sample if isinstance(sample, (tuple, list)) and len(sample) == 2 else (sample, None)
        image, label = pair
        if not isinstance(image, Image.Image) or not hasattr(label, "__index__"):
            raise ValueError(
                "Expected `source` to give pairs of a PIL image, without ToTensor and Normalize, and a whole number, "
                f"its label, but got {type(image).__name__} and {type(label).__name__}."
            )
        filled = ImageOps.fit(image.convert("RGB"), self.size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(filled)).permute(2, 0, 1).contiguous(), operator.index(label)


class PhotoFile:
    """The file of photos, which safetensors reads too; it is there as a whole or not at all.

    Args:
        path: Where it is, or will be.
        photos: What it holds.

    Attributes:
        head: Its beginning, which says what it holds, and of which source.
        bytes: Its size.
    """

    def __init__(self, path: Path, photos: Photos) -> None:
        self.path, self.shape = path, (len(photos), *photos.size, 3)  # channels last, which torch resizes twice as fast
        self.some = {one: photos[one] for one in evenly_spaced(PROBES, len(photos))}
        self.head = header(self.shape, hashlib.sha256(repr(files_of(photos.source)).encode()).hexdigest())
        self.bytes = len(self.head) + 8 * len(photos) + math.prod(self.shape)

    def parts(self, path: Path, writes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return head, labels and images, mapped into memory: what is read comes from the disk when it is needed.

        Args:
            path: Of this file, or of a draft.
            writes: Whether what is written into them goes into the file.
        """
        memory = torch.from_file(str(path), shared=writes, size=self.bytes, dtype=torch.uint8)
        labels = len(self.head) + 8 * self.shape[0]
        numbers = memory[len(self.head) : labels].view(torch.int64)
        return memory[: len(self.head)], numbers, memory[labels:].view(self.shape).permute(0, 3, 1, 2)

    def is_whole(self) -> bool:
        """Tell whether the file is there, of this source and form, with the same photos wherever it is looked at."""
        if not self.path.exists() or self.path.stat().st_size != self.bytes:
            return False
        head, labels, images = self.parts(self.path)
        return head.numpy().tobytes() == self.head and self.has_some(labels, images)

    def has_some(self, labels: Tensor, images: Tensor) -> bool:
        """Tell whether some photos are what the source gave at the start."""
        return all(torch.equal(images[at], image) and labels[at] == label for at, (image, label) in self.some.items())

    def write(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write all photos beside the file, and then let them take its place at once. One process may do so at a time.

        Args:
            batches: Images and labels, in their order.

        Raises:
            OSError: If the disk has no room; nothing is left behind.
            ValueError: If some photos are not what the source gave at the start.
        """
        draft = self.path.with_name(f"{self.path.name}.part")
        draft.unlink(missing_ok=True)  # of a process that was killed
        try:
            reserve(draft, self.bytes)
            (head, labels, images), end = self.parts(draft, writes=True), 0
            head.copy_(torch.frombuffer(bytearray(self.head), dtype=torch.uint8))
            for some, theirs in batches:
                begin, end = end, end + len(some)
                images[begin:end], labels[begin:end] = some, theirs
            if not self.has_some(labels, images):
                raise ValueError("Expected `source` to give the same each time, but its samples are random.")
            with draft.open("rb+") as opened:
                os.fsync(opened.fileno())  # a name must not be there before its content, if the power fails
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)


def header(shape: tuple[int, ...], source: str) -> bytes:
    """Return the beginning of a safetensors file of labels and images, which ends at a multiple of 64 bytes.

    Args:
        shape: Of the images: their number, height, width and 3.
        source: What the file says of where they come from.

    Example:
        >>> text = header((2, 4, 5, 3), "here")
        >>> len(text) % 64, json.loads(text[8:])["labels"]
        (0, {'dtype': 'I64', 'shape': [2], 'data_offsets': [0, 16]})
    """
    middle, end = 8 * shape[0], 8 * shape[0] + math.prod(shape)
    parts = {
        "__metadata__": {"source": source},
        "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, middle]},
        "images": {"dtype": "U8", "shape": shape, "data_offsets": [middle, end]},
    }
    text = json.dumps(parts).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def files_of(source: Any) -> list[Any]:
    """Return path, label, size and time of change of each file of a dataset of files, in its order.

    Args:
        source: torchvision's ``DatasetFolder``; of others nothing is known.

    Example:
        >>> files_of([1, 2])
        []
    """
    samples = source.samples if any(kind.__name__ == "DatasetFolder" for kind in type(source).__mro__) else []
    facts = ((path, label, os.stat(path)) for path, label in samples)
    return [(os.path.relpath(path, source.root), label, stat.st_size, stat.st_mtime_ns) for path, label, stat in facts]
