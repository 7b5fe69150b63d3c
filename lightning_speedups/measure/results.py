"""What a comparison measured, and the numbers that follow from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_speedups.core.throughput import (
    Spread,
    common_target,
    paired_speedup,
    samples_per_second,
    spread,
    time_to_target,
)
from lightning_speedups.measure.stopwatch import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["Comparison", "Run", "Summary"]

FORMAT = 1
"""Version of the JSON's layout."""


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


@dataclass
class Comparison:
    """All runs of a comparison.

    Attributes:
        baselines: Baseline of each arm by name (``None`` for a baseline), in the order of the table.
        runs: The runs in the order in which they were made, a partial one included.
        settings: What was asked for.
        machine: What it ran on.
        versions: Of the software.
        chance: Accuracy of always answering the commonest class, a fraction.
        target: Accuracy to reach, a fraction; by default each baseline's own: the lowest that its runs ended with.
        interrupted: Whether a Ctrl-C ended it early.
    """

    baselines: dict[str, str | None]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    chance: float
    target: float | None = None
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False

    def complete(self, arm: str) -> list[Run]:
        """The complete runs of one arm."""
        return [run for run in self.runs if run.arm == arm and run.complete and run.points]

    def target_of(self, arm: str) -> float | None:
        """The accuracy that counts as "there": asked for, or the lowest that a run of the arm's baseline ended with."""
        if self.target is not None:
            return self.target
        baseline = self.baselines[arm] or arm
        return common_target([[point.accuracy for point in run.points] for run in self.complete(baseline)])

    def _seconds(self, arm: str, target: float) -> dict[int, float]:
        return {
            run.seed: time_to_target([(point.seconds, point.accuracy) for point in run.points], target)
            for run in self.complete(arm)
        }

    def summary(self, arm: str) -> Summary:
        """What the table says of one arm."""
        runs, target, baseline = self.complete(arm), self.target_of(arm), self.baselines[arm]
        seconds = {} if target is None else self._seconds(arm, target)
        speedup = None
        if baseline is not None and target is not None:
            before = self._seconds(baseline, target)
            shared = sorted(before.keys() & seconds.keys())
            speedup = paired_speedup([before[seed] for seed in shared], [seconds[seed] for seed in shared])
        final = [run.points[-1].accuracy for run in runs]
        return Summary(
            arm=arm,
            baseline=baseline,
            runs=len(runs),
            target=target,
            reached=sum(math.isfinite(value) for value in seconds.values()),
            seconds=spread(seconds.values()),
            epochs=None if target is None else spread(_epochs(run, target) for run in runs),
            accuracy=fmean(final) if final else None,
            accuracy_std=_std(final) if final else None,
            throughput=spread(samples_per_second(run.points[-1].samples, run.points[-1].seconds) for run in runs),
            speedup=speedup,
        )

    def summaries(self) -> list[Summary]:
        """One summary an arm, in the order of the table."""
        return [self.summary(arm) for arm in self.baselines]

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers right."""
        notes = []
        for baseline in dict.fromkeys(self.baselines[arm] or arm for arm in self.baselines):
            target = self.target_of(baseline)
            if target is None:
                continue
            origin = "as asked for" if self.target is not None else f"the lowest that a run of {baseline} ended with"
            of = "all arms" if self.target is not None else f"{baseline} and the arms measured against it"
            notes.append(f"Target of {of}: {target:.1%}, {origin}.")
            if target <= 1.2 * self.chance:
                notes.append(
                    f"That is no better than chance ({self.chance:.1%}): the times to it say nothing; train longer."
                )
            if self.target is not None:
                break
        if any(row.seconds is not None and row.seconds.high == math.inf for row in self.summaries()):
            notes.append("A run that did not reach the target counts as infinitely long (a ratio of 0).")
        load, cores = self.machine.get("load"), self.machine.get("cores")
        if load is not None and cores and load > cores / 2:
            # threads that spin while they wait made a busy two-core machine ten times slower than it had to be
            notes.append(
                f"The machine was busy at the start (load {load:g} on {cores} cores): trust the epochs more than the"
                " seconds; OMP_WAIT_POLICY=passive in the environment helps."
            )
        pretraining = [run.pretrain_seconds for run in self.runs if run.pretrain_seconds > 0]
        if pretraining:
            notes.append(
                f"Pretraining took {fmean(pretraining):.1f} s a seed; it stands for downloaded weights, not counted."
            )
        partial = [run for run in self.runs if not run.complete]
        notes += [
            f"Interrupted: {run.arm}, seed {run.seed}, has {len(run.points)} epochs and is left out above."
            for run in partial
        ]
        return notes

    def table(self) -> Table:
        """A rich table with one row an arm."""
        from lightning_speedups.measure.report import table

        return table(self)

    def figure(self) -> Figure:
        """A matplotlib figure: accuracy against training seconds, one line an arm."""
        from lightning_speedups.measure.report import figure

        return figure(self)

    def to_json(self) -> str:
        """Every point, the numbers of the table, the settings, the machine and the versions, as JSON."""
        document = {
            "format": FORMAT,
            "interrupted": self.interrupted,
            "settings": self.settings,
            "machine": self.machine,
            "versions": self.versions,
            "chance": self.chance,
            "summary": [asdict(row) for row in self.summaries()],
            "runs": [asdict(run) for run in self.runs],
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False)

    def save_json(self, folder: Path) -> Path:
        """Write ``compare.json`` into a folder, replacing an older one as a whole.

        Args:
            folder: An existing folder.

        Returns:
            Path of the file.
        """
        path = folder / "compare.json"
        draft = folder / "compare.json.part"
        draft.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(draft, path)
        return path

    def save_figure(self, folder: Path) -> Path:
        """Write ``compare.png`` into a folder.

        Args:
            folder: An existing folder.

        Returns:
            Path of the file.
        """
        path = folder / "compare.png"
        self.figure().savefig(path, dpi=150)
        return path


def _epochs(run: Run, target: float) -> float:
    return time_to_target([(point.epoch, point.accuracy) for point in run.points], target)


def _std(values: Sequence[float]) -> float:
    # statistics.stdev stumbles over the nan of a diverged run
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: both become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
