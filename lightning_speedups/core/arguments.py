"""One way to check a number or a word that a user gives: the error names the argument, the rule and the value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Return Python's own number for numpy's and torch's, in lists, tuples and dicts too; anything else as it is.

    Checkpoints are read as data, and numpy's numbers need code to be read.

    Example:
        >>> import torch
        >>> plain(torch.tensor(3)), plain({"rates": [torch.tensor(0.5), 2]}), plain(torch.tensor([1.0]))
        (3, {'rates': [0.5, 2]}, tensor([1.]))
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if type(value) is dict:
        return {plain(key): plain(one) for key, one in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def with_plain_numbers(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that is handed Python's own numbers, whatever kind was given."""

    @functools.wraps(init)
    def handed_plain(self: Any, *given: Any, **named: Any) -> None:
        init(self, *plain(given), **plain(named))

    return handed_plain


def make_plain(settings: Any) -> None:
    """Make the numbers in a frozen dataclass Python's own; for its ``__post_init__``."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """Refuse what is not a finite number in a range, and return it as Python's own number.

    Args:
        name: The argument's name.
        value: What was given.
        low: Lowest allowed value.
        high: Highest allowed value.
        above: Whether ``low`` itself is forbidden.
        below: Whether ``high`` itself is forbidden.
        whole: Whether it must be a whole number.
        optional: Whether None is allowed.

    Returns:
        The number, also of numpy or a tensor without dimensions, as an int or a float.

    Raises:
        ValueError: If the value breaks the rule.

    Example:
        >>> check_number("smoothing", 1.5, 0, 1, below=True)
        Traceback (most recent call last):
        ValueError: Expected `smoothing` to be a number in [0, 1), but got 1.5.
    """
    given, value = value, plain(value)
    if value is None and optional:
        return None
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool | complex)
    if (
        is_number
        and math.isfinite(value)
        and low <= value <= high
        and not (above and value == low)
        and not (below and value == high)
    ):
        return value
    kind = "a whole number" if whole else "a number"
    if math.isfinite(high):
        rule = f"{kind} in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    else:
        rule = f"{kind} above {low:g}" if above else f"{kind} of {low:g} or more"
    raise ValueError(f"Expected `{name}` to be {rule}{', or None' if optional else ''}, but got {given!r}.")


def check_choice(name: str, value: Any, choices: Collection[Any], *, optional: bool = False) -> None:
    """Refuse what is none of the choices.

    Args:
        name: The argument's name.
        value: What was given.
        choices: What is allowed, one or more.
        optional: Whether None is allowed.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> check_choice("order", "upwards", ["up", "down"])
        Traceback (most recent call last):
        ValueError: Expected `order` to be 'up' or 'down', but got 'upwards'.
    """
    if value in choices or (value is None and optional):
        return
    *first, last = map(repr, choices)
    rule = f"{', '.join(first)}{' or ' if first else ''}{last}{', or None' if optional else ''}"
    raise ValueError(f"Expected `{name}` to be {rule}, but got {value!r}.")
