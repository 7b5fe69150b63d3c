"""The learning-rate range test as arithmetic: the rates of the sweep, its smoothed loss, and the rate to suggest.

Sources: Smith, arXiv:1506.01186 (the test); fastai's ``lr_find`` (smoothing, when to stop, and the valley).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, variance
from typing import Literal, get_args

import torch

from lightning_speedups.core.arguments import check_choice, check_number, make_plain

Method = Literal["minimum", "valley", "steepest"]

FEWEST_POINTS = 10
LAST_POINTS = 5  # where the loss blows up
# Measured in benchmarks/peak_rules.py:
MARGIN = 5  # how many times below the rate of the lowest loss the peak lies
LEAST_OF_OWN, MOST_OF_OWN = 2, 10  # times the module's own rate; a cycle's mean rate is half its peak
PLACEHOLDER = 1e4  # how many times below the rate of the lowest loss an own rate means nothing
NOISE = 3.3  # standard errors by which the loss must fall


@dataclass(frozen=True)
class Sweep:
    """What a range test does, and how its result is read; checked when it is made.

    Attributes:
        min_lr: Rate of the first step, above 0.
        max_lr: Rate of the last step, above ``min_lr``.
        steps: Length of the sweep in optimizer steps, 10 or more.
        method: ``"minimum"``, ``"valley"`` or ``"steepest"``, as in `suggest`.
        beta: Weight of the past in the smoothed loss, in [0, 1).
        stop_factor: The sweep ends early when the smoothed loss is above this many times its best, above 1.
    """

    min_lr: float = 1e-6
    max_lr: float = 10.0
    steps: int = 100
    method: Method = "minimum"
    beta: float = 0.98
    stop_factor: float = 4.0

    def __post_init__(self) -> None:
        make_plain(self)
        check_number("min_lr", self.min_lr, 0, above=True)
        check_number("max_lr", self.max_lr, 0, above=True)
        if self.max_lr <= self.min_lr:
            raise ValueError(f"Expected `max_lr` to be above `min_lr`, which is {self.min_lr}, but got {self.max_lr}.")
        check_number("steps", self.steps, 10, whole=True)
        check_choice("method", self.method, get_args(Method))
        check_number("beta", self.beta, 0, 1, below=True)
        check_number("stop_factor", self.stop_factor, 1, above=True)

    def read(
        self, rates: Sequence[float], losses: Sequence[float], own: Sequence[float] = ()
    ) -> tuple[list[float], float]:
        """Return the smoothed losses and the suggested rate.

        Args:
            rates: The rates of the sweep.
            losses: The raw loss at each of them.
            own: The module's own rates, as in `suggest`.

        Raises:
            ValueError: If nothing can be suggested, as in `suggest`, or if the loss falls no further than its noise.
        """
        smoothed = smooth(losses, self.beta)
        suggestion = suggest(rates, smoothed, self.method, own)
        if not falls(losses):
            raise ValueError(
                f"Expected the loss to fall by more than its noise somewhere between the rates {rates[0]:.2g} and "
                f"{rates[len(losses) - 1]:.2g}, but the sweep of {len(losses)} steps shows no rate: its lowest "
                f"smoothed loss is {min(filter(math.isfinite, smoothed)):.4g}. Use more `steps` or larger batches; "
                "otherwise see whether the model learns at all, or give a learning rate yourself."
            )
        return smoothed, suggestion


def sweep_rate(step: int, steps: int, min_lr: float, max_lr: float) -> float:
    """Go from one rate to another by the same factor at each step.

    ``min_lr * (max_lr / min_lr) ** (step / (steps - 1))``

    Args:
        step: Optimizer steps done so far, in [0, steps - 1].
        steps: Length of the sweep in optimizer steps, 2 or more.
        min_lr: Rate at step 0, above 0.
        max_lr: Rate at step ``steps - 1``, above 0.

    Example:
        >>> [round(sweep_rate(step, 4, 0.001, 1.0), 6) for step in range(4)]
        [0.001, 0.01, 0.1, 1.0]
    """
    return min_lr * math.pow(max_lr / min_lr, step / (steps - 1))


def smooth(losses: Sequence[float], beta: float = 0.98) -> list[float]:
    """Average exponentially over the past, without the pull towards 0 at the start.

    ``smooth[t] = sum(beta ** (t - i) * losses[i] for i <= t) / sum(beta ** (t - i) for i <= t)``

    Args:
        losses: The raw losses.
        beta: Weight of the past, in [0, 1); 0 smooths nothing.

    Example:
        >>> [round(value, 6) for value in smooth([1.0, 4.0, 4.0], beta=0.5)]
        [1.0, 3.0, 3.571429]
    """
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta**count))
    return smoothed


def diverged(loss: float, best: float, factor: float) -> bool:
    """Tell whether a loss is not finite, or has risen above ``factor`` times the best one.

    Losses below 0 count by their distance: the limit lies ``(factor - 1) * abs(best)`` above the best.

    Args:
        loss: The smoothed loss now.
        best: The lowest smoothed loss so far.
        factor: Above 1.

    Example:
        >>> diverged(4.1, 1.0, 4.0), diverged(3.9, 1.0, 4.0), diverged(-0.5, -1.0, 4.0), diverged(math.nan, 1.0, 4.0)
        (True, False, False, True)
    """
    return not math.isfinite(loss) or loss > best + (factor - 1) * abs(best)


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the loss falls fastest, by logarithm of the rate.

    Args:
        rates: Rising rates, 3 or more.
        losses: The smoothed loss at each of them.

    Example:
        >>> steepest([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.9, 1.5, 0.6, 0.5])
        0.01
    """
    values = torch.tensor(losses, dtype=torch.float64)
    (slopes,) = torch.gradient(values, spacing=(torch.tensor(rates, dtype=torch.float64).log(),))
    return rates[int(slopes.argmin())]


def valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate in the middle of the longest way down.

    The way down is the longest subsequence of falling losses. Like fastai, this takes it to fill the points up to its
    end without a gap, and goes a third and a sixth of its length into it.

    Args:
        rates: Rising rates, 1 or more.
        losses: The smoothed loss at each of them.

    Example:
        >>> losses = [3.0, 3.1, 2.9, 2.6, 2.2, 1.7, 1.5, 1.4, 1.8, 4.0]
        >>> valley([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], losses)
        0.0003
    """
    tails: list[float] = []  # of the ways down of each length, how high the highest ends, with the sign turned
    end = 0
    for i, loss in enumerate(losses):
        length = bisect_left(tails, -loss)
        if length == len(tails):
            end = i
        tails[length : length + 1] = [-loss]
    return rates[max(end - len(tails) + len(tails) // 3 + len(tails) // 6, 0)]


def falls(losses: Sequence[float]) -> bool:
    """Tell whether the loss comes to lie lower than it began by more than its noise.

    ``mean(first) - mean(run) > 3.3 * sqrt(var(first) / len(first) + var(run) / len(run))``, with the first third of the
    losses, and any run of a sixth of them. Of sweeps of noise alone, about one in thirty passes. What comes after a
    loss that is not finite does not count.

    Args:
        losses: The raw losses, 10 or more finite ones.

    Example:
        >>> falls([2.0, 2.2] * 30 + [1.5, 1.7] * 6), falls([2.0, 2.2] * 35)
        (True, False)
    """
    finite = list(takewhile(math.isfinite, losses))
    first, length = finite[: max(len(finite) // 3, 3)], max(len(finite) // 6, 3)
    began, spread = fmean(first), variance(first) / len(first)
    runs = (finite[start : start + length] for start in range(len(finite) - length + 1))
    return any(began - fmean(run) > NOISE * math.sqrt(spread + variance(run) / length) for run in runs)


def safe_peak(lowest: float, own: Sequence[float] = ()) -> float:
    """Return a fifth of a rate, but no less than twice the module's own rate and no more than ten times it.

    An own rate more than five times above ``lowest``, or ten thousand times below it, is taken for a placeholder.

    Args:
        lowest: The rate at which the smoothed loss is lowest, above 0.
        own: The module's own rates, one for each parameter group; their range counts.

    Example:
        >>> safe_peak(0.5), safe_peak(0.5, [0.2]), safe_peak(0.5, [0.001]), safe_peak(0.5, [1e-8])
        (0.1, 0.4, 0.01, 0.1)
    """
    peak = lowest / MARGIN
    meant = [rate for rate in own if lowest / PLACEHOLDER < rate < lowest * MARGIN]
    return max(min(peak, MOST_OF_OWN * max(meant)), LEAST_OF_OWN * min(meant)) if meant else peak


def suggest(
    rates: Sequence[float], losses: Sequence[float], method: Method = "minimum", own: Sequence[float] = ()
) -> float:
    """Pick a rate from a sweep.

    Left out are the first tenth of the points (the average has not settled), the last five (the loss blows up), and
    what comes after a loss that is not finite.

    Args:
        rates: The rates of the sweep.
        losses: The smoothed loss at each of them.
        method: ``"minimum"``: a fifth of the rate at which the loss is lowest, bounded as in `safe_peak`;
            ``"valley"``: the middle of the longest way down; ``"steepest"``: where the loss falls fastest.
        own: The module's own rates, one for each parameter group, which bound ``"minimum"``; none, no bounds.

    Returns:
        One of ``rates``.

    Raises:
        ValueError: If there are fewer than 10 finite points, or if the loss never falls.

    Example:
        >>> rates = [sweep_rate(step, 50, 1e-5, 1.0) for step in range(50)]
        >>> losses = [2 - rate / (rate + 0.003) + rate**2 for rate in rates]
        >>> [round(suggest(rates, losses, method), 4) for method in ("minimum", "steepest", "valley")]
        [0.0233, 0.0028, 0.0018]
    """
    finite = sum(1 for _ in takewhile(math.isfinite, losses))
    if finite < FEWEST_POINTS:
        raise ValueError(
            f"Expected {FEWEST_POINTS} points or more from the learning-rate range test, but got {finite} before the "
            "loss diverged or the sweep ended. Lower `min_lr`, or use more `steps`."
        )
    part = slice(finite // 10, finite - LAST_POINTS)
    kept, losses = rates[part], losses[part]
    if min(losses) == losses[0]:
        raise ValueError(
            f"Expected the loss to fall somewhere between the rates {kept[0]:.2g} and {kept[-1]:.2g}, but it only "
            f"rises or stays at {losses[0]:.4g}. Lower `min_lr` if it diverges at once; otherwise see whether the "
            "model learns at all, or give a learning rate yourself."
        )
    if method == "minimum":
        peak = safe_peak(kept[losses.index(min(losses))], own)
        return min(rates, key=lambda rate: abs(math.log(rate / peak)))
    return (valley if method == "valley" else steepest)(kept, losses)
