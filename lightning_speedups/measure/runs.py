"""What was measured, as plain data: the runs, and the numbers of a row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_speedups.core.throughput import Spread, time_to_target
from lightning_speedups.measure.stopwatch import Point


@dataclass(frozen=True)
class Metric:
    """What a comparison goes by.

    Attributes:
        name: The number of a `Point`.
        is_loss: Whether lower is better.
        title: What it is, in the words of the report.
        unit: What is written behind it.
        factor: How many of that make 1.
        digits: How many are written after the point.
    """

    name: Literal["accuracy", "test_loss"]
    is_loss: bool
    title: str
    unit: str
    factor: float
    digits: int

    def of(self, point: Point) -> float:
        """Its value at a point."""
        value: float = getattr(point, self.name)
        return value

    def height(self, value: float) -> float:
        """A number that is the higher the better, from the value, and the value from it."""
        return -value if self.is_loss else value

    def shown(self, value: float) -> str:
        """Write a value.

        Args:
            value: The value.

        Example:
            >>> ACCURACY.shown(0.512), LOSS.shown(1.5)
            ('51.2 %', '1.500')
        """
        return f"{self.factor * value:.{self.digits}f}{self.unit}"


ACCURACY = Metric("accuracy", False, "test accuracy", " %", 100, 1)
LOSS = Metric("test_loss", True, "validation loss", "", 1, 3)
METRICS: dict[str, Metric] = {metric.name: metric for metric in (ACCURACY, LOSS)}


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

    def until(self, target: float, unit: Literal["seconds", "epoch", "samples"], metric: Metric = ACCURACY) -> float:
        """Training seconds, epochs or samples until it had reached a target; ``math.inf`` if it never did.

        Args:
            target: The accuracy, a fraction, or the loss.
            unit: What to count.
            metric: What the target is a value of.
        """
        points = [(getattr(point, unit), metric.height(metric.of(point))) for point in self.points]
        return time_to_target(points, metric.height(target))


@dataclass(frozen=True)
class Summary:
    """One row of the table.

    Attributes:
        arm: Name of the arm.
        baseline: Name of its baseline, ``None`` for a baseline.
        runs: How many runs were complete.
        target: Accuracy, a fraction, or loss to reach; ``None`` when the baseline has no complete run.
        reached: In how many runs it was reached.
        seconds: Training seconds to the target, ``math.inf`` where it was not reached.
        epochs: Epochs to the target, likewise; unlike the seconds they don't depend on what else the machine does.
        accuracy: Mean final accuracy, a fraction.
        accuracy_std: Its standard deviation over the seeds (n - 1 in the denominator; 0 for one seed).
        throughput: Samples a second, median over runs.
        speedup: Baseline's seconds to the target over the arm's, paired by seed; ``None`` for a baseline.
        samples: Samples to the target, like the epochs; of texts tokens.
        loss: Mean final loss on the test data.
        loss_std: Its standard deviation over the seeds, like that of the accuracy.
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
    samples: Spread | None = None
    loss: float | None = None
    loss_std: float | None = None
