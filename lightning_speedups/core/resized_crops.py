"""Parts of random size and shape, cut out of a whole batch of images and resized (Szegedy et al., arXiv:1409.4842)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.core.resizing import Size

TRIES = 10
"""Boxes that are drawn for each image; of these the first that fits is taken, as torchvision does."""


def random_boxes(
    count: int, full: Size, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draw a box in each image: its area and the logarithm of its shape are even, and its place is.

    Args:
        count: Number of images.
        full: Their height and width, in pixels.
        scale: Smallest and largest area, as shares of the image's, in (0, 1].
        ratio: Smallest and largest width over height, above 0.
        generator: Source of randomness, on the CPU.

    Returns:
        int64 ``(4, count)``: top, left, height and width, in pixels. Where no box fits in ten tries, it is the image.

    Example:
        >>> whole = random_boxes(2, (6, 8), (1.0, 1.0), (4 / 3, 4 / 3), torch.Generator())
        >>> whole.tolist()
        [[0, 0], [0, 0], [6, 6], [8, 8]]
    """
    height, width = full
    drawn = torch.rand(2, TRIES, count, generator=generator, dtype=torch.float64)
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * drawn[0])
    narrow, wide = map(math.log, ratio)
    shapes = (narrow + (wide - narrow) * drawn[1]).exp()
    sides = torch.cat([areas / shapes, areas * shapes]).sqrt().round().long().view(2, TRIES, count)
    whole = torch.tensor([height, width]).view(2, 1, 1)
    fits = ((sides > 0) & (sides <= whole)).all(0)
    first = fits.to(torch.uint8).argmax(0).expand(2, 1, count)
    sides = torch.where(fits.any(0), sides.gather(1, first).squeeze(1), whole.squeeze(1))
    places = torch.rand(2, count, generator=generator, dtype=torch.float64)
    corners = (places * (whole.squeeze(1) - sides + 1)).long()
    return torch.cat([corners, sides])


def resized_crops(images: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Cut a box out of each image and resize it, bilinearly; where it shrinks, new pixels are means over old ones.

    Args:
        images: ``(N, C, H, W)``, floating point or uint8.
        boxes: Top, left, height and width of each, int64 ``(4, N)``, on the CPU.
        size: Height and width of all results, in pixels, 2 or more: torch 2.14 resizes a single column wrongly.

    Returns:
        A new tensor ``(N, C, *size)`` of the same type.

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> resized_crops(image, torch.tensor([[0], [2], [4], [2]]), (2, 2))
        tensor([[[[ 4.8571,  5.8571],
                  [11.1429, 12.1429]]]])
    """
    # Bytes are resized as they are on a CPU, where torch has fast code for them.
    stays = images.dtype in (torch.float32, torch.float64) or (images.dtype, images.device.type) == (torch.uint8, "cpu")
    numbers = images if stays else images.float()
    cuts = (
        numbers[number : number + 1, :, top : top + height, left : left + width]
        for number, (top, left, height, width) in enumerate(boxes.t().tolist())
    )
    crops = torch.cat([F.interpolate(one, size, mode="bilinear", antialias=True) for one in cuts])
    if not stays and images.dtype == torch.uint8:
        crops = crops.round_()  # means stay within 0 and 255
    return crops.to(images.dtype)
