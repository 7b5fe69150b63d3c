"""Reading and replacing one part of a batch, whatever container the batch is, without writing into it."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from operator import getitem, setitem
from typing import Any

from torch import Tensor

Path = tuple[int | str, ...]
"""The steps into a nested batch."""
Place = int | str | Path
"""Where a part stands in a batch: an index (list, tuple), a key (mapping) or an attribute (any object), or a path of
them."""


def check_place(name: str, place: Any) -> None:
    """Refuse what cannot be a place in a batch.

    Args:
        name: The argument's name.
        place: What was given.

    Raises:
        ValueError: If it is neither an index, a key, an attribute's name nor a path of these.

    Example:
        >>> check_place("inputs", None)
        Traceback (most recent call last):
        ValueError: Expected `inputs` to be an index, a key, an attribute name or a path (...), but got None.
    """
    path = path_of(place)
    if not path or any(not isinstance(step, (int, str)) or isinstance(step, bool) for step in path):
        raise ValueError(
            f"Expected `{name}` to be an index, a key, an attribute name or a path (a tuple of these), but got"
            f" {place!r}."
        )


def check_places(name: str, places: Any, **apart: Any) -> tuple[Place, ...]:
    """Return one or several places in a batch; refuse what cannot be one, and two that are the same.

    Args:
        name: The argument's name.
        places: A place, or a list of them.
        **apart: What else must stand elsewhere, one place each, by the arguments' names.

    Raises:
        ValueError: If one is no place, if there is none, or if two are the same.

    Example:
        >>> check_places("inputs", ["image", "depth"], labels="label"), check_places("maps", ("views", 0))
        (('image', 'depth'), (('views', 0),))
        >>> check_places("inputs", [0, 1], labels=1)
        Traceback (most recent call last):
        ValueError: Expected `labels` and `inputs` to be different places in the batch, but got 1 and [0, 1].
    """
    several = places if isinstance(places, list) else [places]
    if not several:
        raise ValueError(f"Expected `{name}` to name at least one place in the batch, but got [].")
    all_places = [*((name, place) for place in several), *apart.items()]
    for argument, place in all_places:
        check_place(argument, place)
    if len({path_of(place) for _, place in all_places}) < len(all_places):
        names, given = zip(*apart.items(), (name, places), strict=True)
        raise ValueError(
            f"Expected {' and '.join(f'`{one}`' for one in names)} to be different places in the batch, but got "
            f"{' and '.join(map(repr, given))}."
        )
    return tuple(several)


def path_of(place: Place) -> Path:
    """Return a place as a path.

    Args:
        place: A path, or its only step.

    Example:
        >>> path_of("image"), path_of(("views", 0))
        (('image',), ('views', 0))
    """
    return place if isinstance(place, tuple) else (place,)


def get_part(batch: Any, place: Place) -> Any:
    """Return the part of a batch at a place.

    Args:
        batch: A list, tuple, named tuple, mapping, dataclass or other object.
        place: An index, a key or an attribute name, or a tuple of these: a path.

    Returns:
        The part; None also where the path leads into None, which a CombinedLoader hands out for a loader that has
        ended.

    Raises:
        LookupError: If the batch has no such part; the message says what it has.

    Example:
        >>> get_part({"image": 1, "label": 2}, "label")
        2
        >>> get_part({"views": [1, 2]}, ("views", 0))
        1
    """
    part, path = batch, path_of(place)
    for depth, step in enumerate(path):
        if part is None:
            return None
        try:
            part = _step(part, step)
        except (LookupError, AttributeError):
            where = f"the batch's part {path[:depth]!r}" if depth else "a batch"
            raise LookupError(f"no part {step!r} in {where} {_describe(part)}") from None
    return part


def _step(part: Any, step: int | str) -> Any:
    if isinstance(part, Mapping) or (isinstance(part, (list, tuple)) and isinstance(step, int)):
        return part[step]  # type: ignore[index]
    if isinstance(step, str):
        return getattr(part, step)
    raise LookupError


def count_samples(batch: Any) -> int | None:
    """Return the number of samples in a batch: the length of the first tensor found in it; None without a tensor.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part], nested as it may be.

    Example:
        >>> count_samples({"id": "a", "images": [Tensor(8, 3, 4, 4)]})
        8
    """
    first = next(tensors_in(batch), None)
    if first is None:
        return None
    return len(first) if first.ndim else 1


def count_by_loader(loaders: Any, batch: Any) -> int | None:
    """Return the samples of a batch, of several loaders together; None if they cannot be counted.

    Args:
        loaders: A loader, or a list, tuple or mapping of loaders.
        batch: What they gave: a batch, or as many in the same container, None of one that is exhausted.

    Example:
        >>> count_by_loader({"a": "loader", "b": "loader"}, {"a": Tensor(4, 2), "b": [Tensor(3)]})
        7
    """
    if not isinstance(loaders, (Mapping, list, tuple)):  # asked in every step
        return count_samples(batch)
    try:
        parts = [get_part(batch, path) for path in loader_paths(loaders)]
    except LookupError:  # a hook has made another batch of them
        parts = [batch]
    counts = [count_samples(part) for part in parts if part is not None]
    return None if None in counts else sum(count for count in counts if count)


def loader_paths(loaders: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path that leads to each of several loaders, and to its batch in what they give together.

    Args:
        loaders: A loader, or a list, tuple or mapping of loaders.
        path: Where that stands.

    Example:
        >>> [*loader_paths({"a": ["loader", "loader"], "b": "loader"})], [*loader_paths("loader")]
        ([('a', 0), ('a', 1), ('b',)], [()])
    """
    if isinstance(loaders, (Mapping, list, tuple)):
        for step, inner in _steps(loaders):
            yield from loader_paths(inner, (*path, step))
    else:
        yield path


