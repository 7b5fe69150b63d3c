"""One ordered pipeline of batch changes for each Trainer, on ``strategy.batch_to_device``.

That is the one place which sees every kind of batch, on its device, after the user's own transfer hooks (also those of
a DataModule), and before any callback, metric or training_step does.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_speedups.attach.trick import Trick, patch, unpatch


class Order(IntEnum):
    """When a trick changes the batch; lower comes first."""

    RESIZE = 10
    MEMORY_FORMAT = 20
    MIX = 30


class BatchTrick(Trick):
    """A trick that changes training batches. A subclass says when (``order``) and how (``change_batch``)."""

    order: Order

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Return the changed batch, on the device; the incoming tensors may be the dataset's own memory: never write
        into them.
        """
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the pipeline."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{self.name} changes batches on their way to `training_step`, but "
                f"{type(pl_module).__name__}.training_step takes `dataloader_iter` and fetches them itself. Write it as"
                " `training_step(self, batch, batch_idx)`."
            )
        pipeline = trainer.strategy.__dict__.get("batch_to_device")
        if not isinstance(pipeline, _Pipeline):
            pipeline = _Pipeline(trainer)
            patch(trainer.strategy, "batch_to_device", pipeline)
        if self not in pipeline.tricks:
            pipeline.tricks = sorted([*pipeline.tricks, self], key=lambda trick: trick.order)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the pipeline; the last one removes it."""
        super().undo(trainer, pl_module)
        pipeline = trainer.strategy.__dict__.get("batch_to_device")
        if isinstance(pipeline, _Pipeline) and self in pipeline.tricks:
            pipeline.tricks.remove(self)
            if not pipeline.tricks:
                unpatch(trainer.strategy, "batch_to_device", pipeline.original)


class _Pipeline:
    """Stands in for ``strategy.batch_to_device`` and runs the tricks on what it returns, in training only."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.original = trainer.strategy.batch_to_device
        self.tricks: list[BatchTrick] = []

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.original(batch, *args, **kwargs)
        if not self.trainer.training or batch is None:
            return batch
        for trick in self.tricks:
            if trick.is_active(self.trainer):
                batch = trick.change_batch(self.trainer, self.trainer.lightning_module, batch)
        return batch


def batch_number(trainer: Trainer) -> int:
    """Return how many training batches came before this one in the whole run; the same after a resume."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
