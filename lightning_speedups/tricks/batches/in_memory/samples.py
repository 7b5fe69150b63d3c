"""Whether a loader makes the same of a sample each time: what has a hand in it is known by name.

So torchvision is not needed here.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch.utils.data import DataLoader, Subset

SAME_EACH_TIME = (
    "CenterCrop ConvertImageDtype DataLoader Grayscale ImageStore Normalize PILToTensor Pad Resize StandardTransform "
    "StatefulDataLoader TensorDataset ToDtype ToImage ToPILImage ToPureTensor ToTensor list"
)
"""Names of torch's, torchvision's and Python's own that make the same of a sample each time."""
MOVABLE = {"RandomCrop": "crop", "RandomHorizontalFlip": "flip"}
"""Names of the random transforms that BatchAugmentation can do instead, and its arguments for them."""


def name_of(thing: Any) -> str:
    """Return the name of a function, or that of an object's class.

    Args:
        thing: Either.

    Example:
        >>> name_of(len), name_of([1])
        ('len', 'list')
    """
    return str(getattr(thing, "__name__", type(thing).__name__))


def steps_of(transform: Any) -> Iterator[Any]:
    """Yield the transforms that one is composed of.

    Args:
        transform: One, several in a ``Compose`` or a ``Sequential``, or None for none.

    Example:
        >>> from torchvision.transforms import Compose, ToTensor
        >>> [name_of(step) for step in steps_of(Compose([ToTensor(), Compose([abs])]))], [*steps_of(None)]
        (['ToTensor', 'abs'], [])
    """
    if name_of(transform) in ("Compose", "Sequential"):
        for part in getattr(transform, "transforms", transform):
            yield from steps_of(part)
    elif transform is not None:
        yield transform


def made_alike(loader: DataLoader[Any], deterministic: Collection[str] = ()) -> tuple[Subset[Any], list[Any]]:
    """Return samples that are made alike each time, and which transforms of a loader's are not in them.

    Args:
        loader: A DataLoader over a map-style dataset.
        deterministic: Names, beside the known ones, of what makes the same each time.

    Returns:
        All samples of the loader's dataset, or of a shallow copy without random crops and flips; and these.

    Raises:
        ValueError: If something else may be random; it names what.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip, ToTensor
        >>> kept, moved = made_alike(DataLoader(FakeData(9, transform=Compose([RandomHorizontalFlip(), ToTensor()]))))
        >>> kept.dataset.transform.transforms, moved
        ([ToTensor()], [RandomHorizontalFlip(p=0.5)])
        >>> made_alike(DataLoader(FakeData(9, transform=ColorJitter())))
        Traceback (most recent call last):
        ValueError: ColorJitter may make another one each time. If not, say so: `deterministic=["ColorJitter"]`
    """
    data: Any = loader.dataset
    indices: Any = range(len(data))
    while type(data) is Subset:
        data, indices = data.dataset, [data.indices[one] for one in indices]
    transform: Any = getattr(data, "transform", None)
    moved = [one for one in steps_of(transform) if name_of(one) in MOVABLE] if name_of(transform) == "Compose" else []
    steps = [*steps_of(getattr(data, "target_transform", None)), *steps_of(getattr(data, "transforms", None))]
    for one in (loader, data, *(step for step in steps_of(transform) if step not in moved), *steps):
        known = type(one).__module__.startswith("torchvision.datasets.")
        if not known and name_of(one) not in (*SAME_EACH_TIME.split(), *deterministic):
            name = name_of(one)
            raise ValueError(f'{name} may make another one each time. If not, say so: `deterministic=["{name}"]`')
    if moved:
        data = copy.copy(data)
        data.transform = type(transform)([step for step in steps_of(transform) if step not in moved])
    return Subset(data, indices), moved
