"""Counts and seconds to samples a second, time to a target accuracy, and a paired speed-up with its spread.

Pure arithmetic on numbers that somebody else measured: no clock, no torch, no Lightning.
A run that never reaches the target has the time ``math.inf``, so that medians over seeds stay honest: leaving such
runs out would make an arm that fails on hard seeds look faster than it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_speedups.core.arguments import check_number


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest of the values behind it.

    Attributes:
        median: The middle value (the mean of the two middle ones for an even count).
        low: The smallest value.
        high: The largest value.
        count: How many values there were.
    """

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Median, minimum, maximum and count of some values.

    Args:
        values: Numbers in any unit; ``math.inf`` is allowed, ``nan`` values are left out.

    Returns:
        The spread, or ``None`` when no value is left.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0, count=3)
        >>> spread([]) is None
        True
    """
    kept = sorted(value for value in values if not math.isnan(value))
    if not kept:
        return None
    # With infinities in the middle the mean of the two middle values is inf, which is what "not reached" means.
    return Spread(float(median(kept)), kept[0], kept[-1], len(kept))


def samples_per_second(samples: int, seconds: float) -> float:
    """Throughput of a training run.

    Args:
        samples: How many samples were trained on, >= 0.
        seconds: The training seconds that took, > 0.

    Returns:
        Samples a second.

    Raises:
        ValueError: If ``samples`` is negative or ``seconds`` is not a positive finite number.

    Example:
        >>> samples_per_second(3000, 1.5)
        2000.0
    """
    check_number("samples", samples, 0)
    check_number("seconds", seconds, 0, above=True)
    return samples / seconds


def time_to_target(points: Iterable[tuple[float, float]], target: float) -> float:
    """Seconds at the first measured point whose accuracy is at least the target.

    No interpolation: the answer is a moment at which the accuracy was really seen, so its resolution is the
    distance of two evaluations (one epoch in ``compare``).

    Args:
        points: (seconds, accuracy) pairs in the order of their measurement.
        target: Accuracy to reach, in the unit of the points.

    Returns:
        Seconds, or ``math.inf`` when no point reaches the target.

    Example:
        >>> time_to_target([(1.0, 0.5), (2.0, 0.8), (3.0, 0.7)], 0.75)
        2.0
        >>> time_to_target([(1.0, 0.5)], 0.75)
        inf
    """
    return next((seconds for seconds, accuracy in points if accuracy >= target), math.inf)


def common_target(runs: Iterable[Sequence[float]]) -> float | None:
    """The accuracy that every run ends with or above: the lowest, over runs, of the last accuracy of the run.

    Not of the best one: a lucky peak on the way is not what a run leaves behind.

    Args:
        runs: The accuracies of each run in the order of their measurement; empty runs are left out.

    Returns:
        The target, or ``None`` when there is no run with a number in it.

    Example:
        >>> common_target([[0.5, 0.9, 0.8], [0.9, 0.7]])
        0.7
    """
    finite = [[accuracy for accuracy in run if math.isfinite(accuracy)] for run in runs]
    return min((run[-1] for run in finite if run), default=None)


def paired_speedup(baseline: Sequence[float], trick: Sequence[float]) -> Spread | None:
    """Speed-up of a trick over its baseline, from pairs of runs that share a seed.

    Each pair gives baseline seconds / trick seconds, so that what a seed makes easy or hard cancels out.
    A trick that did not reach the target counts as 0, a baseline that did not as ``math.inf``; pairs in which
    neither did say nothing and are left out.

    Args:
        baseline: Seconds to the target of the baseline's runs, ``math.inf`` where it was not reached.
        trick: The same for the trick, in the same order of seeds.

    Returns:
        Median, smallest and largest ratio, or ``None`` when no pair says anything.

    Raises:
        ValueError: If the two have different lengths or a time is not positive.

    Example:
        >>> paired_speedup([4.0, 6.0, 5.0], [2.0, 4.0, 5.0])
        Spread(median=1.5, low=1.0, high=2.0, count=3)
        >>> paired_speedup([4.0, 6.0], [2.0, float("inf")])
        Spread(median=1.0, low=0.0, high=2.0, count=2)
    """
    if len(baseline) != len(trick) or not all(seconds > 0 for seconds in (*baseline, *trick)):
        raise ValueError(
            f"Expected `baseline` and `trick` to have one time a seed, > 0 seconds, but got {baseline} and {trick}."
        )
    # inf / inf is nan, which spread() leaves out
    return spread(before / after for before, after in zip(baseline, trick, strict=True))
