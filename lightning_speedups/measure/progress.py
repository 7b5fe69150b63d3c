"""The progress bar of a comparison, with the current run and its accuracy."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from lightning_speedups.measure.stopwatch import Point, Stopwatch


class Bar(Progress):
    """One bar on stderr; a context manager.

    Args:
        batches: Training batches of the whole comparison.
        batch_size: Samples of a batch.
        shown: Whether to show anything at all.
    """

    def __init__(self, batches: int, batch_size: int, *, shown: bool) -> None:
        super().__init__(
            *Progress.get_default_columns(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=2,  # redrawing takes time from the cores that train
            transient=True,
            disable=not shown,
        )
        self._batch_size = batch_size
        self._runs = self.add_task("preparing", total=batches)

    def watch(self, label: str) -> Stopwatch:
        """A stopwatch for the next run that also moves the bar.

        Args:
            label: Name of the run.

        Returns:
            The stopwatch.
        """

        def on_point(point: Point) -> None:
            self.update(self._runs, description=f"{label}: {point.accuracy:.1%}")

        self.update(self._runs, description=label)
        return Stopwatch(self._batch_size, lambda: self.advance(self._runs), on_point)
