"""Mixing the samples of a batch: λ, partners, boxes and mixed tensors.

Sources: mixup (Zhang et al., arXiv:1710.09412), CutMix (Yun et al., arXiv:1905.04899).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_lambda(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    """Draw λ ~ Beta(alpha, alpha).

    Args:
        alpha: Concentration, above 0; small values keep most samples nearly pure, 1 is uniform.
        size: How many to draw.
        generator: Source of randomness, on the CPU.

    Returns:
        float32, ``(size,)``, in [0, 1], and such that λ and 1 − λ are both exact.

    Example:
        >>> lam = draw_lambda(0.2, 4, torch.Generator().manual_seed(0))
        >>> lam.shape, bool(((lam >= 0) & (lam <= 1)).all())
        (torch.Size([4]), True)
    """
    # torch.distributions.Beta draws from this same operator but takes no generator.
    pair = torch._sample_dirichlet(torch.full((size, 2), alpha, dtype=torch.float64), generator=generator)
    lam = pair[:, 0].float()
    return complementary(lam)


def complementary(lam: Tensor) -> Tensor:
    """Round λ so that λ and 1 − λ are both exact, and it makes no difference which of the two a loss starts from.

    Args:
        lam: Floating point, in [0, 1].

    Example:
        >>> lam = complementary(torch.tensor(0.3))
        >>> bool(1 - (1 - lam) == lam)
        True
    """
    return 1 - (1 - lam)


def cut_box(height: int, width: int, lam: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw the box that CutMix pastes: sides √(1−λ) of the image's, uniform centre, clipped at the border.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        lam: The share of the image to keep, in [0, 1].
        generator: Source of randomness, on the CPU.

    Returns:
        top, bottom, left, right in pixels, half-open.

    Example:
        >>> top, bottom, left, right = cut_box(8, 8, 1.0, torch.Generator().manual_seed(0))
        >>> bottom - top, right - left
        (0, 0)
    """
    side = math.sqrt(1.0 - lam)
    cut_h, cut_w = int(height * side), int(width * side)
    row = int(torch.randint(height, (), generator=generator))
    column = int(torch.randint(width, (), generator=generator))
    top, left = row - cut_h // 2, column - cut_w // 2
    return max(top, 0), min(top + cut_h, height), max(left, 0), min(left + cut_w, width)


def kept_share(box: tuple[int, int, int, int], height: int, width: int) -> float:
    """Return the share of the image that a pasted box leaves: 1 − box / (H·W).

    Args:
        box: top, bottom, left, right in pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Example:
        >>> kept_share((0, 2, 0, 4), 4, 4)
        0.5
    """
    top, bottom, left, right = box
    return 1.0 - (bottom - top) * (right - left) / (height * width)


def blend(values: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Mix each sample with its partner: ``λ·x[i] + (1 − λ)·x[partner[i]]``.

    Args:
        values: ``(N, ...)``; integers are rounded back to their type, half precision is mixed in float32.
        partner: int64, ``(N,)``, on the same device.
        lam: float32, ``(N,)`` or ``(1,)``, on the same device.

    Returns:
        A new tensor of the same shape and type.

    Example:
        >>> blend(torch.tensor([[0.0], [8.0]]), torch.tensor([1, 0]), torch.tensor([0.75]))
        tensor([[2.],
                [6.]])
    """
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    share = lam.to(wide.dtype).view(-1, *[1] * (values.ndim - 1))
    mixed = torch.lerp(wide[partner], wide, share)
    if not values.is_floating_point():
        mixed = mixed.round()
    return mixed.to(values.dtype)


def paste(images: Tensor, source: Tensor, partner: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """Paste into each image the same region of its partner.

    Args:
        images: ``(N, ..., H, W)``.
        source: Where the partners are taken from, of the same shape.
        partner: int64, ``(N,)``, on the same device.
        boxes: One box for the whole batch, or one for each image.

    Returns:
        A new tensor.

    Example:
        >>> x = torch.tensor([[[1, 1]], [[2, 2]]])
        >>> paste(x, x, torch.tensor([1, 0]), [(0, 1, 0, 1)]).tolist()
        [[[2, 1]], [[1, 2]]]
    """
    mixed = images.clone()
    for i, (top, bottom, left, right) in enumerate(boxes):
        rows = slice(i, i + 1) if len(boxes) > 1 else slice(None)
        mixed[rows, ..., top:bottom, left:right] = source[partner[rows], ..., top:bottom, left:right]
    return mixed
