"""The contract of tricks whose changes stay: module surgery, pruning, averages that take the weights' place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.attach.trick import Trick


class LastingTrick(Trick):
    """A trick that changes the module for good.

    The change is made in ``setup`` of every stage, before optimizers are made and checkpoints are loaded, so that the
    state dict of a changed module loads wherever the same trick is in the Trainer. A subclass makes it (``change``) and
    tells whether it was made before (``is_changed``); nothing is put back.
    """

    stays: ClassVar[bool] = True
    """Whether the change outlives the run; the shared tests ask another contract of such tricks."""

    def change(self, pl_module: LightningModule) -> Mapping[str, str]:
        """Change what is not changed yet, and return what was done to which part.

        Args:
            pl_module: The module.

        Returns:
            The names of the parts, and for each what was done, as ``"ReLU → SiLU"``; empty if there was nothing to do.
        """
        raise NotImplementedError

    def is_changed(self, pl_module: LightningModule) -> bool:
        """Tell whether there is a part that was changed before."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the change, once, and say so."""
        super().setup(trainer, pl_module, stage)
        if done := self.change(pl_module):
            kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(done.values()).most_common())
            rank_zero_info(f"{self.name}: {kinds} in {type(pl_module).__name__} ({next(iter(done))}, ...).")
        elif not self.is_changed(pl_module):
            rank_zero_warn(f"{self.name} found nothing to change in {type(pl_module).__name__}. Leave it out.")
