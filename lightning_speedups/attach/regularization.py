"""What keeps a network from learning by heart, made weaker for a while: dropout, and tricks that distort batches."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch.nn.modules.dropout import _DropoutNd

from lightning_speedups.attach.batches import BatchTrick
from lightning_speedups.attach.trick import Trick, callbacks_of


class Regularization:
    """The module's dropout and the Trainer's tricks on batches, with the strength that they have of their own.

    Args:
        trainer: Whose tricks.
        pl_module: Whose dropout.
        leave_out: The trick that asks.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, leave_out: Trick) -> None:
        self._tricks = [
            (one, one.strength, "strength" in vars(one))
            for one in callbacks_of(trainer)
            if isinstance(one, BatchTrick) and not isinstance(one, type(leave_out))
        ]
        self._dropouts = [(part, part.p) for part in pl_module.modules() if isinstance(part, _DropoutNd)]

    @property
    def has_parts(self) -> bool:
        """Whether there is anything to scale."""
        return bool(self._tricks or self._dropouts)

    def scale(self, share: float) -> None:
        """Give each a share of its own strength.

        Args:
            share: In [0, 1].
        """
        for trick, strength, _ in self._tricks:
            trick.strength = strength * share
        for dropout, p in self._dropouts:
            dropout.p = p * share

    def put_back(self) -> None:
        """Give each its own strength."""
        self.scale(1.0)
        for trick, _, own in self._tricks:
            if not own:
                vars(trick).pop("strength", None)
