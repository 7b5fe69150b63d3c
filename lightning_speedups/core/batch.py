"""Reading and replacing one part of a batch, whatever container the batch is, without writing into it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Place = int | str
"""Where a part stands in a batch: an index (list, tuple), a key (mapping) or an attribute (any object)."""


def get_part(batch: Any, place: Place) -> Any:
    """Return the part of a batch at a place.

    Args:
        batch: A list, tuple, named tuple, mapping, dataclass or other object.
        place: An index, a key or an attribute name.

    Raises:
        LookupError: If the batch has no such part; the message says what it has.

    Example:
        >>> get_part({"image": 1, "label": 2}, "label")
        2
        >>> get_part((1, 2), 0)
        1
    """
    try:
        if isinstance(batch, Mapping) or (isinstance(batch, (list, tuple)) and isinstance(place, int)):
            return batch[place]  # type: ignore[index]
        if isinstance(place, str):
            return getattr(batch, place)
    except (LookupError, AttributeError):
        pass
    raise LookupError(f"no part {place!r} in {_describe(batch)}")


def count_samples(batch: Any) -> int | None:
    """Return the number of samples in a batch: the length of the first tensor found in it; None without a tensor.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part], nested as it may be.

    Example:
        >>> count_samples({"id": "a", "images": [Tensor(8, 3, 4, 4)]})
        8
    """
    return _count(batch, set())


def _count(part: Any, around: set[int]) -> int | None:
    if isinstance(part, Tensor):
        return len(part) if part.ndim else 1
    if id(part) in around:  # an object that holds itself
        return None
    if isinstance(part, (list, tuple)):
        parts: Iterable[Any] = part
    else:
        parts = (part if isinstance(part, Mapping) else getattr(part, "__dict__", {})).values()
    inside = around | {id(part)}
    return next((count for inner in parts if (count := _count(inner, inside)) is not None), None)


def replace_part(batch: Any, place: Place, value: Any) -> Any:
    """Return a shallow copy of a batch with one part replaced; the batch itself is left alone.

    Args:
        batch: As in [get_part][lightning_speedups.core.batch.get_part].
        place: An index, a key or an attribute name.
        value: The new part.

    Returns:
        A container of the same type.

    Example:
        >>> replace_part((1, 2), 1, "b")
        (1, 'b')
    """
    get_part(batch, place)
    if isinstance(batch, tuple) and isinstance(place, int):
        parts = [*batch]
        parts[place] = value
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if hasattr(batch, "_fields"):
        return batch._replace(**{str(place): value})
    changed = copy.copy(batch)
    if isinstance(changed, (MutableMapping, list)):
        changed[place] = value  # type: ignore[index]
    else:
        object.__setattr__(changed, str(place), value)  # a frozen dataclass refuses setattr
    return changed


def _describe(batch: Any) -> str:
    kind = f"a batch of type {type(batch).__name__}"
    if isinstance(batch, Mapping):
        return f"{kind} with the keys {list(batch)}"
    if isinstance(batch, (list, tuple)):
        fields = getattr(batch, "_fields", None)
        return f"{kind} with {len(batch)} parts" + (f" named {list(fields)}" if fields else "")
    names = [name for name in getattr(batch, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {names}" if names else kind
