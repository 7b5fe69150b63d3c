"""What in a dataset sets the size of its images: a ``size`` of its own, or transforms of torchvision or timm.

They are told by the names of their classes and attributes, so that neither library is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.core.resizing import Size

RESIZES_AND_CROPS = ("RandomResizedCrop", "RandomResizedCropAndInterpolation")
CROPS = ("CenterCrop", "RandomCrop")
KEEPS_SIZE = frozenset(
    {
        "AugMix",
        "AugMixAugment",
        "AutoAugment",
        "ClampBoundingBoxes",
        "ColorJitter",
        "ConvertBoundingBoxFormat",
        "ConvertImageDtype",
        "GaussianBlur",
        "GaussianNoise",
        "Grayscale",
        "Identity",
        "JPEG",
        "MaybePILToTensor",
        "MaybeToTensor",
        "Normalize",
        "PILToTensor",
        "RGB",
        "RandAugment",
        "RandomAdjustSharpness",
        "RandomAffine",
        "RandomAutocontrast",
        "RandomChannelPermutation",
        "RandomEqualize",
        "RandomErasing",
        "RandomGrayscale",
        "RandomHorizontalFlip",
        "RandomInvert",
        "RandomPerspective",
        "RandomPhotometricDistort",
        "RandomPosterize",
        "RandomRotation",
        "RandomSolarize",
        "RandomVerticalFlip",
        "SanitizeBoundingBoxes",
        "ToDtype",
        "ToImage",
        "ToNumpy",
        "ToPILImage",
        "ToPureTensor",
        "ToTensor",
        "TrivialAugmentWide",
    }
)


class UnknownSizeError(LookupError):
    """The size of a dataset's images cannot be set; the message says why."""


@dataclass
class Setting:
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
        scaled: Any
        if isinstance(self.value, int):  # a side of unknown direction, which may not be too small for a later crop
            scaled = max(1, round(self.value * max(rows, columns)))
        elif self.name == "size":
            shares = (rows, columns) if len(self.value) == 2 else (max(rows, columns),)
            scaled = type(self.value)(
                [max(1, round(side * share)) for side, share in zip(self.value, shares, strict=True)]
            )
        else:
            scaled = type(self.value)([round(pixels * max(rows, columns)) for pixels in self.value])
        setattr(self.owner, self.name, scaled)

    def restore(self) -> None:
        """Give it its value for full images."""
        setattr(self.owner, self.name, self.value)


@dataclass
class Settings:
    """All that sets the size of a dataset's images.

    Attributes:
        full: The size that they give as they are.
        each: The attributes.
    """

    full: Size
    each: list[Setting] = field(default_factory=list)

    def set_size(self, size: Size) -> None:
        """Let the dataset give images of a size.

        Args:
            size: Height and width.
        """
        for setting in self.each:
            if size == self.full:
                setting.restore()
            else:
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


def find_settings(dataset: Any) -> Settings:
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
    reading = _Reading()
    reading.dataset(dataset)
    if reading.size is None:
        raise UnknownSizeError(
            f"nothing in {type(dataset).__name__} sets the size of its images"
            if reading.loose is None
            else f"{reading.loose} leaves each image its own shape; give it height and width"
        )
    return Settings(reading.size, reading.settings)