def tensors_in(part: Any) -> Iterator[Tensor]:
    """Yield all tensors in something, nested as they may be, in objects' attributes too.

    Args:
        part: Where to look.

    Example:
        >>> class Batch: ...
        >>> batch = Batch()
        >>> batch.images, batch.more = Tensor([1, 1]), {"labels": [Tensor([0]), "none"], "batch": batch}
        >>> list(tensors_in([batch]))
        [tensor([1., 1.]), tensor([0.])]
    """
    return (tensor for _, tensor in places_of_tensors(part))


def places_of_tensors(part: Any, path: Path = (), seen: set[int] | None = None) -> Iterator[tuple[Place, Tensor]]:
    """Yield the place of each tensor in something, nested as they may be, and the tensor.

    Args:
        part: Where to look.
        path: Where that stands.
        seen: Of what it is not to look into: the ids.

    Example:
        >>> [place for place, _ in places_of_tensors([(Tensor([1]), {"label": Tensor([2])}), Tensor([3]), "text"])]
        [(0, 0), (0, 1, 'label'), 1]
    """
    seen = set() if seen is None else seen
    if isinstance(part, Tensor):
        yield path[0] if len(path) == 1 else path, part
    elif id(part) not in seen:
        seen.add(id(part))
        for step, inner in _steps(part):
            # What an object keeps in a mapping of its own, as torch_geometric's Data does, has names of its own.
            is_store = isinstance(inner, Mapping) and not isinstance(part, Mapping) and str(step).startswith("_")
            yield from places_of_tensors(inner, path if is_store else (*path, step), seen)


def _steps(part: Any) -> Iterable[tuple[Any, Any]]:
    """Return what leads into a part, and where to."""
    if isinstance(part, (list, tuple)):
        return enumerate(part)
    return [*(part if isinstance(part, Mapping) else getattr(part, "__dict__", {})).items()]


