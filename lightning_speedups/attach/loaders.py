"""The training loader from epoch to epoch: which samples, in which batches, and epochs whose length Lightning is told.

``strategy.process_dataloader`` is the one place that sees each training loader, a distributed sampler included, before
the first epoch's iterator starts, which is earlier than any hook of the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Sampler

from lightning_speedups.attach.trick import Trick, patch, unpatch


class LoaderTrick(Trick):
    """A trick that changes what the training loader hands out in an epoch.

    A subclass says how many samples an epoch has and in which batches (`samples_in_epoch`, `batch_size_in_epoch`: known
    for every epoch before the run, so that schedules know its length), which ones (`select`), and may change the
    dataset (`change_loader`).
    """

    takes_any_loader: ClassVar[bool] = False
    """Whether the trick can do without a loader that it can change."""

    def samples_in_epoch(self, epoch: int, samples: int) -> int:
        """Return how many of this rank's samples an epoch has."""
        return samples

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        """Return the batch size of an epoch, in samples."""
        return batch_size

    def select(self, trainer: Trainer, epoch: int, order: list[int]) -> list[int]:
        """Return the samples of an epoch, as many as promised, from all of this rank's in their order."""
        return order

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Prepare the loader or its dataset for an epoch, before its iterator starts; may be called twice."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join those who see the loader."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        loaders = trainer.strategy.__dict__.get("process_dataloader")
        if not isinstance(loaders, _Loaders):
            loaders = _Loaders(trainer)
            patch(trainer.strategy, "process_dataloader", loaders)
        if self not in loaders.tricks:
            loaders.tricks.append(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a validation interval that an epoch may not reach."""
        interval, epochs = trainer.val_check_interval, trainer.max_epochs
        loaders = _loaders(trainer)
        if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not trainer.limit_val_batches:
            return
        lengths = [loaders.batches_in_epoch(epoch) for epoch in range(max(1, epochs or 1))]
        if any(length is not None and length < interval for length in lengths):
            raise MisconfigurationException(
                f"{self.name} makes epochs of {min(length for length in lengths if length is not None)} batches, but "
                f"Trainer(val_check_interval={interval}) validates after {interval}. Give a fraction such as 1.0, or "
                "`check_val_every_n_epoch=None`."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the loader for this epoch, and tell Lightning how long it is."""
        _loaders(trainer).begin(trainer.current_epoch)

    def samples_of_batch(self, trainer: Trainer) -> list[int]:
        """Return the dataset's indices of the batch that is on its way to the device."""
        return _loaders(trainer).samples_of_batch()

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave; the last one gives the loader back as it was."""
        super().undo(trainer, pl_module)
        loaders = trainer.strategy.__dict__.get("process_dataloader")
        if isinstance(loaders, _Loaders) and self in loaders.tricks:
            loaders.tricks.remove(self)
            if not loaders.tricks:
                loaders.give_back()
                unpatch(trainer.strategy, "process_dataloader", loaders.original)


class _Loaders:
    """Stands in for ``strategy.process_dataloader`` and keeps the training loader's own sampler and batch size."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.original = trainer.strategy.process_dataloader
        self.tricks: list[LoaderTrick] = []
        self.loader: Any = None
        self.batcher: BatchSampler | None = None
        self.sampler: _Selection | None = None

    def __call__(self, loader: Any) -> Any:
        loader = self.original(loader)
        tricks = self._active()
        if not self.trainer.training or not tricks:
            return loader
        several = self.loader is not None and self.trainer.train_dataloader is None
        self.give_back()
        self.loader, self.batcher = loader, None if several else find_batcher(loader)
        if self.batcher is None:
            strict = [trick.name for trick in tricks if not trick.takes_any_loader]
            if strict:
                found = "there are several loaders" if several else f"this one is a {type(loader).__name__}"
                raise MisconfigurationException(
                    f"{' and '.join(strict)} needs one training loader, a DataLoader over a map-style dataset with "
                    f"torch's BatchSampler and `in_order=True`, but {found}."
                )
        else:
            self.sampler = _Selection(self, self.batcher.sampler, self.batcher.batch_size)
            self.batcher.sampler = self.sampler
        self.begin(self.trainer.current_epoch)
        return loader

    def _active(self) -> list[LoaderTrick]:
        return [trick for trick in self.tricks if trick.is_active(self.trainer)]

    def begin(self, epoch: int) -> None:
        """Prepare an epoch."""
        if self.loader is None:
            return
        if self.batcher is not None and self.sampler is not None:
            self.sampler.at_epoch, self.batcher.batch_size = epoch, self._sizes(epoch)[1]
        for trick in self._active():
            trick.change_loader(self.trainer, self.loader, epoch)
        self._tell_length()

    def _sizes(self, epoch: int) -> tuple[int, int]:
        """Return the samples of an epoch and its batch size."""
        assert self.sampler is not None
        samples, size = len(self.sampler.source), self.sampler.batch_size
        for trick in self._active():
            samples, size = trick.samples_in_epoch(epoch, samples), trick.batch_size_in_epoch(epoch, size)
        return samples, size

    def batches_in_epoch(self, epoch: int) -> int | None:
        """Return the batches of an epoch, or None where the loader does not say."""
        if self.batcher is None or self.sampler is None:
            batches = self.trainer.num_training_batches
            return None if batches == math.inf else int(batches)
        samples, size = self._sizes(epoch)
        batches = samples // size if self.batcher.drop_last else math.ceil(samples / size)
        return int(_parse_num_batches(RunningStage.TRAINING, batches, self.trainer.limit_train_batches))

    def _tell_length(self) -> None:
        loop, trainer = self.trainer.fit_loop, self.trainer
        batches = self.batches_in_epoch(trainer.current_epoch) if self.batcher is not None else None
        if batches is None or loop._combined_loader is None:  # before the first epoch Lightning asks the loader
            return
        loop._combined_loader.limits = [batches]
        loop.max_batches = batches
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))

    def samples_of_batch(self) -> list[int]:
        assert self.sampler is not None
        assert self.batcher is not None
        number = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self.sampler.is_fresh:  # a loader that cannot go on in the middle of an epoch begins anew there
            self.sampler.is_fresh = False
            goes_on = hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")
            self.sampler.skipped = 0 if goes_on else number
        begin = (number - self.sampler.skipped) * self.batcher.batch_size
        return self.sampler.order[begin : begin + self.batcher.batch_size]

    def give_back(self) -> None:
        """Put the loader's own sampler and batch size back."""
        if self.batcher is not None and self.sampler is not None:
            self.batcher.sampler, self.batcher.batch_size = self.sampler.source, self.sampler.batch_size
        self.loader = self.batcher = self.sampler = None