class _Reading:
    """Follows an image through a dataset."""

    def __init__(self) -> None:
        self.settings: list[Setting] = []
        self.size: Size | None = None  # where all images have one
        self.loose: str | None = None  # what has set the scale, but not the shape

    def dataset(self, dataset: Any) -> None:
        parts = list(getattr(dataset, "datasets", None) or [])
        parts = parts or [part for part in getattr(dataset, "__dict__", {}).values() if isinstance(part, Dataset)]
        results = []
        for part in parts:
            inner = _Reading()
            inner.dataset(part)
            results.append((inner.size, inner.loose))
            self.settings += [one for one in inner.settings if not any(_same(one, other) for other in self.settings)]
        if len(set(results)) > 1:
            raise UnknownSizeError(f"the parts of {type(dataset).__name__} have images of different sizes")
        if results:
            self.size, self.loose = results[0]
        # torchvision makes `transforms` of `transform`, which then is the one to change.
        joint = getattr(dataset, "transforms", None)
        chain = getattr(dataset, "transform", None)
        if joint is not None and type(joint).__name__ != "StandardTransform":
            chain = joint
        own = _Reading()
        own.size, own.loose = self.size, self.loose
        side: Any = getattr(dataset, "size", None)
        if not parts and _is_size(side):
            own.settings.append(Setting(dataset, "size", side))
            own.size = (side, side) if isinstance(side, int) else (side[0], side[1])
        if chain is not None:
            alone = _Reading()
            try:  # else `size` is the images' own, and not the dataset's length
                alone.transform(chain)
            except UnknownSizeError:
                alone.size = None
            if alone.size is not None:
                own = alone
            else:
                own.transform(chain)
        self.settings += [one for one in own.settings if not any(_same(one, other) for other in self.settings)]
        self.size, self.loose = own.size, own.loose

    def transform(self, transform: Any) -> None:
        kind = type(transform).__name__
        if transform is None:
            return
        if kind in ("Compose", "Sequential"):
            for part in transform if isinstance(transform, nn.Sequential) else transform.transforms:
                self.transform(part)
        elif kind in ("RandomApply", "RandomChoice", "RandomOrder"):
            for part in transform.transforms:
                before = len(self.settings)
                self.transform(part)
                if len(self.settings) != before:
                    raise UnknownSizeError(f"{kind} changes the size of some images only")
        elif kind == "Resize":
            self._resize(transform)
        elif kind in RESIZES_AND_CROPS:
            self._crop(transform)
        elif kind in CROPS:
            if self.size is None and self.loose is None:
                raise UnknownSizeError(
                    f"{kind} cuts a part out of the images, and nothing before it resizes them; put a Resize before it"
                )
            self._crop(transform)
            if getattr(transform, "padding", None):
                self.settings.append(Setting(transform, "padding", transform.padding))
        elif kind not in KEEPS_SIZE or (kind == "RandomRotation" and transform.expand):
            raise UnknownSizeError(f"what {kind} does to the size of the images is not known")

    def _resize(self, transform: Any) -> None:
        size = transform.size
        if getattr(transform, "max_size", None) is not None or size is None:
            raise UnknownSizeError("Resize has a `max_size`")
        if isinstance(size, Sequence) and len(size) == 1:
            size = size[0]
        if isinstance(size, int):  # of the shorter side
            self.size, self.loose = None, f"Resize({size})"
        else:
            self.size, self.loose = (size[0], size[1]), None
        self.settings.append(Setting(transform, "size", transform.size))

    def _crop(self, transform: Any) -> None:
        size = transform.size
        self.size = (size, size) if isinstance(size, int) else (size[0], size[-1])
        self.loose = None
        self.settings.append(Setting(transform, "size", size))


def _same(one: Setting, other: Setting) -> bool:
    return one.owner is other.owner and one.name == other.name


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
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type(None), type)):
            continue
        seen[id(one)] = one
        parts: Iterable[Any] = ()
        if isinstance(one, Mapping):
            parts = one.values() if len(one) <= 100 else ()
        elif isinstance(one, (list, tuple, set)):
            parts = one if len(one) <= 100 else ()
        elif isinstance(one, partial):
            parts = (one.func, *one.args, *one.keywords.values())
        elif hasattr(one, "__self__"):
            parts = (one.__self__,)
        elif hasattr(one, "__closure__"):
            parts = (cell.cell_contents for cell in one.__closure__ or () if _is_full(cell))
        elif type(one).__module__.split(".")[0] not in ("torch", "numpy", "builtins") or isinstance(
            one, (Dataset, nn.Module, DataLoader)
        ):
            parts = getattr(one, "__dict__", {}).values()
        waiting += parts
    return set(seen)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
