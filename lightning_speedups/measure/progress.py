"""Progress bars of a comparison: all runs, and the epochs of the current one with its accuracy."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from lightning_speedups.measure.stopwatch import Point, Stopwatch


class Bars(Progress):
    """Two bars on stderr; a context manager.

    Args:
        epochs: Epochs of the whole comparison.
        batches_per_epoch: Training batches of an epoch.
        batch_size: Samples of a batch.
        shown: Whether to show anything at all.
    """

    def __init__(self, epochs: int, batches_per_epoch: int, batch_size: int, *, shown: bool) -> None:
        super().__init__(
            *Progress.get_default_columns(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=2,  # redrawing takes time from the cores that train
            transient=True,
            disable=not shown,
        )
        self._batches_per_epoch, self._batch_size = batches_per_epoch, batch_size
        self._all = self.add_task("all runs", total=epochs * batches_per_epoch)
        self._run = self.add_task("preparing", total=None)
        self._before = 0

    def watch(self, label: str, epochs: int) -> Stopwatch:
        """A stopwatch for the next run that also moves the bars.

        Args:
            label: Name of the run.
            epochs: Epochs of the run.

        Returns:
            The stopwatch.
        """
        batches = epochs * self._batches_per_epoch
        before, self._before = self._before, self._before + batches
        self.update(self._all, completed=before)
        self.reset(self._run, description=label, total=batches)

        def on_batch(done: int) -> None:
            self.update(self._run, completed=done)
            self.update(self._all, completed=before + done)

        def on_point(point: Point) -> None:
            self.update(self._run, description=f"{label}: {point.accuracy:.1%}")

        return Stopwatch(self._batch_size, on_batch, on_point)
