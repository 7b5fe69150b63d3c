"""Sequences that grow over a run: how long when, and the cutting itself (Li et al., arXiv:2108.06084)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_speedups.core.resizing import Growth


@dataclass(frozen=True)
class LengthGrowth:
    """The length of the sequences over the run.

    Attributes:
        start: Length at the start, in positions.
        full_from: Fraction of the run, in (0, 1], from which on sequences are full.
        multiple: Lengths are multiples of this, except the full one.
        reshape: Whether full sequences are parted into shorter ones, all of one length.
    """

    start: int = 8
    full_from: float = 0.3
    multiple: int = 8
    reshape: bool = False

    def length(self, progress: float, full: int) -> int:
        """Return the length of the sequences.

        Args:
            progress: Fraction of the run that is over, in [0, 1].
            full: Length of full sequences, in positions.

        Returns:
            The multiple next to a line from the start to the full length. With ``reshape`` at most that: one into which
            full sequences can be parted, less fewer positions at the end than ``multiple``.

        Example:
            >>> [LengthGrowth(16).length(progress, 128) for progress in (0.0, 0.05, 0.15, 0.29, 0.3, 1.0)]
            [16, 32, 72, 128, 128, 128]
            >>> [LengthGrowth(16, reshape=True).length(progress, 128) for progress in (0.0, 0.05, 0.15, 0.3)]
            [16, 32, 64, 128]
        """
        if self.start >= full:
            return full
        growth = Growth(self.start / full, grow_from=0.0, full_from=self.full_from, multiple=self.multiple)
        length, _ = growth.size(progress, (full, full))
        if self.reshape and length < full:
            units = full // self.multiple
            length = max(part for part in range(1, length // self.multiple + 1) if units % part == 0) * self.multiple
        return length

    def lengths(self, full: int) -> list[int]:
        """Return the different lengths of a run, the shortest first: for each, ``torch.compile`` may compile once.

        Args:
            full: Length of full sequences, in positions.

        Example:
            >>> LengthGrowth(32, multiple=64).lengths(256), LengthGrowth(reshape=True).lengths(1000)
            ([64, 128, 192, 256], [8, 40, 200, 1000])
        """
        points = 4 * full  # no length lasts less than one of them
        return sorted({self.length(self.full_from * i / points, full) for i in range(points + 1)})


def first_positions(part: Tensor, length: int, dim: int = 1) -> Tensor:
    """Return the first positions of sequences.

    Args:
        part: ``(N, ..., T, ...)``.
        length: How many, at most T.
        dim: Which dimension T is, 1 or more.

    Returns:
        ``(N, ..., length, ...)``, contiguous; the same tensor where that is all of it.

    Example:
        >>> import torch
        >>> first_positions(torch.tensor([[1, 2, 3], [4, 5, 6]]), 2).tolist()
        [[1, 2], [4, 5]]
    """
    return part if part.shape[dim] == length else part.narrow(dim, 0, length).contiguous()


def shorter_rows(part: Tensor, length: int, dim: int = 1) -> Tensor:
    """Part sequences into shorter ones, which follow each other.

    Args:
        part: ``(N, ..., T, ...)``.
        length: Length of the shorter ones, at most T; what is left over at the end of each sequence is left out.
        dim: Which dimension T is, 1 or more.

    Returns:
        ``(N * (T // length), ..., length, ...)``, contiguous; the same tensor where sequences have that length.

    Example:
        >>> import torch
        >>> shorter_rows(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]), 2).tolist()
        [[1, 2], [3, 4], [6, 7], [8, 9]]
    """
    if part.shape[dim] == length:
        return part
    rows, shape = part.shape[dim] // length, part.shape
    parted = part.narrow(dim, 0, rows * length).reshape(*shape[:dim], rows, length, *shape[dim + 1 :])
    return parted.movedim(dim, 1).flatten(0, 1).contiguous()
