"""Where the images stand in a batch, and what is resized with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_speedups.attach.batches import BatchTrick
from lightning_speedups.core.batch import Place, check_places, replace_part
from lightning_speedups.core.resizing import Size, resize_images, resize_maps, side


class ImagePlaces:
    """The images of a batch and its maps of labels for each pixel.

    Args:
        trick: Whose.
        inputs: A place of images, or a list of these; the first ones are the measure of all.
        maps: A place of maps, or a list of these, or None.
        antialias: Whether to average over all pixels when shrinking.
        multiple: What the sides of images are multiples of where these have another size than the first, in pixels.

    Raises:
        ValueError: If these are no places, or two are the same.
    """

    def __init__(self, trick: BatchTrick, inputs: Any, maps: Any, antialias: bool, multiple: int) -> None:
        self.trick, self.antialias, self.multiple = trick, antialias, multiple
        self.inputs = check_places("inputs", inputs)
        self.maps = () if maps is None else check_places("maps", maps)

    def size_in(self, batch: Any) -> Size:
        """Return the size of a batch's first images."""
        return _size(self._part(batch, self.inputs[0], "inputs"))

    def resized(self, batch: Any, size: Size) -> Any:
        """Return a batch whose first images have a size, and all else its own in proportion."""
        first, changed = self.size_in(batch), batch
        for place in self.inputs:
            images = self._part(batch, place, "inputs")
            new = in_proportion(_size(images), first, size, self.multiple)
            changed = replace_part(changed, place, resize_images(images, new, self.antialias))
        for place in self.maps:
            maps = self._part(batch, place, "maps")
            changed = replace_part(changed, place, resize_maps(maps, in_proportion(_size(maps), first, size)))
        return changed

    def _part(self, batch: Any, place: Place, argument: str) -> Tensor:
        part = self.trick.tensor_of(batch, place, argument)
        if part.ndim >= 3 and (argument == "maps" or part.is_floating_point() or part.dtype == torch.uint8):
            return part
        what = "maps (N, ..., H, W)" if argument == "maps" else "floating-point or uint8 images (N, ..., H, W)"
        found = f"{part.dtype} of the shape {tuple(part.shape)}"
        way_out = "Name the right place; maps of labels go to `maps=`."
        raise self.trick.refusal(f"expected {what}, but found {found}", way_out, **{argument: place})


def in_proportion(own: Size, first: Size, size: Size, multiple: int = 1) -> Size:
    """Return the new size of images that stand beside others.

    Args:
        own: Their full size.
        first: The full size of the others.
        size: The new size of the others.
        multiple: Sides are multiples of this, in pixels, except full ones.

    Example:
        >>> in_proportion((12, 12), (16, 16), (8, 8), multiple=4), in_proportion((8, 16), (16, 16), (8, 12))
        ((8, 8), (4, 12))
    """
    if own == first:
        return size
    return side(own[0], size[0] / first[0], multiple), side(own[1], size[1] / first[1], multiple)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]
