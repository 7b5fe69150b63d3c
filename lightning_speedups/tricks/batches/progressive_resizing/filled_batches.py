"""Batches that are larger while images are small, and the learning rate that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_speedups.attach.loaders import LoaderGrip, take_batch
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.run_length import loader_batch_size, raw_optimizers
from lightning_speedups.attach.steps import Driver, ValueOrder, require_values
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.batch_scaling import Rule, scaling_factor
from lightning_speedups.core.resizing import Size, filled_batch
from lightning_speedups.tricks.batches.progressive_resizing.growth import SizesOverRun


class FilledBatches(LoaderGrip):
    """Fills each batch with as many small images as have the pixels of full ones, and scales the rate to match.

    Args:
        trick: Whose.
        sizes: Which size when.
        size_of: Returns the size of a batch's images.
        rule: How the rate follows the batch size.
    """

    order = ValueOrder.FACTOR

    def __init__(self, trick: Trick, sizes: SizesOverRun, size_of: Callable[[Any], Size], rule: Rule) -> None:
        super().__init__(trick)
        self.sizes, self.size_of, self.rule = sizes, size_of, rule
        self.full: Size | None = None  # once a sample was seen
        self.factors: list[float] = []  # of each optimizer's rate, in this epoch

    def join(self, trainer: Any) -> None:
        """Join those who see the loader, and those who set the rate."""
        super().join(trainer)
        Driver.of(trainer).join(self)

    def change_loader(self, trainer: Any, loader: Any, epoch: int) -> None:
        """See how large full images are, before anyone lets the loader make small ones, and scale the rate."""
        if self.full is None:
            with same_randomness(trainer):
                self.full = self.size_of(take_batch(loader, [0]))
        own = loader_batch_size(trainer) or 1
        ratio = self.batch_size_in_epoch(epoch, own) / own
        self.factors = [scaling_factor(ratio, self.rule, type(one).__name__) for one in raw_optimizers(trainer)]

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        """Return how many of an epoch's largest images have the pixels of a batch of full ones."""
        if self.full is None:
            return batch_size
        return filled_batch(batch_size, self.full, self.sizes.largest_in(epoch, self.full))

    def is_active(self, trainer: Any) -> bool:
        """Tell whether the Trainer runs the trick."""
        return self.trick.is_active(trainer)

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Multiply the rate as the batch is larger."""
        if not self.factors or self.factors[optimizer] == 1:
            return {}
        return {"lr": values["lr"] * self.factors[optimizer]}

    def rests(self, optimizer: Any) -> bool:
        """No optimizer rests."""
        return False

    def stepped(self, optimizer: int) -> None:
        """Steps are not counted."""

    def settle_groups(self, pl_module: Any) -> None:
        """No groups of their own."""

    def on_fit_start(self, trainer: Any) -> None:
        """Refuse optimizers without a rate to scale."""
        super().on_fit_start(trainer)
        self.meet(trainer)

    def on_train_start(self, trainer: Any) -> None:
        """Stand at the optimizers' steps."""
        super().on_train_start(trainer)
        Driver.of(trainer).watch()

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Look whether a callback has put other optimizers into the Trainer."""
        super().on_train_epoch_start(trainer)
        Driver.of(trainer).watch()

    def meet(self, trainer: Any) -> None:
        """Refuse optimizers without a rate to scale."""
        for optimizer in raw_optimizers(trainer):
            require_values(self.trick, optimizer, ["lr"], {"lr": "Give it one, or `fill_batch=False`."})

    def leave(self, trainer: Any) -> None:
        """Give the loader and the rates back."""
        super().leave(trainer)
        Driver.of(trainer).leave(self)
        self.full, self.factors = None, []
