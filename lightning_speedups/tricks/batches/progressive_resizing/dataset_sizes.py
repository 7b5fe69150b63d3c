"""What in a dataset sets the size of its images: a ``size`` of its own, or transforms of torchvision or timm.

They are told by the names of their classes and attributes, so that neither library is needed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch.utils.data import Dataset

from lightning_speedups.core.resizing import Size

CROPS = frozenset({"CenterCrop", "RandomCrop"})
RESIZES = frozenset({"Resize", "RandomResizedCrop", "RandomResizedCropAndInterpolation"})
SETS_SIZE = CROPS | RESIZES
APPLIES_ALL = frozenset({"Compose", "Sequential"})
KEEPS_SIZE = frozenset(
    """
    AugMix AugMixAugment AutoAugment ClampBoundingBoxes ColorJitter ConvertBoundingBoxFormat ConvertImageDtype
    GaussianBlur GaussianNoise Grayscale Identity JPEG MaybePILToTensor MaybeToTensor Normalize PILToTensor RGB
    RandAugment RandomAdjustSharpness RandomAffine RandomAutocontrast RandomChannelPermutation RandomEqualize
    RandomErasing RandomGrayscale RandomHorizontalFlip RandomInvert RandomPerspective RandomPhotometricDistort
    RandomPosterize RandomRotation RandomSolarize RandomVerticalFlip SanitizeBoundingBoxes ToDtype ToImage ToNumpy
    ToPILImage ToPureTensor ToTensor TrivialAugmentWide
    """.split()  # noqa: SIM905  # one name a line would be a page
)
CHANGES_SIZE = ("expand", "max_size", "padding")  # options of those above, where they are set


class UnknownSizeError(LookupError):
    """The size of a dataset's images cannot be set; the message says why."""


@dataclass(frozen=True)
class SizeSettings:
    """All that sets the size of a dataset's images.

    Attributes:
        full: The size that they give as they are.
        each: The dataset and transforms that have a ``size`` in pixels, and what that is for full images: a number, or
            several.
    """

    full: Size
    each: list[tuple[Any, Any]]

    def set_size(self, size: Size) -> None:
        """Let the dataset give images of a size.

        Args:
            size: Height and width.
        """
        for owner, value in self.each:
            owner.size = scaled(value, size[0] / self.full[0], size[1] / self.full[1])

    @contextmanager
    def at_size(self, size: Size) -> Iterator[None]:
        """Let the dataset give images of a size for a while, and then those that it gave before.

        Args:
            size: Height and width.
        """
        before = [(owner, owner.size) for owner, _ in self.each]
        try:
            self.set_size(size)
            yield
        finally:
            for owner, value in before:
                owner.size = value

    def shared_with(self, other: Any) -> str | None:
        """Return the class of something that another dataset would see changed, or None.

        Args:
            other: The other dataset.
        """
        seen = _reachable(other)
        return next((_kind(owner) for owner, _ in self.each if id(owner) in seen), None)


def scaled(value: Any, rows: float, columns: float) -> Any:
    """Return a ``size`` for images whose height and width are so many times the full ones.

    Args:
        value: A side whose direction is not known, alone or as the only one of a list; or height and width. In pixels.
        rows: The height's share of the full one, in (0, 1].
        columns: The width's.

    Returns:
        Sides of the same type, each 1 or more.

    Example:
        >>> scaled(32, 0.5, 0.25), scaled([32], 0.5, 0.25), scaled((32, 32), 0.5, 0.25)
        (16, [16], (16, 8))
    """
    if isinstance(value, int):
        return scaled([value], rows, columns)[0]
    shares = (rows, columns) if len(value) == 2 else [max(rows, columns)]  # no side may be too small for a later crop
    return type(value)(max(1, round(side * share)) for side, share in zip(value, shares, strict=True))


def find_settings(dataset: Any) -> SizeSettings:
    """Find what sets the size of a dataset's images.

    Args:
        dataset: One with a ``size`` (a side, or height and width), or with ``transform`` or ``transforms`` of
            torchvision or timm; also below ``Subset`` and wrappers that hold one dataset as an attribute.

    Raises:
        UnknownSizeError: If that is not known for certain; the message says why.

    Example:
        >>> class Squares:
        ...     size = 32
        >>> find_settings(Squares()).full
        (32, 32)
    """
    origin, transforms = _way(dataset)
    for one in transforms:
        if _kind(one) not in SETS_SIZE | KEEPS_SIZE:
            raise UnknownSizeError(f"what {_kind(one)} does to the size of the images is not known")
        if option := next((option for option in CHANGES_SIZE if getattr(one, option, None)), None):
            raise UnknownSizeError(f"what {_kind(one)} does with its `{option}` to smaller images is not known")
    owners = [one for one in transforms if _kind(one) in SETS_SIZE]
    if _is_size(getattr(origin, "size", None)) and not any(_kind(one) in RESIZES for one in owners):
        owners = [origin, *owners]  # beside transforms that resize, it may be the dataset's length
    return SizeSettings(_final_size(origin, owners), [(owner, owner.size) for owner in owners])


def _way(dataset: Any) -> tuple[Any, list[Any]]:
    """Return the way that images go: from which dataset, below all others, and through which transforms."""
    own, joint = getattr(dataset, "transform", None), getattr(dataset, "transforms", None)
    outer = _flattened(joint if own is None else own)  # of `transform`, torchvision makes `transforms` itself
    inner = [part for part in getattr(dataset, "__dict__", {}).values() if isinstance(part, Dataset)]
    if len(inner) > 1:
        raise UnknownSizeError(f"{_kind(dataset)} holds several datasets")
    origin, transforms = _way(inner[0]) if inner else (dataset, [])
    return origin, [*transforms, *outer]


def _flattened(transform: Any) -> list[Any]:
    """Return the transforms that a transform is made of, as deep as they lie."""
    if _kind(transform) in APPLIES_ALL:
        return [one for part in getattr(transform, "transforms", transform) for one in _flattened(part)]
    return [] if transform is None else [transform]


def _final_size(origin: Any, owners: list[Any]) -> Size:
    """Return the size of images behind all that sets it."""
    if not owners or _kind(owners[0]) in CROPS:
        raise UnknownSizeError(f"nothing in {_kind(origin)} sets the size of whole images; put a Resize before crops")
    sides = _sides(owners[-1].size)
    if _kind(owners[-1]) == "Resize" and len(sides) == 1:  # of the shorter side
        raise UnknownSizeError(f"Resize({sides[0]}) leaves each image its own shape; give it height and width")
    return sides[0], sides[-1]


def _kind(thing: Any) -> str:
    return type(thing).__name__


def _sides(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def _is_size(value: Any) -> bool:
    return len(_sides(value)) in (1, 2) and all(type(side) is int and side > 0 for side in _sides(value))


def _reachable(thing: Any) -> set[int]:
    """Return the ids of everything that an object holds, except for what large containers do."""
    seen: dict[int, Any] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType)):
            seen[id(one)] = one
            # A function also holds all names of its module.
            held = one.__closure__ or () if isinstance(one, FunctionType) else gc.get_referents(one)
            waiting += held if len(held) < 1000 else ()
    return set(seen)
