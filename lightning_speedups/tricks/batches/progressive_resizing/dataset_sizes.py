"""What in a dataset sets the size of its images: a ``size`` of its own, or transforms of torchvision or timm.

They are told by the names of their classes and attributes, so that neither library is needed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
APPLIES_SOME = frozenset({"RandomApply", "RandomChoice", "RandomOrder"})
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


class UnknownSizeError(LookupError):
    """The size of a dataset's images cannot be set; the message says why."""


@dataclass(frozen=True)
class SizeSetting:
    """An attribute that is in pixels.

    Attributes:
        owner: The dataset or transform.
        name: The attribute.
        value: Its value for full images: a number, or several.
    """

    owner: Any
    name: str
    value: Any

    def set_scaled(self, rows: float, columns: float) -> None:
        """Set it for images whose height and width are so many times the full ones."""
        sides, is_size = _sides(self.value), self.name == "size"
        larger = max(rows, columns)  # for a side of unknown direction, which may not be too small for a later crop
        shares = (rows, columns) if is_size and len(sides) == 2 else [larger] * len(sides)
        pixels = [max(int(is_size), round(side * share)) for side, share in zip(sides, shares, strict=True)]
        setattr(self.owner, self.name, pixels[0] if isinstance(self.value, int) else type(self.value)(pixels))


@dataclass(frozen=True)
class SizeSettings:
    """All that sets the size of a dataset's images.

    Attributes:
        full: The size that they give as they are.
        each: The attributes.
    """

    full: Size
    each: list[SizeSetting]

    def set_size(self, size: Size) -> None:
        """Let the dataset give images of a size.

        Args:
            size: Height and width.
        """
        for setting in self.each:
            setting.set_scaled(size[0] / self.full[0], size[1] / self.full[1])

    @contextmanager
    def at_size(self, size: Size) -> Iterator[None]:
        """Let the dataset give images of a size for a while, and then those that it gave before.

        Args:
            size: Height and width.
        """
        before = [(one.owner, one.name, getattr(one.owner, one.name)) for one in self.each]
        try:
            self.set_size(size)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def restore(self) -> None:
        """Let the dataset give full images."""
        self.set_size(self.full)

    def shared_with(self, other: Any) -> str | None:
        """Return the class of something that another dataset would see changed, or None.

        Args:
            other: The other dataset.
        """
        seen = _reachable(other)
        return next((_kind(setting.owner) for setting in self.each if id(setting.owner) in seen), None)


def find_settings(dataset: Any) -> SizeSettings:
    """Find what sets the size of a dataset's images.

    Args:
        dataset: One with a ``size`` (a side, or height and width), or with ``transform`` or ``transforms`` of
            torchvision or timm; also below ``Subset``, ``ConcatDataset`` and wrappers that hold it as an attribute.

    Raises:
        UnknownSizeError: If that is not known for certain; the message says why.

    Example:
        >>> class Squares:
        ...     size = 32
        >>> find_settings(Squares()).full
        (32, 32)
    """
    found = [_read_way(origin, transforms) for origin, transforms in _ways(dataset)]
    if len({size for size, _ in found}) > 1:
        raise UnknownSizeError(f"the parts of {_kind(dataset)} have images of different sizes")
    once = {(id(setting.owner), setting.name): setting for _, settings in found for setting in settings}
    return SizeSettings(found[0][0], list(once.values()))


def _ways(dataset: Any) -> list[tuple[Any, list[Any]]]:
    """Return the ways that images go: from which dataset, below all others, and through which transforms."""
    joint = getattr(dataset, "transforms", None)
    is_pair = _kind(joint) == "StandardTransform"  # made by torchvision of `transform`, which is to change then
    own = list(_flattened(getattr(dataset, "transform", None) if joint is None or is_pair else joint))
    parts = list(getattr(dataset, "datasets", None) or [])
    parts = parts or [part for part in getattr(dataset, "__dict__", {}).values() if isinstance(part, Dataset)]
    inner = [way for part in parts for way in _ways(part)] or [(dataset, [])]
    return [(origin, [*transforms, *own]) for origin, transforms in inner]


def _flattened(transform: Any) -> Iterator[Any]:
    """Yield the transforms that a transform is made of, as deep as they lie."""
    if _kind(transform) in APPLIES_ALL | APPLIES_SOME:
        for part in getattr(transform, "transforms", transform):
            for one in _flattened(part):
                if _kind(transform) in APPLIES_SOME and _kind(one) in SETS_SIZE:
                    raise UnknownSizeError(f"{_kind(transform)} changes the size of some images only")
                yield one
    elif transform is not None:
        yield transform


def _read_way(origin: Any, transforms: list[Any]) -> tuple[Size, list[SizeSetting]]:
    """Return what size images have in the end, and the attributes that set it."""
    for one in transforms:
        if _kind(one) not in SETS_SIZE | KEEPS_SIZE or getattr(one, "expand", False):  # as a rotation may
            raise UnknownSizeError(f"what {_kind(one)} does to the size of the images is not known")
        if _kind(one) == "Resize" and (getattr(one, "max_size", None) is not None or one.size is None):
            raise UnknownSizeError("Resize has a `max_size`")
    owners = [one for one in transforms if _kind(one) in SETS_SIZE]
    if _is_size(getattr(origin, "size", None)) and not any(_kind(one) in RESIZES for one in owners):
        owners = [origin, *owners]  # beside transforms that resize, it may be the dataset's length
    settings = [SizeSetting(owner, "size", owner.size) for owner in owners]
    padded = [one for one in owners if _kind(one) in CROPS and getattr(one, "padding", None)]
    settings += [SizeSetting(one, "padding", one.padding) for one in padded]
    return _final_size(origin, owners), settings


def _final_size(origin: Any, owners: list[Any]) -> Size:
    """Return the size of images behind all that sets it."""
    if not owners:
        raise UnknownSizeError(f"nothing in {_kind(origin)} sets the size of its images")
    if _kind(owners[0]) in CROPS:
        raise UnknownSizeError(
            f"{_kind(owners[0])} cuts a part out of the images, and nothing before it resizes them; put a Resize there"
        )
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
        if id(one) not in seen:
            seen[id(one)] = one
            waiting += _held_by(one)
    return set(seen)


def _held_by(thing: Any) -> Iterable[Any]:
    if isinstance(thing, FunctionType):
        return thing.__closure__ or ()  # it also holds all names of its module
    is_large = isinstance(thing, (Mapping, list, tuple, set)) and len(thing) > 100
    return () if is_large or isinstance(thing, (type, ModuleType)) else gc.get_referents(thing)
