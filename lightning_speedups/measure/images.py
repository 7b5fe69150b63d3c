"""Labelled images in memory, and the task of quarter turns that any images pose for free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SUBSET_SEED = 0  # a limit keeps the same samples for every arm and every seed of a comparison


@dataclass(frozen=True)
class ImageData:
    """Labelled images in memory.

    Attributes:
        name: Where they come from, for the report.
        x_train: uint8, (N, C, H, W).
        y_train: int64, (N,), class indices.
        x_test: uint8, (M, C, H, W).
        y_test: int64, (M,).
        num_classes: Number of classes, >= 2.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int

    @property
    def chance(self) -> float:
        """Accuracy of always answering the commonest class of the test images, a fraction."""
        return float(torch.bincount(self.y_test).max()) / len(self.y_test)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images, float32, (1, C, 1, 1)."""
        # A thousand images pin both down well below what a network can notice.
        sample = self.x_train[:1000].float()
        mean, std = sample.mean((0, 2, 3), keepdim=True), sample.std((0, 2, 3), keepdim=True)
        return mean, std.clamp_min(1.0)

    def limited(self, samples: int | None, test_samples: int | None) -> ImageData:
        """The same data with at most so many training and test images, drawn without replacement.

        Args:
            samples: Training images to keep; ``None`` keeps all.
            test_samples: Test images to keep; ``None`` keeps all.

        Returns:
            A new object; this one is left as it is.
        """
        train = subset(len(self.y_train), samples)
        test = subset(len(self.y_test), test_samples)
        kept = self.x_train[train], self.y_train[train], self.x_test[test], self.y_test[test]
        return ImageData(self.name, *kept, self.num_classes)


def subset(count: int, keep: int | None) -> Tensor:
    """Rows to keep, shuffled by a fixed seed: data may be sorted by class, and their first ones stand for all.

    Args:
        count: How many there are.
        keep: How many to keep at most, without replacement; ``None`` keeps all.

    Returns:
        int64 indices.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))[:keep]


def quarter_turns(data: ImageData, seed: int) -> ImageData:
    """The same images, each turned by 0-3 quarter turns, with the number of turns as the label.

    A task that any images pose for free (Gidaris et al. 2018, arXiv:1803.07728): it stands in for the source of
    pretrained weights.

    Args:
        data: Images of any shape; when they aren't square, odd turns are stretched back to the shape.
        seed: Seed of the private generator.

    Returns:
        Data with four classes.
    """
    generator = torch.Generator().manual_seed(seed)

    def turn(images: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.randint(4, (len(images),), generator=generator)
        turned = [torch.rot90(image, turn, (1, 2)) for image, turn in zip(images, turns.tolist(), strict=True)]
        shape = images.shape[2:]
        return torch.cat([F.interpolate(image[None].float(), shape, mode="bilinear").byte() for image in turned]), turns

    return ImageData(f"{data.name}, quarter turns", *turn(data.x_train), *turn(data.x_test), num_classes=4)
