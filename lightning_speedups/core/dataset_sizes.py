"""What in a dataset sets the size of its images: a ``size`` of its own, or transforms of torchvision or timm.

They are told by the names of their classes and attributes, so that neither library is needed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_speedups.core.resizing import Size

MOST_HELD = 200  # more are a container of samples
CROPS = frozenset({"CenterCrop", "RandomCrop"})
SETS_SIZE = CROPS | {"Resize", "RandomResizedCrop", "RandomResizedCropAndInterpolation"}
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
    found = [_follow(inner, transforms) for inner, transforms in _ways(dataset)]
    if len({size for size, _ in found}) > 1:
        raise UnknownSizeError(f"the parts of {type(dataset).__name__} have images of different sizes")
    size = found[0][0]
    if size is None:
        raise UnknownSizeError(f"nothing in {type(dataset).__name__} sets the size of its images")
    if isinstance(size, str):
        raise UnknownSizeError(f"{size} leaves each image its own shape; give it height and width")
    once = {(id(setting.owner), setting.name): setting for _, settings in found for setting in settings}
    return SizeSettings(size, list(once.values()))


def _ways(dataset: Any) -> list[tuple[Any, list[Any]]]:
    """Return the ways that images go: from which dataset, below all others, and through which transforms."""
    parts = list(getattr(dataset, "datasets", None) or [])
    parts = parts or [part for part in getattr(dataset, "__dict__", {}).values() if isinstance(part, Dataset)]
    joint = getattr(dataset, "transforms", None)
    is_pair = type(joint).__name__ == "StandardTransform"  # made by torchvision of `transform`, which is to change then
    own = list(_flattened(getattr(dataset, "transform", None) if joint is None or is_pair else joint))
    inner = [way for part in parts for way in _ways(part)] or [(dataset, [])]
    return [(origin, [*transforms, *own]) for origin, transforms in inner]


def _flattened(transform: Any) -> Iterator[Any]:
    kind = type(transform).__name__
    if transform is not None and kind not in APPLIES_ALL | APPLIES_SOME:
        yield transform
    elif transform is not None:
        for part in getattr(transform, "transforms", transform):
            for one in _flattened(part):
                if kind in APPLIES_SOME and type(one).__name__ in SETS_SIZE:
                    raise UnknownSizeError(f"{kind} changes the size of some images only")
                yield one


def _follow(dataset: Any, transforms: Sequence[Any]) -> tuple[Size | str | None, list[SizeSetting]]:
    """Return what size images have in the end, or which Resize leaves them theirs, and the attributes that set it."""
    size: Size | str | None = None
    settings: list[SizeSetting] = []
    for transform in transforms:
        _require_known(transform, is_resized=size is not None)
        if type(transform).__name__ in SETS_SIZE:
            size = _size_after(transform)
            settings.append(SizeSetting(transform, "size", transform.size))
            if getattr(transform, "padding", None):
                settings.append(SizeSetting(transform, "padding", transform.padding))
    if not settings and _is_size(getattr(dataset, "size", None)):  # beside a transform it may be the dataset's length
        return _size_after(dataset), [SizeSetting(dataset, "size", dataset.size)]
    return size, settings


def _require_known(transform: Any, is_resized: bool) -> None:
    kind = type(transform).__name__
    if kind in CROPS and not is_resized:
        raise UnknownSizeError(
            f"{kind} cuts a part out of the images, and nothing before it resizes them; put a Resize before it"
        )
    if kind == "Resize" and (getattr(transform, "max_size", None) is not None or transform.size is None):
        raise UnknownSizeError("Resize has a `max_size`")
    if kind not in SETS_SIZE | KEEPS_SIZE or getattr(transform, "expand", False):  # as a rotation may
        raise UnknownSizeError(f"what {kind} does to the size of the images is not known")


def _size_after(owner: Any) -> Size | str:
    sides = (owner.size,) if isinstance(owner.size, int) else tuple(owner.size)
    if type(owner).__name__ == "Resize" and len(sides) == 1:  # of the shorter side
        return f"Resize({sides[0]})"
    return sides[0], sides[-1]


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return all(_is_size(side) and isinstance(side, int) for side in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _reachable(thing: Any) -> set[int]:
    """Return the ids of everything that an object holds, except for what classes and large containers do."""
    seen: dict[int, Any] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            waiting += _held_by(one)
    return set(seen)


def _held_by(thing: Any) -> Sequence[Any]:
    if isinstance(thing, FunctionType):
        return thing.__closure__ or ()  # it also holds all names of its module
    held = [] if isinstance(thing, (type, ModuleType)) else gc.get_referents(thing)
    return held if len(held) <= MOST_HELD else []


def take_batch(loader: DataLoader[Any], indices: Sequence[Any]) -> Any:
    """Return a batch of a map-style dataset, in this process.

    Args:
        loader: The loader that collates it.
        indices: Which samples.

    Example:
        >>> take_batch(DataLoader(range(8), batch_size=4), [2, 5])
        tensor([2, 5])
    """
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:  # the dataset is given whole batches of indices
        return loader.collate_fn(dataset[list(indices)])
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(indices)) if many else [dataset[index] for index in indices]
    return loader.collate_fn(samples)
