"""A comparison: its runs, the numbers that follow from them, and the files that hold both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from lightning_speedups.core import throughput
from lightning_speedups.core.counts import counted
from lightning_speedups.core.throughput import Spread
from lightning_speedups.measure.report import figure, table
from lightning_speedups.measure.runs import ACCURACY, METRICS, Metric, Run, Summary

FORMAT = 1  # of the JSON's layout


def _mean_and_deviation(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """Mean and standard deviation (n - 1 in the denominator; 0 for one value)."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))


@dataclass
class Comparison:
    """All runs of a comparison.

    Attributes:
        baselines: Baseline of each arm by name (``None`` for a baseline), in the order of the table.
        runs: The runs in the order in which they were made, a partial one included.
        settings: What was asked for.
        machine: What it ran on.
        versions: Of the software.
        chance: Accuracy of always answering the commonest class, a fraction; of texts the loss of knowing how often
            each byte comes.
        target: Accuracy, a fraction, or loss to reach; by default each baseline's own: the worst that its runs ended
            with.
        interrupted: Whether a Ctrl-C ended it early.
        metric: Name of what the target is a value of: ``"accuracy"`` or ``"test_loss"``.
    """

    baselines: dict[str, str | None]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    chance: float
    target: float | None = None
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False
    metric: str = ACCURACY.name

    @property
    def goal(self) -> Metric:
        """What the target is a value of."""
        return METRICS[self.metric]

    def complete(self, arm: str) -> list[Run]:
        """The complete runs of one arm."""
        return [run for run in self.runs if run.arm == arm and run.complete]

    def target_of(self, arm: str) -> float | None:
        """The value that counts as "there": asked for, or the worst that a run of the arm's baseline ended with."""
        if self.target is not None:
            return self.target
        return self._end_of(self.baselines[arm] or arm)

    def _end_of(self, arm: str) -> float | None:
        """The worst value that a complete run of an arm ended with."""
        goal = self.goal
        heights = [[goal.height(goal.of(point)) for point in run.points] for run in self.complete(arm)]
        worst = throughput.common_target(heights)
        return None if worst is None else goal.height(worst)

    def _seconds(self, arm: str, target: float | None) -> dict[int, float]:
        """Training seconds of an arm's complete runs to a target, by seed."""
        runs = [] if target is None else self.complete(arm)
        return {run.seed: run.until(target, "seconds", self.goal) for run in runs}  # type: ignore[arg-type]

    def _speedup(self, arm: str, rival: str, target: float | None) -> Spread | None:
        """Another arm's seconds to a target over an arm's own, paired by seed."""
        before, seconds = self._seconds(rival, target), self._seconds(arm, target)
        shared = before.keys() & seconds.keys()
        return throughput.paired_speedup([before[seed] for seed in shared], [seconds[seed] for seed in shared])

    def summary(self, arm: str) -> Summary:
        """What the table says of one arm."""
        runs, target, baseline = self.complete(arm), self.target_of(arm), self.baselines[arm]
        seconds = self._seconds(arm, target)
        until = partial(self._until, runs, target)
        accuracy, accuracy_std = _mean_and_deviation([run.points[-1].accuracy for run in runs])
        loss, loss_std = _mean_and_deviation([run.points[-1].test_loss for run in runs])
        return Summary(
            arm=arm,
            baseline=baseline,
            runs=len(runs),
            target=target,
            reached=sum(math.isfinite(value) for value in seconds.values()),
            seconds=throughput.spread(seconds.values()),
            epochs=until("epoch"),
            accuracy=accuracy,
            accuracy_std=accuracy_std,
            throughput=throughput.spread(
                throughput.samples_per_second(run.points[-1].samples, run.points[-1].seconds) for run in runs
            ),
            speedup=None if baseline is None else self._speedup(arm, baseline, target),
            samples=until("samples"),
            loss=loss,
            loss_std=loss_std,
        )

    def _until(self, runs: list[Run], target: float | None, unit: Literal["epoch", "samples"]) -> Spread | None:
        return None if target is None else throughput.spread(run.until(target, unit, self.goal) for run in runs)

    def summaries(self) -> list[Summary]:
        """One summary an arm, in the order of the table."""
        return [self.summary(arm) for arm in self.baselines]

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers right."""
        return [*self._notes_on_targets(), *self._notes_on_rivals(), *self._notes_on_runs()]

    def _notes_on_targets(self) -> Iterator[str]:
        for arm, baseline in self.baselines.items():
            target = self.target_of(arm)
            if baseline is not None or target is None:
                continue
            goal = self.goal
            worst = f"the {'highest' if goal.is_loss else 'lowest'} that a run of {arm} ended with"
            origin = worst if self.target is None else "as asked for"
            yield f"Target of {arm} and the arms measured against it: {goal.shown(target)}, {origin}."
            if goal.height(target) <= goal.height(self.chance) * (1 if goal.is_loss else 1.2):
                chance = goal.shown(self.chance)
                yield f"That is no better than chance ({chance}): the times to it say nothing; train longer."

    def sooner(self, arm: str, rival: str) -> Spread | None:
        """How many times sooner than another arm it reaches the worst value that the other's runs ended with."""
        return self._speedup(arm, rival, self._end_of(rival))

    def _notes_on_rivals(self) -> Iterator[str]:
        if (times := self.sooner("fast", "tuned")) is not None and times.low > 0:
            spread = f" ({times.low:.2f}–{times.high:.2f})" if times.count > 1 else ""
            yield f"fast reaches what tuned ends with {times.median:.2f}{spread} times sooner."

    def _notes_on_runs(self) -> Iterator[str]:
        for reason in self.settings.get("left_out", {}).values():
            yield f"Left out: {reason}"
        if any(row.seconds is not None and row.seconds.high == math.inf for row in self.summaries()):
            yield "A run that did not reach the target counts as infinitely long (a ratio of 0)."
        load, cores = self.machine.get("load"), self.machine.get("cores")
        if load is not None and cores and load > cores / 2:
            # threads that spin while they wait made a busy two-core machine ten times slower than it had to be
            yield (
                f"The machine was busy at the start (load {load:g} on {cores} cores): trust the epochs more than the"
                " seconds; OMP_WAIT_POLICY=passive in the environment helps."
            )
        if pretraining := [run.pretrain_seconds for run in self.runs if run.pretrain_seconds > 0]:
            yield f"Pretraining took {fmean(pretraining):.1f} s a seed; it stands for downloaded weights, not counted."
        for run in self.runs:
            if not run.complete:
                done = counted(len(run.points), "epoch")
                yield f"Interrupted: {run.arm}, seed {run.seed}, has {done} and is left out above."

    def table(self) -> Table:
        """A rich table with one row an arm."""
        return table(self.settings, self.summaries(), self.notes(), self.goal)

    def figure(self) -> Figure:
        """A matplotlib figure: accuracy or loss against training seconds, one line an arm."""
        target = next((self.target_of(arm) for arm in self.baselines), None)
        return figure(self.settings, self.baselines, [run for run in self.runs if run.complete], target, self.goal)

    def to_json(self) -> str:
        """Every point, the numbers of the table, the settings, the machine and the versions, as JSON."""
        document = {"format": FORMAT, "summary": [asdict(row) for row in self.summaries()], **asdict(self)}
        # JSON knows no infinity and no NaN: both become null
        finite = json.loads(json.dumps(document), parse_constant=lambda name: None)
        return json.dumps(finite, indent=1, allow_nan=False)

    def save_json(self, folder: Path) -> Path:
        """Write ``compare.json`` into a folder, replacing an older one as a whole.

        Args:
            folder: An existing folder.

        Returns:
            Path of the file.
        """
        draft = folder / "compare.json.part"
        draft.write_text(self.to_json() + "\n", encoding="utf-8")
        return draft.replace(folder / "compare.json")

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
