"""The embedded images: collages of real handwritten digits, made in a second, without a download.

The digits are the 1,797 scans of the UCI "Optical Recognition of Handwritten Digits" test set that scikit-learn
ships (``sklearn.datasets.load_digits``). As they are, SGD reaches 99 % in five epochs; several of them, turned, scaled
and scattered over one noisy canvas, with the class of the largest as the label, keep a small network busy for longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.measure.errors import as_compare_error
from lightning_speedups.measure.images import ImageData

CANVAS = 24  # side of a collage in pixels
TEST_SHARE = 0.25  # of the source digits, of which only test images are made
SPLIT_SEED = 0  # the same split of the source digits for every data set


@dataclass(frozen=True)
class Layout:
    """Which digits lie where on the collages; K digits on each of N canvases.

    Attributes:
        index: int64, (N, K), rows of the source digits.
        side: float, (N, K), side of the digit's square as a fraction of the canvas.
        angle: float, (N, K), radians, clockwise.
        centre: float, (N, K, 2), (x, y) in -1..1, so that the unturned square stays on the canvas.
        ink: float, (N, K), brightness of the strokes, 0..1.
    """

    index: Tensor
    side: Tensor
    angle: Tensor
    centre: Tensor
    ink: Tensor

    @classmethod
    def draw(cls, count: int, sources: int, generator: torch.Generator) -> Layout:
        """Draw the layout of ``count`` canvases: one large digit (place 0) and two clearly smaller ones."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) * (high - low) + low

        index = torch.randint(sources, (count, 3), generator=generator)
        side = torch.cat([uniform(0.5, 0.64, count, 1), uniform(0.21, 0.36, count, 2)], 1)
        turn = math.radians(15)
        angle = uniform(-turn, turn, count, 3)
        centre = uniform(-1, 1, count, 3, 2) * (1 - side)[..., None]
        return cls(index, side, angle, centre, uniform(0.5, 1.0, count, 3))


def _render(digits: Tensor, layout: Layout, size: int, generator: torch.Generator, noise: float = 0.03) -> Tensor:
    """Paste the digits, (S, 8, 8) in 0..1, where the layout says; uint8, (N, 1, size, size)."""
    count, per_canvas = layout.index.shape
    canvas = torch.zeros(count, 1, size, size)
    for place in range(per_canvas):
        # grid_sample wants the way back from the canvas to the digit: undo the shift, the turn, the scale.
        cos = torch.cos(layout.angle[:, place]) / layout.side[:, place]
        sin = torch.sin(layout.angle[:, place]) / layout.side[:, place]
        x, y = layout.centre[:, place].unbind(1)
        rows = torch.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y], 1)
        grid = F.affine_grid(rows.view(-1, 2, 3), [count, 1, size, size], align_corners=False)
        pasted = F.grid_sample(digits[layout.index[:, place]][:, None], grid, align_corners=False)
        canvas = torch.maximum(canvas, pasted * layout.ink[:, place, None, None, None])
    canvas += noise * torch.randn(canvas.shape, generator=generator)
    return (canvas.clamp(0, 1) * 255).round().byte()


def digit_sources() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scikit-learn's digits in two disjoint parts: ((train digits, labels), (test digits, labels)).

    Returns:
        Digits as float32, (S, 8, 8) in 0..1, labels as int64, (S,).

    Raises:
        CompareError: If scikit-learn is not installed.
    """
    with as_compare_error("the embedded digits need the extra 'lightning-speedups[bench]': ", ImportError):
        from sklearn.datasets import load_digits
    pixels, classes = load_digits(return_X_y=True)
    digits, labels = torch.from_numpy(pixels).float().view(-1, 8, 8) / 16, torch.from_numpy(classes).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = round(len(labels) * TEST_SHARE)
    test, train = order[:cut], order[cut:]
    return (digits[train], labels[train]), (digits[test], labels[test])


def digit_collages(samples: int, test_samples: int, *, size: int = CANVAS, seed: int = 0) -> ImageData:
    """Make the embedded data set: collages of real handwritten digits; the class of the largest is the label.

    Args:
        samples: Training images, >= 1.
        test_samples: Test images, >= 1; made of other source digits than the training images.
        size: Side of the images in pixels.
        seed: Seed of the private generators; the same seed gives the same images to the bit.

    Returns:
        Grey images with 10 classes.

    Example:
        >>> data = digit_collages(100, 50)
        >>> tuple(data.x_train.shape), data.num_classes
        ((100, 1, 24, 24), 10)
    """
    parts = []
    for split, (count, (digits, labels)) in enumerate(zip((samples, test_samples), digit_sources(), strict=True)):
        generator = torch.Generator().manual_seed(2 * seed + split)
        layout = Layout.draw(count, len(labels), generator)
        largest = layout.side.argmax(1, keepdim=True)
        parts += [_render(digits, layout, size, generator), labels[layout.index.gather(1, largest)[:, 0]]]
    x_train, y_train, x_test, y_test = parts
    return ImageData("digit collages", x_train, y_train, x_test, y_test, num_classes=10)
