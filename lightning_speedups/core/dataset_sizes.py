"""What in a dataset sets the size of its images: a ``size`` of its own, or transforms of torchvision or timm.

They are told by the names of their classes and attributes, so that neither library is needed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch.utils.data import Dataset

from lightning_speedups.core.resizing import Size

CROPS = frozenset({"CenterCrop", "RandomCrop"})
RESIZES_AND_CROPS = frozenset({"RandomResizedCrop", "RandomResizedCropAndInterpolation"})
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
        larger = max(rows, columns)  # for a side of unknown direction, which may not be too small for a later crop
        scaled: Any
        if isinstance(self.value, int):
            scaled = max(1, round(self.value * larger))
        else:
            is_size = self.name == "size"
            shares = (rows, columns) if is_size and len(self.value) == 2 else [larger] * len(self.value)
            pixels = [round(side * share) for side, share in zip(self.value, shares, strict=True)]
            scaled = type(self.value)([max(1, side) for side in pixels] if is_size else pixels)
        setattr(self.owner, self.name, scaled)


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

    def restore(self) -> None:
        """Let the dataset give full images."""
        self.set_size(self.full)

    def shared_with(self, other: Any) -> str | None:
        """Return the class of something that another dataset would see changed, or None.

        Args:
            other: The other dataset.
        """
        seen = _reachable(other)
        return next((type(setting.owner).__name__ for setting in self.each if id(setting.owner) in seen), None)


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
    reading = _read_dataset(dataset)
    if reading.size is None:
        raise UnknownSizeError(f"nothing in {type(dataset).__name__} sets the size of its images")
    if isinstance(reading.size, str):
        raise UnknownSizeError(f"{reading.size} leaves each image its own shape; give it height and width")
    return SizeSettings(reading.size, list(reading.settings.values()))


def _read_dataset(dataset: Any) -> _Reading:
    """Follow an image out of a dataset: out of the datasets in it, then through its own transform."""
    parts = list(getattr(dataset, "datasets", None) or [])
    parts = parts or [part for part in getattr(dataset, "__dict__", {}).values() if isinstance(part, Dataset)]
    readings = [_read_dataset(part) for part in parts]
    sizes = {inner.size for inner in readings} or {None}
    if len(sizes) > 1:
        raise UnknownSizeError(f"the parts of {type(dataset).__name__} have images of different sizes")
    reading = _Reading(sizes.pop())
    for inner in readings:
        reading.settings |= inner.settings
    chain = _transform_of(dataset)
    own_size = getattr(dataset, "size", None)
    if not parts and _is_size(own_size) and not _sets_size(chain):  # else it is the dataset's length
        reading.settle(dataset, own_size)
    reading.follow(chain)
    return reading


def _transform_of(dataset: Any) -> Any:
    """Return what the images go through; torchvision makes a pair of ``transform``, which then is the one to change."""
    joint = getattr(dataset, "transforms", None)
    is_pair = type(joint).__name__ == "StandardTransform"
    return getattr(dataset, "transform", None) if joint is None or is_pair else joint


def _sets_size(transform: Any) -> bool:
    """Tell whether all images have one size after a transform, whatever they had before."""
    reading = _Reading()
    try:
        reading.follow(transform)
    except UnknownSizeError:
        return False
    return isinstance(reading.size, tuple)


class _Reading:
    """What is known of the images after some of what they go through.

    Args:
        size: Their size; or the name of what has set their scale, but not their shape; or None.
    """

    def __init__(self, size: Size | str | None = None) -> None:
        self.size = size
        self.settings: dict[tuple[int, str], SizeSetting] = {}

    def follow(self, transform: Any) -> None:
        """Go through a transform."""
        kind = type(transform).__name__
        if transform is None:
            return
        if kind in ("Compose", "Sequential"):
            for part in getattr(transform, "transforms", transform):
                self.follow(part)
        elif kind in APPLIES_SOME:
            self._follow_some(transform)
        elif kind == "Resize":
            self._resize(transform)
        elif kind in RESIZES_AND_CROPS:
            self.settle(transform, transform.size)
        elif kind in CROPS:
            self._crop(transform)
        elif kind not in KEEPS_SIZE or getattr(transform, "expand", False):  # as a rotation may
            raise UnknownSizeError(f"what {kind} does to the size of the images is not known")

    def settle(self, owner: Any, size: Any) -> None:
        """Take the ``size`` of a dataset or transform for that of the images."""
        self.size = (size, size) if isinstance(size, int) else (size[0], size[-1])
        self._add(owner, "size")

    def _add(self, owner: Any, name: str) -> None:
        self.settings[id(owner), name] = SizeSetting(owner, name, getattr(owner, name))

    def _follow_some(self, transform: Any) -> None:
        for part in transform.transforms:
            inner = _Reading(self.size)
            inner.follow(part)
            if inner.settings:
                raise UnknownSizeError(f"{type(transform).__name__} changes the size of some images only")

    def _resize(self, transform: Any) -> None:
        size = transform.size
        if getattr(transform, "max_size", None) is not None or size is None:
            raise UnknownSizeError("Resize has a `max_size`")
        self.settle(transform, size)
        if isinstance(size, int) or len(size) == 1:  # of the shorter side
            self.size = f"Resize({size if isinstance(size, int) else size[0]})"

    def _crop(self, transform: Any) -> None:
        if self.size is None:
            raise UnknownSizeError(
                f"{type(transform).__name__} cuts a part out of the images, and nothing before it resizes them; put a "
                "Resize before it"
            )
        self.settle(transform, transform.size)
        if getattr(transform, "padding", None):
            self._add(transform, "padding")


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return all(_is_size(side) and isinstance(side, int) for side in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
