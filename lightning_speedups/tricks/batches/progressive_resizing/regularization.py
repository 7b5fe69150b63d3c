"""What keeps a network from learning by heart, made weaker while images are small: dropout, and tricks that distort
batches (Tan & Le, arXiv:2104.00298).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip, Trick, callbacks_of
from lightning_speedups.core.resizing import regularization
from lightning_speedups.tricks.batches.progressive_resizing.growth import SizesOverRun


class Regularization(Grip):
    """The module's dropout and the Trainer's tricks on batches, at a share of the strength that they have of their own.

    Args:
        trick: Whose; others of its kind are left alone.
        sizes: Which size when.
        least: The share at the smallest size, in [0, 1].
    """

    def __init__(self, trick: Trick, sizes: SizesOverRun, least: float) -> None:
        super().__init__(trick)
        self.sizes, self.least = sizes, least
        self.parts: list[tuple[Any, str, float]] = []  # what has a strength, under which name, and how much

    def join(self, trainer: Any) -> None:
        """Stand before all tricks on batches."""
        station = Station.of(trainer.strategy, "batch_to_device")
        station.join(self, partial(self.see, trainer), BatchOrder.LOOK)

    def on_train_start(self, trainer: Any) -> None:
        """Find the parts, and their own strengths."""
        tricks = [one for one in callbacks_of(trainer) if isinstance(one, BatchTrick)]
        tricks = [one for one in tricks if not isinstance(one, type(self.trick))]
        dropouts = [one for one in trainer.lightning_module.modules() if isinstance(one, _DropoutNd)]
        self.parts = [(one, "strength", one.strength) for one in tricks] + [(one, "p", one.p) for one in dropouts]
        if not self.parts:
            self.trick.run.said.warn(
                f"{self.trick.name}(scale_regularization={self.least}) found nothing to scale: no `nn.Dropout`, and no "
                "other trick on batches such as MixupCallback."
            )

    def see(self, trainer: Any, transfer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Scale the parts for a batch that goes to the device."""
        if trainer.training:
            self.scale(self.share(trainer))
        return transfer(*args, **kwargs)

    def share(self, trainer: Any) -> float:
        """Return the share of the strength that the next batch's size calls for, in [0, 1]."""
        growth, full = self.sizes.growth, self.trick.saved.full
        if full is None:  # before the first batch
            return self.least if self.sizes.progress(trainer) < growth.full_from else 1.0
        smallest = min(growth.size(0.0, full))
        return regularization(min(self.sizes.now(trainer, full)), smallest, min(full), self.least)

    def scale(self, share: float) -> None:
        """Give each a share of its own strength.

        Args:
            share: In [0, 1].
        """
        for part, name, strength in self.parts:
            setattr(part, name, strength * share)

    def leave(self, trainer: Any) -> None:
        """Give each its own strength."""
        Station.of(trainer.strategy, "batch_to_device").leave(self)
        self.scale(1.0)
        for part, name, strength in self.parts:
            if strength == getattr(type(part), name, None):  # the class's, to which it goes back
                delattr(part, name)
        self.parts = []
