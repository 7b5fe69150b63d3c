"""Augmentation of a whole batch at once: crops, flips, and a coin for each sample of a dataset.

Source: airbench (Jordan, arXiv:2404.00498).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.core.randomness import generator_for


def shifted_crops(images: Tensor, offsets: Tensor, pad: int, fill: float | None = None) -> Tensor:
    """Pad each image on all sides and cut it back to its size at a place of its own.

    Args:
        images: ``(N, ..., H, W)``, of any type; or volumes ``(N, ..., D, H, W)``.
        offsets: Where each cut begins in the padded image, int64 ``(2, N)``: rows and columns, in [0, 2 · pad], on the
            images' device. ``(3, N)`` for volumes: along their depth, rows and columns.
        pad: Pixels on each side, 1 or more, below H and W, and D of volumes.
        fill: The value outside; None: the image itself, reflected at its border without a repeat of the border.

    Returns:
        A new tensor of the same shape, type and memory format.

    Example:
        >>> image = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
        >>> shifted_crops(image, torch.tensor([[1], [2]]), pad=1, fill=0).tolist()
        [[[2, 3, 0], [5, 6, 0], [8, 9, 0]]]
        >>> shifted_crops(image, torch.tensor([[1], [2]]), pad=1).tolist()
        [[[2, 3, 2], [5, 6, 5], [8, 9, 8]]]
    """
    moved = range(images.ndim - len(offsets), images.ndim)
    windows = images if fill is None else F.pad(images, [pad] * 2 * len(offsets), value=fill)
    if fill is None:
        for dim in moved:
            windows = _reflect(windows, dim, pad)
    for dim in moved:
        windows = windows.unfold(dim, images.shape[dim], 1)
    # A view: (N, places, places, ..., H, W), with as many dimensions of places as the images are moved along.
    windows = windows.movedim(tuple(moved), tuple(range(1, len(offsets) + 1)))
    return windows[(torch.arange(len(images), device=images.device), *offsets)]


def _reflect(images: Tensor, dim: int, pad: int) -> Tensor:
    """Reflect at both ends of one dimension; unlike ``F.pad`` for all types on all devices."""
    before = images.narrow(dim, 1, pad).flip(dim)
    after = images.narrow(dim, images.shape[dim] - 1 - pad, pad).flip(dim)
    return torch.cat([before, images, after], dim)


def flip_some(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror some images left to right.

    Args:
        images: ``(N, ..., W)``.
        flipped: Which, bool ``(N,)``, on the images' device.

    Returns:
        A new tensor of the same shape and type.

    Example:
        >>> flip_some(torch.tensor([[[1, 2]], [[3, 4]]]), torch.tensor([False, True])).tolist()
        [[[1, 2]], [[4, 3]]]
    """
    return torch.where(flipped.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def coins(seed: int, samples: Tensor) -> Tensor:
    """Throw a coin for each sample of a dataset: always the same one for the same seed and sample.

    Args:
        seed: Any integer.
        samples: The samples' indices in the dataset, int64, 0 or more.

    Returns:
        int64, of the same shape, 0 or 1.

    Example:
        >>> samples = torch.arange(6)
        >>> coins(3, samples).tolist()
        [0, 1, 0, 0, 0, 1]
        >>> torch.equal(coins(3, samples.flip(0)).flip(0), coins(3, samples))
        True
    """
    first, second = torch.randint(2**32, (2,), generator=generator_for(seed)).tolist()
    return _scramble(_scramble((samples & 0xFFFFFFFF) ^ first) ^ (samples >> 32) ^ second) & 1


def _scramble(bits: Tensor) -> Tensor:
    """Spread each of 32 bits over all of them; the factor is small enough for the product to fit into int64."""
    for _ in range(2):
        bits = (((bits >> 16) ^ bits) * 0x45D9F3B) & 0xFFFFFFFF
    return (bits >> 16) ^ bits