class _Selection(Sampler[int]):
    """Stands in for a sampler: its order, less what the tricks leave out."""

    def __init__(self, loaders: _Loaders, source: Any, batch_size: int) -> None:
        self.loaders, self.source, self.batch_size = loaders, source, batch_size
        self.at_epoch, self.order = 0, list[int]()
        self.is_fresh, self.skipped = True, 0

    def __len__(self) -> int:
        return self.loaders._sizes(self.at_epoch)[0]

    def __iter__(self) -> Iterator[int]:
        order = [int(index) for index in self.source]
        for trick in self.loaders._active():
            order = trick.select(self.loaders.trainer, self.at_epoch, order)
        self.order, self.is_fresh = order, True
        return iter(order)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, as to a DistributedSampler."""
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)


def find_batcher(loader: Any) -> BatchSampler | None:
    """Return the batch sampler that makes a loader's batches of indices, or None if it has none that can be changed.

    Args:
        loader: Any training loader.
    """
    if not isinstance(loader, DataLoader) or not getattr(loader, "in_order", True):
        return None
    # With `batch_size=None` the sampler may hand out whole batches of indices.
    batcher = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    own = type(batcher).__module__.startswith("torchdata.") or type(batcher).__iter__ is BatchSampler.__iter__
    if not isinstance(batcher, BatchSampler) or not own or not isinstance(batcher.sampler, Sized):
        return None
    return batcher


def _loaders(trainer: Trainer) -> _Loaders:
    loaders = trainer.strategy.__dict__["process_dataloader"]
    assert isinstance(loaders, _Loaders)
    return loaders
