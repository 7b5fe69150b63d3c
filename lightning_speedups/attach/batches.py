"""One ordered pipeline of batch changes for each Trainer, on ``strategy.batch_to_device``.

That is the one place which sees every kind of batch, on its device, after the user's own transfer hooks (also those of
a DataModule), and before any callback, metric or training_step does.
"""

from __future__ import annotations

import copy
from enum import IntEnum
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_speedups.attach.trick import Trick, patch, unpatch
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, get_part
from lightning_speedups.core.randomness import generator_for


class Order(IntEnum):
    """When a trick changes the batch; lower comes first."""

    LOOK = 0
    AUGMENT = 10
    RESIZE = 20
    MEMORY_FORMAT = 30
    MIX = 40
    REPLACE = 50


class BatchTrick(Trick):
    """A trick that changes training batches. A subclass says when (``batch_order``) and how (``change_batch``)."""

    batch_order: Order
    strength: float = 1.0
    """Share of its full strength, in [0, 1], for a trick that distorts; ProgressiveResizing lets it grow."""

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Return the changed batch, on the device; the incoming tensors may be the dataset's own memory: never write
        into them.
        """
        raise NotImplementedError

    def part_of(self, batch: Any, place: Place, argument: str) -> Any:
        """Return what stands at the place in a batch that the user named by an argument."""
        try:
            return get_part(batch, place)
        except LookupError as error:
            raise MisconfigurationException(
                f"{self.name}({argument}={place!r}): {error.args[0]}. Name the right place."
            ) from error

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
            pipeline.tricks = sorted([*pipeline.tricks, self], key=lambda trick: trick.batch_order)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the pipeline; the last one removes it."""
        super().undo(trainer, pl_module)
        pipeline = trainer.strategy.__dict__.get("batch_to_device")
        if isinstance(pipeline, _Pipeline) and self in pipeline.tricks:
            pipeline.tricks.remove(self)
            if not pipeline.tricks:
                unpatch(trainer.strategy, "batch_to_device", pipeline.original)


class SeededBatchTrick(BatchTrick):
    """A trick that changes training batches at random: the draws depend on the seed, the rank and the batch's number
    alone, so that a resumed run draws the same.

    Args:
        seed: Any whole number. None: the seed of torch's generator (what ``seed_everything`` sets), kept in
            checkpoints.
    """

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        check_number("seed", seed, whole=True, optional=True)
        self.seed = self._run_seed = None if seed is None else int(seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the batch pipeline."""
        super().setup(trainer, pl_module, stage)
        self._run_seed = self.seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the seed."""
        super().on_train_start(trainer, pl_module)
        if self._run_seed is None:  # one for all ranks: a checkpoint holds one
            self._run_seed = trainer.strategy.broadcast(torch.initial_seed())

    def generator(self, trainer: Trainer) -> torch.Generator:
        """Return the source of randomness for this batch, on the CPU."""
        assert self._run_seed is not None
        return generator_for(self._run_seed, trainer.global_rank, batch_number(trainer), self.batch_order)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed."""
        return {**super().state_dict(), "seed": self._run_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Redraw what the interrupted run drew, unless a seed was given."""
        super().load_state_dict(state_dict)
        if self.seed is None:
            self._run_seed = state_dict["seed"]


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


def rest_of_pipeline(trainer: Trainer, trick: BatchTrick, batch: Any) -> Any:
    """Return a batch as the tricks after one of them would leave it; they themselves remember nothing of it.

    Args:
        trainer: A fitting Trainer.
        trick: A trick in the pipeline.
        batch: What it would hand on.
    """
    pipeline = trainer.strategy.__dict__["batch_to_device"]
    assert isinstance(pipeline, _Pipeline)
    for later in pipeline.tricks[pipeline.tricks.index(trick) + 1 :]:
        if later.is_active(trainer):
            batch = copy.copy(later).change_batch(trainer, trainer.lightning_module, batch)
    return batch


def transferred(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as it comes to the tricks: on the device, after the user's own transfer hooks.

    Args:
        trainer: A fitting Trainer with a trick in its pipeline.
        batch: As the loader hands it out.
    """
    pipeline = trainer.strategy.__dict__["batch_to_device"]
    assert isinstance(pipeline, _Pipeline)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return pipeline.original(batch, dataloader_idx=0)


def batch_number(trainer: Trainer) -> int:
    """Return how many training batches came before this one in the whole run; the same after a resume."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
