"""Schedules as pure functions: a step in, a value out.

Sources: Goyal et al., arXiv:1706.02677 (warm-up); Smith & Topin, arXiv:1708.07120 and Smith, arXiv:1803.09820
(one-cycle).
"""

from __future__ import annotations

import math
from typing import Literal

Anneal = Literal["cos", "linear"]


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


def one_cycle(
    step: int,
    total_steps: int,
    *,
    max_lr: float = 1.0,
    pct_start: float = 0.3,
    anneal: Anneal = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    three_phase: bool = False,
) -> tuple[float, float]:
    """Compute learning rate and momentum of the one-cycle policy at one step.

    Two phases end at ``pct_start * total_steps - 1`` and ``total_steps - 1``: the rate rises from ``max_lr /
    div_factor`` to ``max_lr``, then falls to ``max_lr / div_factor / final_div_factor``; momentum falls and rises
    inversely. With ``three_phase`` the rate first returns to where it began, as long as it rose, and then falls to the
    end.

    Args:
        step: Optimizer steps done so far; past the last one the curve stays at its end.
        total_steps: Length of the whole cycle in optimizer steps, 1 or more.
        max_lr: The peak.
        pct_start: Fraction of the cycle in which the rate rises, in (0, 1).
        anneal: Shape of each phase.
        div_factor: ``max_lr`` over the first rate.
        final_div_factor: First rate over the last one.
        base_momentum: Momentum at the peak of the rate.
        max_momentum: Momentum at both ends.
        three_phase: Three phases instead of two.

    Returns:
        Learning rate and momentum.

    Example:
        >>> [round(one_cycle(t, 10, max_lr=0.5)[0], 6) for t in (0, 2, 9)]
        [0.02, 0.5, 2e-06]
        >>> one_cycle(99, 10, max_lr=0.5) == one_cycle(9, 10, max_lr=0.5)
        True
    """
    first = max_lr / div_factor
    high, low = (max_lr, base_momentum), (first / final_div_factor, max_momentum)
    corners = [(first, max_momentum), high, *([(first, max_momentum)] if three_phase else []), low]
    rise = pct_start * total_steps
    ends = [rise - 1, *([2 * rise - 2] if three_phase else []), total_steps - 1.0]

    step = min(step, total_steps - 1)
    phase = next(i for i, end in enumerate(ends) if step <= end or end == ends[-1])
    begin, end = ([0.0, *ends])[phase : phase + 2]
    # A phase without length has nothing to interpolate: it stands at its end.
    progress = (step - begin) / (end - begin) if end > begin else 1.0
    (lr, momentum), (next_lr, next_momentum) = corners[phase : phase + 2]
    return (
        anneal_between(lr, next_lr, progress, anneal),
        anneal_between(momentum, next_momentum, progress, anneal),
    )
