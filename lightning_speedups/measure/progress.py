"""Progress bars of a comparison: all runs, and the epochs of the current one with its accuracy."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_speedups.measure.stopwatch import Point, Stopwatch

__all__ = ["Bars"]


class Bars:
    """Two bars on stderr; a context manager.

    Args:
        batches: Training batches of the whole comparison.
        shown: Whether to show anything at all.
    """

    def __init__(self, batches: int, shown: bool) -> None:
        # Twice a second: redrawing takes time from the cores that train.
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=2,
            transient=True,
            disable=not shown,
        )
        self._all = self._progress.add_task("all runs", total=batches)
        self._run = self._progress.add_task("preparing", total=None)
        self._before = 0

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def watch(self, label: str, batch_size: int, batches: int) -> Stopwatch:
        """A stopwatch for the next run that also moves the bars.

        Args:
            label: Name of the run.
            batch_size: Samples a batch.
            batches: Batches of the run.

        Returns:
            The stopwatch.
        """
        before, self._before = self._before, self._before + batches
        self._progress.update(self._all, completed=before)
        self._progress.reset(self._run, description=label, total=batches)

        def on_batch(done: int) -> None:
            self._progress.update(self._run, completed=done)
            self._progress.update(self._all, completed=before + done)

        def on_point(point: Point) -> None:
            self._progress.update(self._run, description=f"{label}: {point.accuracy:.1%}")

        return Stopwatch(batch_size, on_batch, on_point)
