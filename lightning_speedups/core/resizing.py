"""Images that grow over a run: how large when, and the resizing itself (Tan & Le, arXiv:2104.00298)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.core.arguments import check_number

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Growth:
    """The side of the images over the run, as a share of their full side.

    Attributes:
        start: Share at the start, in (0, 1].
        grow_from: Fraction of the run, in [0, 1], at which growth begins.
        full_from: Fraction of the run, in [``grow_from``, 1], from which on images are full.
        stages: None: they grow all the time. A number: that many sizes, evenly spaced from the start to full, as
            EfficientNetV2 has. Sizes: these, those up to 1 as shares and those above in pixels of the shorter side.
        multiple: Sides are multiples of this, in pixels, except the full one.
    """

    start: float = 0.5
    grow_from: float = 0.25
    full_from: float = 0.55
    stages: int | tuple[float, ...] | None = None
    multiple: int = 4

    def share(self, progress: float, shorter: int) -> float:
        """Return the share of the full side.

        Args:
            progress: Fraction of the run that is over, in [0, 1].
            shorter: Shorter side of full images, in pixels.

        Example:
            >>> [round(Growth().share(progress, 224), 3) for progress in (0.0, 0.25, 0.4, 0.55, 1.0)]
            [0.5, 0.5, 0.75, 1.0, 1.0]
            >>> [Growth(stages=3).share(progress, 224) for progress in (0.39, 0.4, 0.55)]
            [0.5, 0.75, 1.0]
            >>> [round(Growth(stages=(112, 168, 1.0)).share(progress, 224), 3) for progress in (0.39, 0.4, 0.55)]
            [0.5, 0.75, 1.0]
        """
        grown = float(progress >= self.full_from)
        if self.grow_from < progress < self.full_from:
            grown = (progress - self.grow_from) / (self.full_from - self.grow_from)
        if self.stages is None:
            return self.start + (1 - self.start) * grown
        sizes = self.stages
        if isinstance(sizes, int):
            sizes = tuple(self.start + (1 - self.start) * (level / (sizes - 1)) for level in range(sizes))
        # A stage may not begin a batch late for a rounding error.
        size = sizes[math.floor(grown * (len(sizes) - 1) + 1e-9)]
        return min(1.0, size if size <= 1 else size / shorter)

    def size(self, progress: float, full: Size) -> Size:
        """Return the size of the images.

        Args:
            progress: Fraction of the run that is over, in [0, 1].
            full: Size of full images.

        Example:
            >>> [Growth(stages=(0.5, 1.0)).size(progress, (224, 150)) for progress in (0.0, 1.0)]
            [(112, 76), (224, 150)]
        """
        share = self.share(progress, min(full))
        return side(full[0], share, self.multiple), side(full[1], share, self.multiple)

    def sizes(self, full: Size, begin: float = 0.0) -> list[Size]:
        """Return the different sizes from a point of the run on, the smallest first, less those that hardly last.

        Args:
            full: Size of full images.
            begin: Fraction of the run that is over, in [0, 1].

        Example:
            >>> Growth(stages=3).sizes((32, 32))
            [(16, 16), (24, 24), (32, 32)]
        """
        points = 4 * max(full)  # no side lasts less than one of them
        between = (self.grow_from + (self.full_from - self.grow_from) * i / points for i in range(points + 1))
        return sorted({self.size(progress, full) for progress in (begin, *between, 1.0) if progress >= begin})


def checked_stages(stages: Any) -> int | tuple[float, ...] | None:
    """Return what was given as ``stages``, if it is right.

    Args:
        stages: None, a number of sizes, or the sizes.

    Raises:
        ValueError: If it is none of these, or if sizes do not rise.

    Example:
        >>> checked_stages([128, 192, 256]), checked_stages([0.5, 0.75, 1])
        ((128, 192, 256), (0.5, 0.75, 1))
        >>> checked_stages([0.5, 128])
        Traceback (most recent call last):
        ValueError: Expected `stages` to be rising sizes, either shares in (0, 1] or pixels, but got [0.5, 128].
    """
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        check_number("stages", stages, 1, whole=True, optional=True)
        return (1.0,) if stages == 1 else stages if stages is None else int(stages)
    for size in stages:
        check_number("stages", size, 0, above=True)
    sizes = tuple(stages)
    compared = sizes[:-1] if sizes[-1:] == (1,) else sizes
    if not sizes or len({size <= 1 for size in compared}) > 1 or list(compared) != sorted(set(compared)):
        raise ValueError(
            f"Expected `stages` to be rising sizes, either shares in (0, 1] or pixels, but got {list(stages)!r}."
        )
    return sizes


def side(full: int, share: float, multiple: int) -> int:
    """Return a side in pixels: the multiple next to its share, at least one and never above the full side.

    Args:
        full: The full side, in pixels.
        share: Which part of it, in (0, 1]; 1 gives the full side as it is.
        multiple: Of what, in pixels.

    Example:
        >>> side(224, 0.5, 4), side(224, 0.99, 32), side(225, 1.0, 4), side(3, 0.5, 4)
        (112, 224, 225, 3)
    """
    if share >= 1 or full <= multiple:
        return full
    return min(max(multiple, multiple * math.floor(full * share / multiple + 0.5)), full // multiple * multiple)


def regularization(shorter: int, smallest: int, full: int, least: float) -> float:
    """Return the share of the full regularisation at a size: linear in the side.

    Args:
        shorter: Shorter side of the images, in pixels.
        smallest: What it is in the smallest images.
        full: What it is in full images.
        least: The share at the smallest size, in [0, 1].

    Example:
        >>> [regularization(side, 112, 224, 0.5) for side in (112, 168, 224)]
        [0.5, 0.75, 1.0]
    """
    if smallest >= full:
        return 1.0
    return least + (1 - least) * (shorter - smallest) / (full - smallest)


def filled_batch(samples: int, full: Size, size: Size) -> int:
    """Return how many samples of a size have no more pixels than a batch of full ones.

    Args:
        samples: Batch size at full size.
        full: Size of full images.
        size: Size of the smaller images.

    Example:
        >>> filled_batch(64, (224, 224), (112, 112)), filled_batch(64, (224, 224), (160, 160))
        (256, 125)
    """
    return samples * full[0] * full[1] // (size[0] * size[1])


def resize_images(images: Tensor, size: Size, antialias: bool = True) -> Tensor:
    """Resize images, bilinearly.

    Args:
        images: ``(..., H, W)`` with at least one dimension before, floating point or uint8. Half precision and uint8
            are computed in float32 and rounded back.
        size: The new size.
        antialias: Let each new pixel be an average over all of the old ones that it covers, when shrinking.

    Returns:
        The same tensor if it has the size; else a new one of the same type, and of the same memory format where that is
        ``(N, C, H, W)``'s.

    Example:
        >>> resize_images(torch.tensor([[[0, 0, 8, 8]]], dtype=torch.uint8).expand(1, 4, 4), (2, 2)).dtype
        torch.uint8
    """
    if images.shape[-2:] == size:
        return images
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    flat = wide if images.ndim == 4 else wide.reshape(-1, 1, *images.shape[-2:])
    resized = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=antialias)
    resized = resized.reshape(*images.shape[:-2], *size)
    if images.dtype == torch.uint8:
        resized = resized.round().clamp(0, 255)
    return resized.to(images.dtype)


def resize_maps(maps: Tensor, size: Size) -> Tensor:
    """Resize maps of labels: each new pixel is the old one at its middle ("nearest-exact").

    Args:
        maps: ``(..., H, W)``, of any type.
        size: The new size.

    Returns:
        The same tensor if it has the size; else a new one of the same type.

    Example:
        >>> resize_maps(torch.arange(6).expand(1, 2, 6), (1, 2))
        tensor([[[1, 4]]])
    """
    if maps.shape[-2:] == size:
        return maps
    for dimension, length in zip((-2, -1), size, strict=True):
        middles = (2 * torch.arange(length, device=maps.device) + 1) * maps.shape[dimension] // (2 * length)
        maps = maps.index_select(dimension, middles)
    return maps
