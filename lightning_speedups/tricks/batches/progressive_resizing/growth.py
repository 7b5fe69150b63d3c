"""Which size images have at which place of a run."""

from __future__ import annotations

from typing import Any, Literal

from lightning_speedups.attach.batches import batch_number
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.attach.run_length import batches_in_epoch, run_length
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.resizing import Growth, Size


class SizesOverRun(LoaderGrip):
    """The sizes of a run's images: those of a growth, by the fraction of the run that is over.

    Args:
        trick: Whose.
        growth: The size by that fraction.
        unit: In which the run is counted. ``"batch"``: sizes change from batch to batch; ``"sample"``: so they do, but
            in epochs of different lengths, whose batches do not tell how much of the data was seen; ``"epoch"``: they
            change from epoch to epoch.
    """

    def __init__(self, trick: Trick, growth: Growth, unit: Literal["batch", "sample", "epoch"]) -> None:
        super().__init__(trick, any_loader=True)
        self.growth, self.unit = growth, unit
        self.length = 1  # of the run, in batches or else in epochs

    def change_loader(self, trainer: Any, loader: Any, epoch: int) -> None:
        """Settle the length of the run, which follows from the loader's."""
        if self.batcher is not None:
            self.plan(trainer)

    def on_train_start(self, trainer: Any) -> None:
        """Settle the length of the run, now that any loader has told its own."""
        self.plan(trainer)
        super().on_train_start(trainer)
        run = run_length(trainer)
        if self.unit != "batch" and run.max_steps is not None and run.max_steps == run.steps:
            self.trick.run.said.warn(
                f"{self.name} counts in epochs with `fill_batch=True` or `by='epoch'`: `max_steps` may end the run "
                "before the images are full. Give `max_epochs` only."
            )

    def plan(self, trainer: Any) -> None:
        """Settle the length of the run.

        Raises:
            MisconfigurationException: If nothing tells it.
        """
        run = run_length(trainer)
        length = run.batches if self.unit == "batch" else run.max_epochs
        if length is None:
            way_out = 'Give `max_epochs`, and where the loader has no length `by="epoch"`, or else `max_steps`.'
            raise self.trick.refusal("lets images grow over the run, whose length is unknown here", way_out)
        self.length = max(1, length)

    def progress(self, trainer: Any) -> float:
        """Return the fraction of the run that is over before the next batch."""
        if self.unit == "batch":
            return batch_number(trainer) / self.length
        epoch: int = trainer.current_epoch
        over = 0.0
        if self.unit == "sample":
            batches = batches_in_epoch(trainer, epoch) or 1
            over = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches
        return (epoch + over) / self.length

    def now(self, trainer: Any, full: Size) -> Size:
        """Return the size of the next batch's images.

        Args:
            trainer: A fitting Trainer.
            full: Size of full images.
        """
        return self.growth.size(self.progress(trainer), full)

    def to_come(self, trainer: Any, full: Size) -> list[Size]:
        """Return the different sizes from now on, the smallest first.

        Args:
            trainer: A fitting Trainer.
            full: Size of full images.
        """
        return self.growth.sizes(full, self.progress(trainer))

    def largest_in(self, epoch: int, full: Size) -> Size:
        """Return the size before the last batch of an epoch, or a little more.

        Args:
            epoch: Which, from 0.
            full: Size of full images.
        """
        over = epoch + (self.unit == "sample")
        if self.unit == "batch":
            trainer = self.loaders.trainer
            over = sum(batches_in_epoch(trainer, earlier) or 0 for earlier in range(epoch + 1)) - 1
        return self.growth.size(over / self.length, full)
