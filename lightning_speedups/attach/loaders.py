"""The training loader from epoch to epoch: which samples, in which batches, and epochs whose length Lightning is told.

``strategy.process_dataloader`` is the one place that sees each training loader, a distributed sampler included, before
the first epoch's iterator starts, which is earlier than any hook of the training loop.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterator, Sized
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lightning_speedups.attach.trick import Trick, patch, unpatch


class LoaderTrick(Trick):
    """A trick that changes what the training loader hands out in an epoch.

    A subclass says how many samples an epoch has and in which batches (`samples_in_epoch`, `batch_size_in_epoch`: known
    for every epoch before the run, so that schedules know its length), which ones (`select`), and may change the
    dataset (`change_loader`).
    """

    takes_any_loader: bool = False
    """Whether the trick can do without a loader that it can change."""

    def samples_in_epoch(self, epoch: int, samples: int) -> int:
        """Return how many of this rank's samples an epoch has."""
        return samples

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        """Return the batch size of an epoch, in samples."""
        return batch_size

    def select(self, trainer: Trainer, epoch: int, order: list[int]) -> list[int]:
        """Return the samples of an epoch, as many as promised, from all of this rank's in their order; asked only in
        epochs that have fewer.
        """
        return order

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Prepare a loader or its dataset for an epoch, before its iterator starts; may be called twice."""

    def see_evaluation_loader(self, trainer: Trainer, loader: Any) -> None:
        """Look at a validation loader of the fit, before its iterator starts."""

    def own_batcher(self, trainer: Trainer) -> BatchSampler | None:
        """Return what batches the one training loader's indices, or None if there is none that can be changed."""
        return _loaders(trainer).batcher

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look at loaders, now that tuners, which leave some behind, have had their trial runs."""
        super().on_fit_start(trainer, pl_module)
        trainer.fit_loop._combined_loader = None  # Lightning asks for it anew
        _loaders(trainer).is_open = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up with a resumed run, and refuse epochs that are too short."""
        super().on_train_start(trainer, pl_module)
        loaders = _loaders(trainer)
        loaders.start()
        planned = [loaders.batches_in_epoch(epoch) for epoch in range(max(1, trainer.max_epochs or 1))]
        lengths = [length for length in planned if length is not None]
        if lengths and min(lengths) == 0:
            raise MisconfigurationException(
                f"{self.name} makes an epoch of too few samples for one batch. Keep more of them, make the batches "
                "smaller, or use `drop_last=False`."
            )
        interval = trainer.val_check_interval
        if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not trainer.limit_val_batches:
            return
        if lengths and min(lengths) < interval:
            raise MisconfigurationException(
                f"{self.name} makes epochs of {min(lengths)} batches, but Trainer(val_check_interval={interval}) "
                f"validates after {interval}. Give a fraction such as 1.0, or `check_val_every_n_epoch=None`."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the loader for this epoch, and tell Lightning how long it is."""
        super().on_train_epoch_start(trainer, pl_module)
        _loaders(trainer).has_all = True
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
        self.is_open = False
        self.loaders: list[Any] = []
        self.has_all = True  # Lightning hands over one loader after the other, and then starts an epoch
        self.batcher: BatchSampler | None = None
        self.sampler: _Selection | None = None
        self.epoch = 0
        self.order: list[Any] | None = None  # of the epoch under way; None before its first batch
        self.skipped = 0
        self.early = 0  # the id of Lightning's iterator, if it had one when the epoch began
        self.hushed: Any = None

    def __call__(self, loader: Any) -> Any:
        loader = self.original(loader)
        tricks = self._active()
        if not self.is_open:
            return loader
        if not self.trainer.training or not tricks:
            for trick in tricks:
                trick.see_evaluation_loader(self.trainer, loader)
            return loader
        if self.has_all:  # the first, or the first of those that Lightning reloads
            self.give_back()
        self.has_all = False
        self.loaders.append(loader)
        several = len(self.loaders) > 1
        self._restore_batcher()
        self.batcher = None if several else find_batcher(loader)
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

    def start(self) -> None:
        """Catch up with a run that goes on from a checkpoint."""
        self.has_all, loop, epoch = True, self.trainer.fit_loop, self.trainer.current_epoch
        progress = loop.epoch_loop.batch_progress
        if self.epoch != epoch:
            # The checkpoint stood behind the last batch of an epoch. Lightning has made that epoch's iterator, and
            # would go on with it; and it finds that the epoch was over by comparing it with the next one's length.
            self.begin(epoch)
            assert loop._data_fetcher is not None
            if self.sampler is not None:
                self.sampler.first = None
            iter(loop._data_fetcher)
            progress.current.completed = max(progress.current.completed, self.batches_in_epoch(epoch) or 0)
        self.early = id(self._iterator())
        if loop.epoch_loop.restarting and progress.is_last_batch and self.hushed is None:
            # Lightning takes any number of steps that is no multiple of this epoch's for the middle of an epoch.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            self.hushed = warnings.filters[0]

    def begin(self, epoch: int) -> None:
        """Prepare an epoch."""
        self.epoch, self.order, self.early = epoch, None, id(self._iterator())
        if callable(set_epoch := getattr(self.sampler and self.sampler.source, "set_epoch", None)):
            set_epoch(epoch)  # Lightning does so too late for workers that fetch ahead in a resumed epoch
        for loader in self.loaders:
            for trick in self._active():
                trick.change_loader(self.trainer, loader, epoch)
        if self.batcher is not None and self.sampler is not None:  # only now: a trick may have to see the loader first
            self.batcher.batch_size = self._sizes(epoch)[1]
        self._tell_length()

    def _sizes(self, epoch: int) -> tuple[int, int]:
        """Return the samples of an epoch and its batch size."""
        assert self.sampler is not None
        samples, size = len(self.sampler.source), self.sampler.batch_size
        for trick in self._active():
            samples, size = trick.samples_in_epoch(epoch, samples), trick.batch_size_in_epoch(epoch, size)
        return samples, size

    @property
    def own_batch_size(self) -> int | None:
        """The loader's batch size without the tricks, or None where they cannot change it."""
        return None if self.sampler is None else self.sampler.batch_size

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
        batches = self.batches_in_epoch(self.epoch) if self.batcher is not None else None
        if batches is None or not self.has_all:  # before its first epoch Lightning asks the loader
            return
        assert loop._combined_loader is not None
        loop._combined_loader.limits = [batches]
        loop.max_batches = batches
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))

    def _iterator(self) -> Any:
        """Return Lightning's iterator over the first loader, if there is one."""
        iterators = getattr(getattr(self.trainer.fit_loop._combined_loader, "_iterator", None), "iterators", None)
        return iterators[0] if iterators else None

    def samples_of_batch(self) -> list[Any]:
        assert self.sampler is not None
        assert self.batcher is not None
        number = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        iterator, loader = self._iterator(), self.loaders[0]
        if self.order is None:  # others may iterate over the loader too, before and after, and draw other orders
            goes_on = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
            # A loader that cannot go on in the middle of an epoch begins anew there.
            self.skipped = 0 if goes_on else number
            # Workers have drawn theirs when Lightning made its iterator: long ago, or just before this batch.
            is_early, first = loader.num_workers > 0 and id(iterator) == self.early, self.sampler.first
            self.order = first if is_early and first is not None else self.sampler.order
        order, place = self.order, number - self.skipped
        if isinstance(iterator, _MultiProcessingDataLoaderIter) and iterator._persistent_workers:
            # There is one for all: whoever iterates over the loader begins Lightning's iterator anew.
            order, place = self.sampler.order, iterator._num_yielded - 1
        begin = place * self.batcher.batch_size
        return order[begin : begin + self.batcher.batch_size]

    def _restore_batcher(self) -> None:
        if self.batcher is not None and self.sampler is not None:
            self.batcher.sampler, self.batcher.batch_size = self.sampler.source, self.sampler.batch_size
        self.batcher = self.sampler = self.order = None

    def give_back(self) -> None:
        """Put the loader's own sampler and batch size back."""
        self._restore_batcher()
        self.loaders = []
        if self.hushed in warnings.filters:
            warnings.filters.remove(self.hushed)  # type: ignore[attr-defined]
        self.hushed = None


