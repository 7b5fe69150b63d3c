"""Crops and flips of a whole batch on its device, with airbench's alternating flip (Jordan, arXiv:2404.00498)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.batches import BatchOrder, SeededBatchTrick
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.augmentation import coins, flip_some, shifted_crops
from lightning_speedups.core.batch import Place, check_places
from lightning_speedups.core.counts import counted


def crop_range(crop: int, strength: float) -> int:
    """Return how far a crop may move, in pixels.

    Args:
        crop: The range at full strength.
        strength: Share of it, in [0, 1].

    Example:
        >>> [crop_range(4, strength) for strength in (0.0, 0.3, 1.0)]
        [0, 1, 4]
    """
    return round(crop * strength)


class BatchAugmentation(SeededBatchTrick):
    """Crops and flips the images of each training batch at random, all at once and on the device they train on.

    Each image is padded by ``crop`` pixels and cut back to its size at a place of its own. Then some are mirrored left
    to right: with ``flip="random"`` each with probability 0.5; with ``"alternating"`` a coin for each sample of the
    dataset says whether it is mirrored in the first epoch, and from then on it is in every other one, so that any two
    epochs in a row show both sides of every image. That is worth it in short runs. It replaces transforms that workers
    do image by image; together with ``InMemoryLoader`` no Python is run for a single image.

    Several views of each sample (`inputs` as a list) get crops and flips of their own. Volumes also move along their
    depth, and are mirrored along their width alone.

    It changes training batches alone, so it does not normalise: put that into the model, where validation and export
    have it too, as ``torchvision.transforms.v2.ToDtype(torch.float32, scale=True)`` and ``v2.Normalize(mean, std)``
    before the first layer; uint8 images then stay small until there. Richer augmentation (RandAugment, colours,
    erasing) is in ``torchvision.transforms.v2``, timm and Kornia.

    When not to use it: images whose meaning mirroring changes, such as digits and text (``flip=None``); loaders whose
    workers augment while the device is busy, which costs nothing; boxes or keypoints, which it does not move.
    It warns of those in the first batch, and of maps that nobody named. Not for the crops of videos: their frames would
    move as the slices of a volume do.

    Args:
        crop: How far an image may move in each direction, in pixels, 0 or more and below its sides; 0: no crop.
        padding: What stands outside the image: ``"reflect"``: the image mirrored at its border; ``"zeros"``.
        flip: ``"random"``, ``"alternating"``, or None for no flip. ``"alternating"`` needs one training loader, a
            DataLoader over a map-style dataset, and one image in the batch for each sample.
        inputs: Where the images, ``(N, C, H, W)`` of any type, or volumes, ``(N, C, D, H, W)``, stand in the batch:
            index, key or attribute; a tuple of these is a path into a nested batch. A list of places: several views,
            each with draws of its own.
        maps: Where maps ``(N, H, W)`` or ``(N, C, H, W)``, such as segmentation masks, stand, to be moved and mirrored
            with the images: one place, or a list of them; those of volumes have a depth too. Not with several views.
        ignore_index: What stands outside the maps with ``padding="zeros"``.
        seed: Seed of the draws, which depend on it, the rank and the batch's number (the coins: on it and the sample)
            alone. None: the seed of torch's generator (what ``seed_everything`` sets), kept in checkpoints.

    Raises:
        ValueError: If an argument is out of range, or if several views have maps.
        MisconfigurationException: If the batch has no such parts, if its container cannot be copied and changed, if
            images are too small or have their channels last, if the alternating flip cannot know the samples, or if
            ``training_step`` fetches its own batches.

    Source:
        Jordan, arXiv:2404.00498.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BatchAugmentation(crop=2, flip="alternating")])
    """

    batch_order = BatchOrder.AUGMENT

    def __init__(
        self,
        crop: int = 4,
        padding: Literal["reflect", "zeros"] = "reflect",
        flip: Literal["random", "alternating"] | None = "random",
        inputs: Place | list[Place] = 0,
        maps: Place | list[Place] | None = None,
        ignore_index: int = -100,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        check_number("crop", crop, 0, whole=True)
        check_number("ignore_index", ignore_index, whole=True)
        check_choice("padding", padding, ("reflect", "zeros"))
        check_choice("flip", flip, ("random", "alternating"), optional=True)
        self.views = check_places("inputs", inputs)
        self.maps = () if maps in (None, []) else check_places("maps", maps, inputs=self.views[0])
        if self.maps and len(self.views) > 1:
            raise ValueError(
                f"Expected `inputs` to be one place beside `maps`, which move with its images, but got {inputs!r}."
            )
        self.pixels = {} if crop == 0 and flip is None else {"inputs": self.views, "maps": self.maps}
        self.crop, self.padding, self.flip, self.ignore_index = int(crop), padding, flip, int(ignore_index)
        self.inputs = inputs
        self._loader = LoaderGrip(self, name=f'{self.name}(flip="alternating")', reads_rows=True)
        if flip == "alternating":  # which must know the samples
            self.grips = (self._loader,)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there is nothing to do."""
        super().on_fit_start(trainer, pl_module)
        if not self.pixels:
            rank_zero_warn(f"{self.name}(crop=0, flip=None) changes nothing.")

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Move and mirror the images of each view, and their maps alike."""
        if not self.pixels:
            return batch
        generator = self.generator(trainer)
        for view, inputs in enumerate(self.views):
            images = self._images(batch, inputs)
            device, pad, count = images.device, crop_range(self.crop, self.strength), len(images)
            offsets = torch.randint(2 * pad + 1, (images.ndim - 2, count), generator=generator)
            offsets = offsets.to(device, non_blocking=True)
            flipped = self._flipped(trainer, view, count, generator)
            flipped = flipped if flipped is None else flipped.to(device, non_blocking=True)
            for place in (inputs, *self.maps):
                argument = "inputs" if place == inputs else "maps"
                part = images if argument == "inputs" else self._map(batch, place, images)
                fill = None if self.padding == "reflect" else 0 if argument == "inputs" else self.ignore_index
                if pad:
                    part = shifted_crops(part, offsets, pad, fill)
                if flipped is not None:
                    part = flip_some(part, flipped)
                batch = self.with_part(batch, place, part, argument)
        return batch

    def _flipped(self, trainer: Trainer, view: int, count: int, generator: torch.Generator) -> Tensor | None:
        """Return which images of a view to mirror, on the CPU."""
        if self.flip != "alternating":
            return None if self.flip is None else torch.rand(count, generator=generator) < 0.5
        samples = self._loader.rows_of_batch()
        if len(samples) != count:
            found = f"a batch of {counted(len(samples), 'sample')} has {counted(count, 'image')}"
            what = f"needs one image for each sample, but {found}"
            way_out = 'Use `flip="random"`, or name the images\' place with `inputs=`.'
            raise self.refusal(what, way_out, flip="alternating")
        return (coins(self.run_seed(trainer) + view, torch.tensor(samples)) + trainer.current_epoch) % 2 == 1

    def _images(self, batch: Any, place: Place) -> Tensor:
        images = self.tensor_of(batch, place, "inputs")
        # Fewer slices are rather the channels of a video's frames.
        has_no_depth = images.ndim == 5 and self.crop > 0 and images.shape[2] < 5
        if images.ndim not in (4, 5) or self.crop >= min(images.shape[2:]) or has_no_depth:
            wanted = (
                f"images (N, C, H, W) or volumes (N, C, D, H, W), of 5 slices or more, with sides above {self.crop}"
            )
            what = f"expected {wanted} pixels, but found the shape {tuple(images.shape)}"
            more = "Or stack the images into one tensor, put the channels second or lower `crop`."
            raise self.misplaced(what, batch, more, inputs=place, crop=self.crop)
        return images

    def _map(self, batch: Any, place: Place, images: Tensor) -> Tensor:
        part = self.tensor_of(batch, place, "maps")
        sides = images.shape[2:]
        fits = part.ndim in (images.ndim - 1, images.ndim) and part.shape[-len(sides) :] == sides
        if not fits or len(part) != len(images):
            axes = "D, H, W" if len(sides) == 3 else "H, W"
            large = f"a map (N, {axes}) or (N, C, {axes}) as large as the images {tuple(images.shape)}"
            what = f"expected {large}, but found the shape {tuple(part.shape)}"
            raise self.misplaced(what, batch, "", maps=place)
        holds = torch.tensor(self.ignore_index).to(part.dtype).item() == self.ignore_index
        if self.padding == "zeros" and self.crop and not holds:
            what = f"pads maps with a value that {part.dtype} at maps={place!r} cannot hold"
            way_out = 'Give another `ignore_index`, or use `padding="reflect"`.'
            raise self.refusal(what, way_out, ignore_index=self.ignore_index)
        return part
