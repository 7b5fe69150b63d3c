"""One way to check a number or a word that a user gives: the error names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


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
) -> None:
    """Refuse what is not a finite number in a range.

    Args:
        name: The argument's name.
        value: What was given.
        low: Lowest allowed value.
        high: Highest allowed value.
        above: Whether ``low`` itself is forbidden.
        below: Whether ``high`` itself is forbidden.
        whole: Whether it must be a whole number.
        optional: Whether None is allowed.

    Raises:
        ValueError: If the value breaks the rule.

    Example:
        >>> check_number("smoothing", 1.5, 0, 1, below=True)
        Traceback (most recent call last):
        ValueError: Expected `smoothing` to be a number in [0, 1), but got 1.5.
    """
    if value is None and optional:
        return
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool | complex)
    if (
        is_number
        and math.isfinite(value)
        and low <= value <= high
        and not (above and value == low)
        and not (below and value == high)
    ):
        return
    kind = "a whole number" if whole else "a number"
    if math.isfinite(high):
        rule = f"{kind} in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    else:
        rule = f"{kind} above {low:g}" if above else f"{kind} of {low:g} or more"
    raise ValueError(f"Expected `{name}` to be {rule}{', or None' if optional else ''}, but got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[Any], *, optional: bool = False) -> None:
    """Refuse what is none of the choices.

    Args:
        name: The argument's name.
        value: What was given.
        choices: What is allowed, two or more.
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
    rule = f"{', '.join(first)} or {last}{', or None' if optional else ''}"
    raise ValueError(f"Expected `{name}` to be {rule}, but got {value!r}.")