class _Selection(Sampler[Any]):
    """Stands in for a sampler: its order, less what the tricks leave out."""

    def __init__(self, loaders: _Loaders, source: Any, batch_size: int) -> None:
        self.loaders, self.source, self.batch_size = loaders, source, batch_size
        self.order = list[Any]()
        self.first: list[Any] | None = None  # since Lightning was given the loader

    def __len__(self) -> int:
        return self.loaders._sizes(self.loaders.epoch)[0]

    def __iter__(self) -> Iterator[Any]:
        if len(self) == len(self.source):  # one by one: asked for more than is needed, samplers draw more
            order = self._note([])
            for index in self.source:
                order.append(_plain(index))
                yield index
        else:
            order = [_plain(index) for index in itertools.islice(self.source, len(self.source))]
            for trick in self.loaders._active():
                order = trick.select(self.loaders.trainer, self.loaders.epoch, order)
            yield from self._note(order)

    def _note(self, order: list[Any]) -> list[Any]:
        self.order = order
        self.first = order if self.first is None else self.first
        return order

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: Lightning calls this before any callback's ``on_train_epoch_start``, a progress bar's too."""
        self.loaders.begin(epoch)


def _plain(index: Any) -> Any:
    """Make an int of what stands for one; a dataset may have other keys."""
    try:
        return operator.index(index)
    except TypeError:
        return index


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
