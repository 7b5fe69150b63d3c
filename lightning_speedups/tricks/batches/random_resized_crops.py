"""Random parts of images, resized and mirrored for a whole batch on its device (Szegedy et al., arXiv:1409.4842)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_speedups.attach.batches import BatchOrder, SeededBatchTrick
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.augmentation import flip_some
from lightning_speedups.core.batch import Place, check_place
from lightning_speedups.core.resized_crops import random_boxes, resized_crops


class RandomResizedCrops(SeededBatchTrick):
    """Cuts a part of random size and shape out of each training image, resizes it, and mirrors one in two.

    It does so with whole batches on the device they train on, in place of torchvision's ``RandomResizedCrop`` and
    ``RandomHorizontalFlip``, and draws alike; only where none of ten tries fits, the part is the whole image. Images
    stay uint8 if they are. They must have one size, somewhat larger than that of the crops: what an ``ImageStore``
    holds. They are resized one after the other, by a call of torch's for each: cheap on a CPU, where bytes go fastest;
    on a GPU some hundred small kernels a batch.

    It changes training batches alone: for validation make images of the right size, as another ``ImageStore`` does.
    Normalise in the model, where validation and export have it too.

    When not to use it: images whose meaning mirroring changes, such as digits and text (``flip=None``); small objects
    that a crop may miss; boxes, keypoints or maps of class ids, which it does not move; loaders whose workers crop
    while the device is busy.

    Args:
        size: Side of the crops in pixels, or height and width, 2 or more.
        scale: Smallest and largest area of a part, as shares of the image's, in (0, 1].
        ratio: Smallest and largest width of a part over its height, above 0.
        flip: ``"random"``: each is mirrored left to right with probability 0.5; None: none is.
        inputs: Where the images, ``(N, C, H, W)`` of uint8 or floating point, stand in the batch: index, key or
            attribute; a tuple of these is a path into a nested batch.
        seed: Seed of the draws, which depend on it, the rank and the batch's number alone. None: the seed of torch's
            generator (what ``seed_everything`` sets), kept in checkpoints.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In the first step, if the batch has no such images, or its container cannot be
            copied and changed.

    Source:
        Szegedy et al., arXiv:1409.4842.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomResizedCrops(128, scale=(0.35, 1))])
    """

    batch_order = BatchOrder.CUT

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: Literal["random"] | None = "random",
        inputs: Place = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        for name, pair, high in (("size", sides, math.inf), ("scale", scale, 1), ("ratio", ratio, math.inf)):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"Expected `{name}` to be two numbers, but got {pair!r}.")
            for one in pair:
                check_number(name, one, name == "size", high, above=True, whole=name == "size")
            if name != "size" and pair[0] > pair[1]:
                raise ValueError(f"Expected `{name}` to be two numbers, the smaller one first, but got {pair!r}.")
        check_choice("flip", flip, ("random",), optional=True)
        check_place("inputs", inputs)
        self.inputs, self.pixels = inputs, {"inputs": (inputs,)}
        self.size, self.flip = (sides[0], sides[1]), flip
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])

    def naming(self, maps: Iterable[Place]) -> str:
        """Return the sentence that tells what to do with more that goes with the images."""
        return f"If it belongs to them, leave out {self.name}."

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Cut, resize and mirror the images."""
        images = self.tensor_of(batch, self.inputs, "inputs")
        if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
            found = f"{images.dtype} of the shape {tuple(images.shape)}"
            what = f"expected images (N, C, H, W) of uint8 or floating point, but found {found}"
            raise self.misplaced(what, batch, "", inputs=self.inputs)
        count, full, generator = len(images), (images.shape[2], images.shape[3]), self.generator(trainer)
        low, high = self.scale
        scale = low + (1 - self.strength) * (high - low), high
        images = resized_crops(images, random_boxes(count, full, scale, self.ratio, generator), self.size)
        if self.flip is not None:
            flipped = torch.rand(count, generator=generator) < 0.5
            images = flip_some(images, flipped.to(images.device, non_blocking=True))
        return self.with_part(batch, self.inputs, images, "inputs")
