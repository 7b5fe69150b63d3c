"""The embedded text: Python's own standard library, which every installation has, as bytes; nothing is downloaded."""

from __future__ import annotations

import platform
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import subset
from lightning_speedups.recipes.text_fast import windows

MODULES = 160
"""How many modules are read, the first by name: 4.5 MB."""
HELD_OUT = 10
"""Every so many modules one is held out for validation: other files by other authors, not the rest of the same ones."""
CONTEXT = 128
"""Bytes that a prediction may rest on."""
BYTES = 256


@dataclass(frozen=True)
class TextData:
    """Windows of a text: its bytes, and each one's next.

    Attributes:
        name: Where they come from, for the report.
        x_train: int64, (N, T), the bytes of each window.
        y_train: int64, (N, T), the byte after each of them.
        x_test: int64, (M, T), of other files.
        y_test: int64, (M, T).
        num_classes: Kinds of bytes.
        size: Bytes of the text that was read.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int = BYTES
    size: int = 0

    @property
    def chance(self) -> float:
        """The loss of always saying how often each byte comes: the entropy of the test bytes, in nats."""
        shares = torch.bincount(self.y_test.flatten()).double() / self.y_test.numel()
        return float(torch.special.entr(shares).sum())

    def limited(self, samples: int | None, test_samples: int | None) -> TextData:
        """The same text with at most so many training and test windows, drawn without replacement.

        Args:
            samples: Training windows to keep; ``None`` keeps all.
            test_samples: Test windows to keep; ``None`` keeps all.

        Returns:
            A new object; this one is left as it is.
        """
        train, test = subset(len(self.y_train), samples), subset(len(self.y_test), test_samples)
        kept = self.x_train[train], self.y_train[train], self.x_test[test], self.y_test[test]
        return TextData(self.name, *kept, self.num_classes, self.size)


def library_modules(count: int = MODULES) -> dict[str, bytes]:
    """Return the sources of the first modules of Python's standard library that are single files, by name.

    The same for every installation of a version of Python, whatever else lies in its folder.

    Args:
        count: How many to return at most.

    Raises:
        CompareError: If this Python has no sources, as one in an archive.

    Example:
        >>> list(library_modules(2))
        ['__future__', '_aix_support']
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for name in sorted(sys.stdlib_module_names) if (file := folder / f"{name}.py").is_file()]
    if len(files) < 2:
        raise CompareError(f"this Python has no sources of its standard library in {folder}, which the text is made of")
    return {file.stem: file.read_bytes() for file in files[:count]}


def coded(sources: Iterable[bytes]) -> Tensor:
    """Texts one after the other, a number a byte, int64.

    Args:
        sources: The texts.

    Example:
        >>> coded([b"ab", b"c"])
        tensor([97, 98, 99])
    """
    return torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).long()


def library_name(size: int) -> str:
    """Where the text comes from, for the report.

    Args:
        size: Its bytes.
    """
    return f"the standard library of Python {platform.python_version()}, {size / 1e6:.1f} MB"


def library_text(samples: int | None = None, test_samples: int | None = None, *, context: int = CONTEXT) -> TextData:
    """Make the embedded data set: windows of Python's standard library; every tenth module is held out.

    Args:
        samples: Training windows to keep at most, a seeded choice; ``None`` keeps all.
        test_samples: Test windows to keep at most; ``None`` keeps all.
        context: Length of a window in bytes.

    Returns:
        The windows; the name tells Python's version and how many bytes were read.

    Example:
        >>> data = library_text(100, 50)
        >>> tuple(data.x_train.shape), data.name
        ((100, 128), 'the standard library of Python 3..., ... MB')
    """
    sources = list(library_modules().values())
    held_out = sources[HELD_OUT - 1 :: HELD_OUT]
    rest = [source for i, source in enumerate(sources) if i % HELD_OUT != HELD_OUT - 1]
    size = sum(map(len, sources))
    data = TextData(library_name(size), *windows(coded(rest), context), *windows(coded(held_out), context), size=size)
    return data.limited(samples, test_samples)