def say_places(batch: Any, most: int = 8) -> str:
    """Return where a batch has tensors, as the end of a sentence; nothing where none are found.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part].
        most: How many to name at most.

    Example:
        >>> say_places([(Tensor(8, 3, 4, 4), Tensor(8))])
        ': the batch has tensors at (0, 0) of shape (8, 3, 4, 4), (0, 1) of shape (8,)'
    """
    dense = ((place, one) for place, one in places_of_tensors(batch) if place != () and not one.is_nested)
    places = [(place, tuple(one.shape)) for place, one in islice(dense, most + 1)]
    said = ", ".join(f"{place!r} of shape {shape}" for place, shape in places[:most])
    return said and f": the batch has tensors at {said}{', …' * (len(places) > most)}"


def seems_channels_last(shape: Sequence[int]) -> bool:
    """Tell whether images of a shape seem to lie as ``(..., H, W, C)`` and not as ``(..., C, H, W)``.

    Args:
        shape: ``(N, ...)``. Channels are 1, 3 or 4 behind two larger sides, the one at most four times the other.

    Example:
        >>> [seems_channels_last(shape) for shape in [(8, 32, 48, 3), (8, 3, 32, 48), (8, 3, 4, 4), (8, 512, 8, 4)]]
        [True, False, False, False]
    """
    if len(shape) < 3 or shape[-1] not in (1, 3, 4):
        return False
    shorter, longer = sorted(shape[-3:-1])
    return shorter > 4 and longer <= 4 * shorter


def left_behind(
    batch: Any, moved: Sequence[Any], sides: Collection[Any], branches: Iterable[Path] = ((),)
) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """Return what goes with the pixels of moved images and stays behind, by places: maps of their size, and points.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part].
        moved: The parts that are moved.
        sides: Height and width of the images; more than one pair where they may differ.
        branches: The paths to where to look.

    Returns:
        Tensors of three dimensions or more with such sides, and boxes or points, by their names or types.

    Example:
        >>> batch = {"image": Tensor(8, 3, 16, 16), "mask": Tensor(8, 16, 16), "boxes": Tensor(8, 2, 4), "y": Tensor(8)}
        >>> [[*found] for found in left_behind(batch, [batch["image"]], [(16, 16)])]
        [['mask'], ['boxes']]
    """
    near = [found for branch in branches for found in places_of_tensors(get_part(batch, branch), branch)]
    rest = [(place, one) for place, one in near if not (one.is_nested or any(one is part for part in moved))]
    maps = {place: one for place, one in rest if one.ndim > 2 and tuple(one.shape[-2:]) in sides}
    return maps, {place: one for place, one in rest if one.ndim > 1 and one.shape[-1] < 6 and _are_points(place, one)}


def _are_points(place: Place, part: Tensor) -> bool:
    names = str(path_of(place)[-1:]), type(part).__name__
    return any(re.search(r"(box(es)?|key_?points?|landmarks?)\W*$", name, re.IGNORECASE) for name in names)


def is_map_of(images: Sequence[int], shape: Sequence[int]) -> bool:
    """Tell whether what has a shape may be a map of images, of their size or another with the same proportions.

    Args:
        images: The images' shape, ``(N, ..., H, W)``.
        shape: ``(N, ..., h, w)``.

    Example:
        >>> [is_map_of((8, 3, 32, 48), shape) for shape in [(8, 32, 48), (8, 5, 8, 12), (8, 5, 10)]]
        [True, True, False]
    """
    (height, width), (rows, columns) = images[-2:], shape[-2:]
    return abs(rows * width - columns * height) < max(height, width)  # within a pixel


def is_sequence_of(inputs: Sequence[int], shape: Sequence[int]) -> bool:
    """Tell whether a shape is that of a value for each place of sequences, as of the tokens of spectrograms.

    Args:
        inputs: Shape of the sequences, ``(N, T, F)`` or ``(N, F, T)``.
        shape: Of what may be ``(N, T)``.

    Example:
        >>> is_sequence_of((8, 50, 3), (8, 50)), is_sequence_of((8, 50, 3), (8,)), is_sequence_of((8, 3, 9, 9), (8, 9))
        (True, False, False)
    """
    return len(inputs) == 3 and len(shape) == 2 and shape[1] in inputs[1:]


