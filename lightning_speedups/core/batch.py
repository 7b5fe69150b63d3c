"""Reading and replacing one part of a batch, whatever container the batch is, without writing into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Place = int | str | tuple[int | str, ...]
"""Where a part stands in a batch: an index (list, tuple), a key (mapping) or an attribute (any object); a tuple of them
is a path into a nested batch."""


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


def path_of(place: Place) -> tuple[int | str, ...]:
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
    if isinstance(loaders, (list, tuple)):
        loaders, batch = dict(enumerate(loaders)), dict(enumerate(batch))
    if not isinstance(loaders, Mapping):
        return count_samples(batch)
    given = [(loader, batch[key]) for key, loader in loaders.items() if batch[key] is not None]
    counts = [count_by_loader(loader, part) for loader, part in given]
    return None if None in counts else sum(count for count in counts if count)


def tensors_in(part: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors in something, nested as they may be, in objects' attributes too.

    Args:
        part: Where to look.
        seen: Of what it is not to look into: the ids.

    Example:
        >>> class Batch: ...
        >>> batch = Batch()
        >>> batch.images, batch.more = Tensor([1, 1]), {"labels": [Tensor([0]), "none"], "batch": batch}
        >>> list(tensors_in([batch]))
        [tensor([1., 1.]), tensor([0.])]
    """
    seen = set() if seen is None else seen
    if isinstance(part, Tensor):
        yield part
    elif id(part) not in seen:
        seen.add(id(part))
        several = part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
        for inner in part if isinstance(part, (list, tuple)) else [*several.values()]:
            yield from tensors_in(inner, seen)


def replace_part(batch: Any, place: Place, value: Any) -> Any:
    """Return a shallow copy of a batch with one part replaced; the batch itself is left alone.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part].
        place: An index, a key or an attribute name, or a tuple of these: a path.
        value: The new part.

    Returns:
        A container of the same type; of a nested one, each container on the path is copied.

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
    step, rest = path[0], path[1:]
    value = replace_part(get_part(batch, step), rest, value)
    if hasattr(batch, "_fields"):
        return batch._replace(**{step if isinstance(step, str) else batch._fields[step]: value})
    if isinstance(batch, tuple) and isinstance(step, int):
        return type(batch)(replace_part(list(batch), step, value))
    changed = copy.copy(batch)
    if isinstance(changed, (MutableMapping, list)):
        changed[step] = value  # type: ignore[index]
    else:
        object.__setattr__(changed, str(step), value)  # a frozen dataclass refuses setattr
    return changed


def _describe(part: Any) -> str:
    kind = f"of type {type(part).__name__}"
    if isinstance(part, Mapping):
        return f"{kind} with the keys {list(part)}"
    if isinstance(part, (list, tuple)):
        fields = getattr(part, "_fields", None)
        return f"{kind} with {len(part)} parts" + (f" named {list(fields)}" if fields else "")
    names = [name for name in getattr(part, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {names}" if names else kind
