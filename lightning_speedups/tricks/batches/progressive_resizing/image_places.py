"""Where the images stand in a batch, and what is resized with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_speedups.attach.batches import BatchTrick
from lightning_speedups.core.batch import Place, check_places
from lightning_speedups.core.resizing import Size, resize_images, resize_maps


class ImagePlaces:
    """The images of a batch and its maps of labels for each pixel.

    Args:
        trick: Whose.
        inputs: A place of images, or a list of these, all of one size.
        maps: A place of maps of that size, or a list of these, or None.
        antialias: Whether to average over all pixels when shrinking.

    Raises:
        ValueError: If these are no places, or two are the same.
    """

    def __init__(self, trick: BatchTrick, inputs: Any, maps: Any, antialias: bool) -> None:
        self.trick, self.antialias = trick, antialias
        self.inputs = check_places("inputs", inputs)
        self.maps = () if maps is None else check_places("maps", maps)

    def size_in(self, batch: Any) -> Size:
        """Return the size of a batch's first images."""
        return _size(self._part(batch, self.inputs[0], "inputs"))

    def resized(self, batch: Any, size: Size) -> Any:
        """Return a batch whose images and maps have a size."""
        full, changed = self.size_in(batch), batch
        for place in self.inputs:
            images = self._part(batch, place, "inputs", full)
            changed = self.trick.with_part(changed, place, resize_images(images, size, self.antialias), "inputs")
        for place in self.maps:
            maps = self._part(batch, place, "maps", full)
            changed = self.trick.with_part(changed, place, resize_maps(maps, size), "maps")
        return changed

    def _part(self, batch: Any, place: Place, argument: str, full: Size | None = None) -> Tensor:
        part, is_map = self.trick.tensor_of(batch, place, argument), argument == "maps"
        is_right = part.ndim >= 3 and (is_map or part.is_floating_point() or part.dtype == torch.uint8)
        if is_right and full in (None, _size(part)):
            return part
        what = f"{'maps' if is_map else 'floating-point or uint8 images'} of one size (N, ..., H, W)"
        found = f"{part.dtype} of the shape {tuple(part.shape)}"
        more = "Maps of labels go to `maps=`."
        raise self.trick.misplaced(f"expected {what}, but found {found}", batch, more, **{argument: place})


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]
