"""The progress bar of a comparison: what is prepared, then the current run and its accuracy or loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from lightning_speedups.measure.arms import Arm
from lightning_speedups.measure.runs import ACCURACY, Metric
from lightning_speedups.measure.stopwatch import Point, Stopwatch


class Bar(Progress):
    """One bar on stderr for one piece of work after the other; a context manager, more than once if need be.

    Args:
        shown: Whether to show anything at all.
        metric: What is shown of a run.
    """

    def __init__(self, *, shown: bool, metric: Metric = ACCURACY) -> None:
        self._metric = metric
        console = Console(stderr=True)
        super().__init__(
            *Progress.get_default_columns(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=2,  # redrawing takes time from the cores that train
            transient=True,
            disable=not (shown and (console.is_interactive or console.is_jupyter)),  # a pipe would get empty lines
        )
        self._work = self.add_task("getting the data", total=None)

    def begin(self, what: str, parts: int) -> None:
        """Show other work from its start.

        Args:
            what: Name of the work.
            parts: How many there are to do.
        """
        self.reset(self._work, total=parts, description=what)

    def each(self, arms: Sequence[Arm], what: str) -> Iterator[Arm]:
        """The arms one after the other, as work of its own.

        Args:
            arms: The arms.
            what: Name of the work.

        Yields:
            The next arm.
        """
        self.begin(what, len(arms))
        for arm in arms:
            self.update(self._work, description=f"{what}: {arm.name}")
            yield arm
            self.advance(self._work)

    def watch(self, label: str) -> Stopwatch:
        """A stopwatch for the next run that also moves the bar.

        Args:
            label: Name of the run.

        Returns:
            The stopwatch.
        """

        def on_point(point: Point) -> None:
            value = self._metric.shown(self._metric.of(point))
            self.update(self._work, description=f"{label}: {value}")

        self.update(self._work, description=label)
        return Stopwatch(lambda samples: self.advance(self._work, samples), on_point)