def replace_part(batch: Any, place: Place, value: Any) -> Any:
    """Return a shallow copy of a batch with one part replaced; the batch itself is left alone.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part].
        place: An index, a key or an attribute name, or a tuple of these: a path.
        value: The new part.

    Returns:
        A container of the same type, which hands out the new part in every way in which it handed out the old one; of
        a nested batch, each container on the path is copied.

    Raises:
        LookupError: If the batch has no such part.
        ValueError: If there is no such copy of a container; the message says why, and the way out.

    Example:
        >>> replace_part((1, 2), 1, "b")
        (1, 'b')
        >>> replace_part({"views": [1, 2]}, ("views", 0), "a")
        {'views': ['a', 2]}
    """
    path = path_of(place)
    get_part(batch, path)
    if not path:
        return value
    step, old = path[0], get_part(batch, path[0])
    value = replace_part(old, path[1:], value)
    if type(batch) in (list, tuple, dict):  # as most are: quickly
        parts: Any = dict(batch) if type(batch) is dict else list(batch)
        parts[step] = value
        return tuple(parts) if type(batch) is tuple else parts
    try:
        return _copy_with(batch, step, old, value)
    except Exception as error:
        raise ValueError(
            f"Expected a container of which a copy takes another part {step!r}, but got {type(batch).__name__} "
            f"({error}). Let `collate_fn` or `on_after_batch_transfer` make a dict, list, tuple or dataclass of it."
        ) from error


def _copy_with(batch: Any, step: int | str, old: Any, value: Any) -> Any:
    """Return a copy with the part put into it, which the batch itself must not notice."""
    ways = [way for way in (getattr, getitem) if _hands_out(batch, step, old, [way])]
    changed = _twin(batch, step, value)
    _put(changed, step, value, ways)
    _put(batch, step, old, ways)
    if not ways or not _hands_out(changed, step, value, ways):
        raise TypeError("it does not hand out what it was given, or its copy shares its parts with it")
    return changed


def _hands_out(batch: Any, step: int | str, part: Any, ways: Sequence[Any]) -> bool:
    try:
        return all(way(batch, step) is part for way in ways)
    except Exception:
        return False


def _put(batch: Any, step: int | str, part: Any, ways: Sequence[Any]) -> None:
    """Write a part in one way after another, until it is handed out in all of them."""
    writes: tuple[Any, ...] = setitem, setattr, object.__setattr__  # the last for frozen dataclasses
    for write in writes:
        if not _hands_out(batch, step, part, ways):
            with suppress(Exception):
                write(batch, step, part)


def _twin(batch: Any, step: int | str, value: Any) -> Any:
    """Return a copy; a tuple's has the part already."""
    if isinstance(batch, tuple):
        parts = list(batch)
        parts[step if isinstance(step, int) else batch._fields.index(step)] = value  # type: ignore[attr-defined]
        twin = tuple.__new__(type(batch), parts)  # its own may take something else
        getattr(twin, "__dict__", {}).update(getattr(batch, "__dict__", {}))
        return twin
    twin = copy.copy(batch)
    for name in [*getattr(twin, "__dict__", ())]:
        if isinstance(getattr(type(batch), name, None), cached_property):
            del vars(twin)[name]  # made of the old part
    return twin


def _describe(part: Any) -> str:
    kind = f"of type {type(part).__name__}"
    if isinstance(part, Mapping):
        return f"{kind} with the keys {list(part)}"
    if isinstance(part, (list, tuple)):
        fields = getattr(part, "_fields", None)
        return f"{kind} with {len(part)} parts" + (f" named {list(fields)}" if fields else "")
    names = [name for name in getattr(part, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {names}" if names else kind
