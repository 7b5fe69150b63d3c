"""Schedules as pure functions: a step in, a value out.

Sources: Goyal et al., arXiv:1706.02677 (warm-up); Smith & Topin, arXiv:1708.07120 and Smith, arXiv:1803.09820
(one-cycle); Smith, arXiv:1506.01186 (cyclic); Loshchilov & Hutter, arXiv:1608.03983 (cosine, restarts); Jeddi et al.,
arXiv:2012.13628 (slow start, fast decay).
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeVar, get_args

from lightning_speedups.core.arguments import check_choice, check_number

Anneal = Literal["cos", "linear"]
Shape = Callable[[float], float]
Point = tuple[float, float]
"""A learning rate, and the momentum that goes with it."""
Value = TypeVar("Value")


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """Go linearly from one value to another, then stay.

    ``start + (end - start) * step / steps`` for ``step < steps``, else ``end``.

    Args:
        step: Optimizer steps done so far, 0 or more.
        steps: Length of the ramp in optimizer steps; 0 means no ramp at all.
        start: Value at step 0.
        end: Value from step ``steps`` on.

    Example:
        >>> [ramp(t, 4, 1.0, 3.0) for t in (0, 1, 4, 9)]
        [1.0, 1.5, 3.0, 3.0]
    """
    return end if step >= steps else start + (end - start) * step / steps


def anneal_between(start: float, end: float, progress: float, shape: Anneal) -> float:
    """Go from ``start`` to ``end`` along half a cosine or a straight line.

    Args:
        start: Value at progress 0.
        end: Value at progress 1.
        progress: Position in [0, 1].
        shape: ``"cos"``: ``end + (start - end) / 2 * (1 + cos(pi * progress))``; ``"linear"``: straight.

    Example:
        >>> anneal_between(2.0, 0.0, 0.5, "cos"), anneal_between(2.0, 0.0, 0.25, "linear")
        (1.0, 1.5)
    """
    if shape == "linear":
        return start + (end - start) * progress
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))


def triangle(position: float, up: float, down: float) -> tuple[float, int]:
    """Go up and down between 0 and 1, again and again.

    With ``x = position / (up + down)``, less its whole part: ``x (up + down) / up`` while it rises, then
    ``(1 - x) (up + down) / down``.

    Args:
        position: Steps since the start, 0 or more.
        up: Length of the rise in steps, above 0.
        down: Length of the fall in steps, above 0.

    Returns:
        The height in [0, 1], and how many cycles have ended.

    Example:
        >>> [triangle(t, 2, 4) for t in (0, 1, 2, 4, 6)]
        [(0.0, 0), (0.5, 0), (1.0, 0), (0.5, 0), (0.0, 1)]
    """
    cycle = math.floor(position / (up + down))
    place = max(0.0, position - cycle * (up + down))
    return (place / up if place <= up else max(0.0, (up + down - place) / down)), cycle


# Shapes: progress in [0, 1] → a factor, 1 at the peak.


def constant(progress: float) -> float:
    """Stay at 1.

    Args:
        progress: Position in [0, 1].

    Example:
        >>> constant(0.3)
        1.0
    """
    return 1.0


def linear(progress: float, end: float = 0.0) -> float:
    """Fall in a straight line: ``1 + (end - 1) * progress``.

    Args:
        progress: Position in [0, 1].
        end: Factor at the end, 0 or more.

    Example:
        >>> linear(0.25)
        0.75
    """
    return anneal_between(1.0, end, progress, "linear")


def cosine(progress: float, end: float = 0.0) -> float:
    """Fall along half a cosine: ``end + (1 - end) / 2 * (1 + cos(pi * progress))`` (arXiv:1608.03983).

    Args:
        progress: Position in [0, 1].
        end: Factor at the end, 0 or more.

    Example:
        >>> cosine(0.5)
        0.5
    """
    return anneal_between(1.0, end, progress, "cos")


def polynomial(progress: float, end: float = 0.0, power: float = 2.0) -> float:
    """Fall with a power: ``end + (1 - end) * (1 - progress) ** power``.

    Args:
        progress: Position in [0, 1].
        end: Factor at the end, 0 or more.
        power: Above 0.

    Example:
        >>> polynomial(0.5)
        0.25
    """
    return end + (1.0 - end) * math.pow(1.0 - progress, power)


def exponential(progress: float, end: float = 0.01) -> float:
    """Fall by the same share in each step: ``end ** progress``.

    Args:
        progress: Position in [0, 1].
        end: Factor at the end, above 0.

    Example:
        >>> round(exponential(0.5), 3)
        0.1
    """
    return math.exp(progress * math.log(end))


def staircase(progress: float, milestones: Sequence[float] = (1 / 3, 2 / 3), gamma: float = 0.1) -> float:
    """Fall by a factor at each milestone: ``gamma ** (milestones passed)``.

    Args:
        progress: Position in [0, 1].
        milestones: Rising positions in [0, 1].
        gamma: Above 0.

    Example:
        >>> [staircase(p, (0.5, 0.75), 0.5) for p in (0.4, 0.5, 0.9)]
        [1.0, 0.5, 0.25]
    """
    return float(gamma ** bisect_right(milestones, progress))


def slow_start_fast_decay(progress: float, end: float = 0.01, start: float = 0.1, rise: float = 0.5) -> float:
    """Rise slowly, then fall fast: the form of Jeddi et al. (arXiv:2012.13628) for finetuning a trained network.

    ``start + (1 - start) * (progress / rise) ** 2`` while ``progress < rise``, then ``end ** ((progress - rise) / (1 -
    rise))``. The paper gives the form; the numbers are ours.

    Args:
        progress: Position in [0, 1].
        end: Factor at the end, above 0.
        start: Factor at the start, 0 or more.
        rise: Where the peak stands, in [0, 1).

    Example:
        >>> [round(slow_start_fast_decay(p), 3) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.1, 0.325, 1.0, 0.1, 0.01]
    """
    if progress < rise:
        return start + (1.0 - start) * (progress / rise) ** 2
    return exponential((progress - rise) / (1.0 - rise), end)


def cosine_restarts(progress: float, end: float = 0.0, cycles: int = 4, growth: float = 1.0) -> float:
    """Fall along a cosine and begin anew, ``cycles`` times (SGDR, arXiv:1608.03983).

    Args:
        progress: Position in [0, 1].
        end: Factor at the end of each cycle, 0 or more.
        cycles: How many, 1 or more.
        growth: Length of each cycle over the one before, above 0.

    Example:
        >>> [round(cosine_restarts(p, cycles=2), 3) for p in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 1.0, 0.0]
    """
    ends = list(accumulate(growth**i for i in range(cycles)))
    bounds = [0.0, *(reached / ends[-1] for reached in ends)]
    cycle = min(bisect_right(bounds, progress), cycles) - 1
    return cosine((progress - bounds[cycle]) / (bounds[cycle + 1] - bounds[cycle]), end)


def join(position: float, pieces: Sequence[tuple[float, Callable[[float], Value]]]) -> Value:
    """Lay shapes end to end; each sees its own progress, and past the last one the curve stays at its end.

    Args:
        position: 0 or more, in the unit of the lengths.
        pieces: Length and shape of each; at least one. One of length 0 is passed over; below 0 it only lets the next
            one begin so much earlier.

    Example:
        >>> up_and_down = [(2, lambda p: p), (4, linear)]
        >>> [join(t, up_and_down) for t in (0, 1, 2, 4, 6, 99)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    begin = 0.0
    for length, shape in pieces:
        if position < begin + length:
            return shape(min(1.0, (position - begin) / length))
        begin += length
    return shape(1.0)


def with_ends(
    shape: Shape, length: float, warmup: float, warmup_start: float, cooldown: float, cooldown_end: float
) -> list[tuple[float, Shape]]:
    """Give a shape a linear warm-up to where it begins, and a linear cooldown from where it ends.

    Args:
        shape: The main part.
        length: Of the whole, in steps or in any other unit.
        warmup: Length of the warm-up in the same unit, 0 or more.
        warmup_start: Factor at its start.
        cooldown: Length of the cooldown in the same unit, 0 or more; with the warm-up at most the whole.
        cooldown_end: Factor at its end.

    Returns:
        Pieces for `join`.

    Example:
        >>> pieces = with_ends(constant, 10, 2, 0.5, 4, 0.0)
        >>> [join(t, pieces) for t in (0, 1, 2, 6, 8, 10)]
        [0.5, 0.75, 1.0, 1.0, 0.5, 0.0]
    """
    first, last = shape(0.0), shape(1.0)
    pieces: list[tuple[float, Shape]] = [
        (warmup, lambda p: anneal_between(warmup_start, first, p, "linear")),
        (length - warmup - cooldown, shape),
        (cooldown, lambda p: anneal_between(last, cooldown_end, p, "linear")),
    ]
    return [(piece, part) for piece, part in pieces if piece > 0]


@dataclass(frozen=True)
class OneCycle:
    """The one-cycle policy: the rate goes low → high → far below low, momentum high → low → high; checked when made.

    Two phases end at ``pct_start * total_steps - 1`` and ``total_steps - 1``: the rate rises from ``max_lr /
    div_factor`` to ``max_lr``, then falls to ``max_lr / div_factor / final_div_factor``; momentum falls and rises
    inversely. With ``three_phase`` the rate first returns to where it began, as long as it rose, and then falls to the
    end.

    Attributes:
        pct_start: Fraction of the cycle in which the rate rises, in (0, 1); at most 0.5 with ``three_phase``.
        anneal: Shape of each phase, ``"cos"`` or ``"linear"``.
        div_factor: ``max_lr`` over the first rate, above 0.
        final_div_factor: First rate over the last one, above 0.
        base_momentum: Momentum at the peak of the rate, in [0, 1).
        max_momentum: Momentum at both ends, in [0, 1).
        three_phase: Three phases instead of two.

    Raises:
        ValueError: If an argument is out of range.
    """

    pct_start: float = 0.3
    anneal: Anneal = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    three_phase: bool = False

    def __post_init__(self) -> None:
        most = 0.5 if self.three_phase else 1
        check_number("pct_start", self.pct_start, 0, most, above=True, below=not self.three_phase)
        check_choice("anneal", self.anneal, get_args(Anneal))
        check_number("div_factor", self.div_factor, 0, above=True)
        check_number("final_div_factor", self.final_div_factor, 0, above=True)
        check_number("base_momentum", self.base_momentum, 0, 1, below=True)
        check_number("max_momentum", self.max_momentum, 0, 1, below=True)

    def at(self, step: float, total_steps: int, max_lr: float) -> tuple[float, float]:
        """Return learning rate and momentum at one step.

        Args:
            step: Optimizer steps done so far; past the last one the curve stays at its end.
            total_steps: Length of the whole cycle in optimizer steps, 1 or more.
            max_lr: The peak.

        Example:
            >>> [round(OneCycle().at(t, 10, max_lr=0.5)[0], 6) for t in (0, 2, 9)]
            [0.02, 0.5, 2e-06]
            >>> OneCycle().at(99, 10, max_lr=0.5) == OneCycle().at(9, 10, max_lr=0.5)
            True
        """
        first, last = max_lr / self.div_factor, total_steps - 1
        start, peak = (first, self.max_momentum), (max_lr, self.base_momentum)
        end = (first / self.final_div_factor, self.max_momentum)
        rise = self.pct_start * total_steps - 1
        pieces = [(rise, partial(self._between, start, peak)), (last - rise, partial(self._between, peak, end))]
        if self.three_phase:
            back = (rise, partial(self._between, peak, start))
            pieces = [pieces[0], back, (last - 2 * rise, partial(self._between, start, end))]
        return join(min(step, last), pieces)

    def _between(self, one: Point, other: Point, progress: float) -> Point:
        """Go from one rate and momentum to another."""
        (rate, momentum), (next_rate, next_momentum) = one, other
        return (
            anneal_between(rate, next_rate, progress, self.anneal),
            anneal_between(momentum, next_momentum, progress, self.anneal),
        )


@dataclass(frozen=True)
class Course:
    """How a run's steps go along a curve: evenly, from where the curve stood when this length was settled.

    Attributes:
        length: Where the curve ends, in its own steps.
        total: Step of the run at which it ends.
        since: Step from which this holds.
        start: Position on the curve at that step.
    """

    length: float
    total: int
    since: int = 0
    start: float = 0.0

    def position(self, step: int) -> float:
        """Return the position on the curve at a step of the run.

        Example:
            >>> [Course(10, 10).position(t) for t in (0, 7, 12)]
            [0.0, 7.0, 10]
        """
        if step >= self.total:
            return self.length
        return self.start + (step - self.since) * (self.length - self.start) / (self.total - self.since)

    def extended(self, step: int, total: int) -> Course:
        """Return the course that goes on from a step without a jump, and ends at another total.

        Example:
            >>> longer = Course(10, 10).extended(5, total=15)
            >>> [longer.position(t) for t in (5, 10, 15)]
            [5.0, 7.5, 10]
        """
        return Course(self.length, total, step, self.position(step))


def _value_at(shape: Shape, step: int) -> float:
    with suppress(Exception):
        return float(shape(step))
    return math.nan  # of a function that is only defined up to the end of the run


def is_cut_off(scheduler: Any, steps: int, told: int) -> bool:
    """Tell whether a run has too few steps for a scheduler of torch's, where one of another length would have enough.

    Args:
        scheduler: A scheduler; where it ends, its whole numbers tell, or the function that it goes by.
        steps: How often it will be stepped.
        told: How often the longer run would step it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        >>> is_cut_off(cosine, 130, told=200), is_cut_off(cosine, 200, told=300)
        (True, False)
    """
    for shape in getattr(scheduler, "lr_lambdas", ()) if steps < told else ():
        now, end, later = (_value_at(shape, step) for step in (steps, told - 1, 2 * told - steps))
        if now != end and not math.isnan(end) and not 0 < later < end:  # what falls on and on has no end
            return True
    begins = [0, *getattr(scheduler, "_milestones", ())]  # of parts that come one after the other
    parts = getattr(scheduler, "_schedulers", ())[-1 if begins[1:] else 0 :]
    numbers = [value for value in vars(scheduler).values() if isinstance(value, int)]
    ends = [begins[-1], *getattr(scheduler, "milestones", ()), *numbers]
    return any(steps < end <= told for end in ends) or any(
        is_cut_off(part, steps - begins[-1], told - begins[-1]) for part in parts
    )


SHAPES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": linear,
    "step": staircase,
    "polynomial": polynomial,
    "exponential": exponential,
    "trapezoid": constant,
    "slow_start_fast_decay": slow_start_fast_decay,
    "cosine_restarts": cosine_restarts,
}


