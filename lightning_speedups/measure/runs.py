"""What was measured, as plain data: the runs, and the numbers of a row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_speedups.core.throughput import Spread, time_to_target
from lightning_speedups.measure.stopwatch import Point


@dataclass
class Run:
    """One training run.

    Attributes:
        arm: Name of the arm.
        seed: Seed of weights, batches and tricks.
        points: One point an epoch.
        complete: Whether it ran to its end.
        pretrain_seconds: Seconds that its pretrained backbone took, not part of any point; 0 without one.
    """

    arm: str
    seed: int
    points: list[Point] = field(default_factory=list)
    complete: bool = False
    pretrain_seconds: float = 0.0

    def until(self, target: float, unit: Literal["seconds", "epoch"]) -> float:
        """Training seconds, or epochs, until it had reached an accuracy; ``math.inf`` if it never did.

        Args:
            target: The accuracy, a fraction.
            unit: What to count.
        """
        return time_to_target([(getattr(point, unit), point.accuracy) for point in self.points], target)


@dataclass(frozen=True)
class Summary:
    """One row of the table.

    Attributes:
        arm: Name of the arm.
        baseline: Name of its baseline, ``None`` for a baseline.
        runs: How many runs were complete.
        target: Accuracy to reach, a fraction; ``None`` when the baseline has no complete run.
        reached: In how many runs it was reached.
        seconds: Training seconds to the target, ``math.inf`` where it was not reached.
        epochs: Epochs to the target, likewise; unlike the seconds they don't depend on what else the machine does.
        accuracy: Mean final accuracy, a fraction.
        accuracy_std: Its standard deviation over the seeds (n - 1 in the denominator; 0 for one seed).
        throughput: Samples a second, median over runs.
        speedup: Baseline's seconds to the target over the arm's, paired by seed; ``None`` for a baseline.
    """

    arm: str
    baseline: str | None
    runs: int
    target: float | None
    reached: int
    seconds: Spread | None
    epochs: Spread | None
    accuracy: float | None
    accuracy_std: float | None
    throughput: Spread | None
    speedup: Spread | None