def pick_shape(shape: str | Shape, options: Mapping[str, Any]) -> Shape:
    """Return a function of progress for a name and its options, or a user's own.

    Args:
        shape: Name of a shape, or a function of progress in [0, 1].
        options: Arguments of the named shape.

    Raises:
        ValueError: If there is no such shape or option, or if its factors are not finite and 0 or more.

    Example:
        >>> pick_shape("polynomial", {"power": 1.0})(0.25)
        0.75
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"Expected `options` to be a dict of a named shape's arguments, but got {options!r}.")
    if callable(shape) and options:
        raise ValueError(f"Expected no `options` or `end_factor` for your own `shape`, but got {dict(options)}.")
    picked = shape if callable(shape) else _named_shape(shape, options)
    for progress in (place / 100 for place in range(101)):
        try:
            check_number("factor", picked(progress), 0)
        except (ArithmeticError, TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"Expected `shape` {shape!r} with {dict(options)} to give finite factors of 0 or more, but at progress "
                f"{progress}: {error}"
            ) from error
    return picked


def _named_shape(name: Any, options: Mapping[str, Any]) -> Shape:
    if not (isinstance(name, str) and name in SHAPES):
        raise ValueError(f"Expected `shape` to be a function or one of {', '.join(SHAPES)}, but got {name!r}.")
    known = list(inspect.signature(SHAPES[name]).parameters)[1:]
    if unknown := set(options) - set(known):
        raise ValueError(f"Expected options of shape {name!r} to be of {known}, but got {sorted(unknown)}.")
    for option, value in options.items():
        _check_option(option, value)
    return partial(SHAPES[name], **options)


def _check_option(option: str, value: Any) -> None:
    """Refuse an argument of a named shape that is out of its range."""
    name = f"options[{option!r}]"
    if option in ("power", "gamma", "growth"):
        check_number(name, value, 0, above=True)
    elif option == "cycles":
        check_number(name, value, 1, whole=True)
    elif option == "rise":
        check_number(name, value, 0, 1, below=True)
    elif option == "milestones" and (
        not isinstance(value, Iterable) or list(value) != sorted({one for one in value if 0 <= one <= 1})
    ):
        raise ValueError(f"Expected `{name}` to be rising fractions of the shape, each in [0, 1], but got {value!r}.")
