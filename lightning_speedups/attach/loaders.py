"""The training loader from epoch to epoch: which samples, in which batches, and epochs whose length Lightning is told.

``strategy.process_dataloader`` is the one place that sees each training loader, a distributed sampler included, before
the first epoch's iterator starts, which is earlier than any hook of the training loop.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lightning_speedups.attach.packages import MisconfigurationException, class_of, is_a
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip, Trick
from lightning_speedups.core.counts import counted
from lightning_speedups.tensors.rows import keeps_rows


class LoaderGrip(Grip):
    """A trick's hold on the training loader, to change what it hands out in an epoch, or to know it.

    A subclass says how many samples an epoch has and in which batches (`samples_in_epoch`, `batch_size_in_epoch`: known
    for every epoch before the run, so that schedules know its length), which ones (`select`), and may change the
    dataset (`change_loader`). Or it makes the batches itself (`makes_batches`, `batches_of`), past the sampler.

    Args:
        trick: Whose.
        any_loader: Whether the trick can do without a loader that it can change.
        name: Who needs it, in messages; None: the trick's name.
        reads_rows: Whether each row of a batch must be the sample at that place in the sampler's order.

    Attributes:
        loaders: Who stands at the loader, as long as the fit lasts.
        keeps_order: Whether the trick must know an epoch's order to its end, which is then drawn at the beginning.
        makes_batches: Whether the trick makes the batches itself.
        batches_planned: How many it makes in every epoch; None as long as it does not know the loader.
        planned_size: How many samples they have, on average; None: as the loader says, or nobody knows yet.
        sizes_differ: Whether it makes batches of different sizes, so that no number of them makes so many samples.
    """

    loaders: Loaders
    keeps_order = False
    makes_batches = False
    batches_planned: int | None = None
    planned_size: int | None = None
    sizes_differ = False

    def __init__(
        self, trick: Trick, any_loader: bool = False, name: str | None = None, reads_rows: bool = False
    ) -> None:
        super().__init__(trick)
        self.any_loader, self.name, self.reads_rows = any_loader, name or trick.name, reads_rows

    def samples_in_epoch(self, epoch: int, samples: int) -> int:
        """Return how many of this rank's samples an epoch has."""
        return samples

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        """Return the batch size of an epoch, in samples."""
        return batch_size

    def batches_of(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, of a trick that makes them itself; the same whenever it is asked."""
        raise NotImplementedError

    def epoch_left(self) -> tuple[list[int], int] | None:
        """Return what the sampler had drawn for the epoch that a resumed run goes on with, and how many of its batches
        to leave out; None where the order is drawn anew.
        """
        return None

    def select(self, trainer: Trainer, epoch: int, order: list[int]) -> list[int]:
        """Return the samples of an epoch, as many as promised, from all of this rank's in their order; asked only in
        epochs that have fewer.
        """
        return order

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Prepare the loader or its dataset for an epoch, before its iterator starts; may be called twice.

        Where there are several loaders, each is shown once, and the last one in each epoch.
        """

    def see_evaluation_loader(self, trainer: Trainer, loader: Any) -> None:
        """Look at a validation loader of the fit, before its iterator starts."""

    @property
    def batcher(self) -> BatchSampler | None:
        """What batches the one training loader's indices, or None if there is none that can be changed."""
        selection = self.loaders.selection
        return None if selection is None else selection.batcher

    @property
    def loader(self) -> Any:
        """The training loader; of several the last."""
        return self.loaders.loader

    def samples_of_batch(self) -> list[int]:
        """Return the dataset's indices of the batch that is on its way to the device."""
        return self.loaders.samples_of_batch()

    def rows_of_batch(self) -> list[int]:
        """Return the sample of each row of the batch that is on its way, for a trick that reads them."""
        return self.require_numbers(self.samples_of_batch())

    def require_numbers(self, samples: list[Any]) -> list[int]:
        """Return samples of the training loader's dataset; refuse them if they are not their places in it."""
        size = len(self.loader.dataset)
        if any(not isinstance(sample, int) or not 0 <= sample < size for sample in samples):
            raise MisconfigurationException(
                f"{self.name} needs a sampler of whole numbers, each the place of a sample in the dataset, but the "
                "training loader's gives others. Use a map-style dataset with torch's samplers."
            )
        return samples

    def join(self, trainer: Trainer) -> None:
        """Wait: tuners have their trial runs first. With batches of the trick's own, be there when
        `configure_optimizers` asks for their number.
        """
        if self.makes_batches:
            self._stand_by(trainer)
            Station.of(trainer.strategy, "setup_optimizers").join(self, self._set_up_optimizers)

    def _set_up_optimizers(self, set_up: Callable[..., None], *args: Any) -> None:
        set_up(*args)
        self.loaders.has_all = True  # that `configure_optimizers` has asked for

    def on_fit_start(self, trainer: Trainer) -> None:
        """Join those who see the loader; what tuners have left behind is asked for anew."""
        trainer.fit_loop._combined_loader = None
        if not self.makes_batches:
            self._stand_by(trainer)
        self.loaders.give_back()
        self.loaders.has_all = True

    def _stand_by(self, trainer: Trainer) -> None:
        station = Station.of(trainer.strategy, "process_dataloader")
        self.loaders = station.find(Loaders) or Loaders(trainer)
        if not self.loaders.grips:
            station.join(self.loaders, self.loaders.take, order=1)  # behind those who settle the accumulation
        self.loaders.grips.append(self)

    def batches_done(self) -> int:
        """Return how many batches of the epoch are done; 0 between two epochs."""
        loop: Any = self.loaders.trainer.fit_loop
        done, epoch = loop.epoch_loop.batch_progress.current, loop.epoch_progress.current
        is_last = loop.epoch_loop._num_ready_batches_reached() and done.processed == done.ready
        return 0 if is_last or epoch.processed == epoch.started else done.processed

    def on_train_start(self, trainer: Trainer) -> None:
        """Catch up with a resumed run, and refuse epochs that are too short."""
        self.loaders.start()
        selection = self.loaders.selection
        if selection is None:
            return
        shortest = min(selection.batches_in_epoch(epoch) for epoch in range(max(1, trainer.max_epochs or 1)))
        if shortest == 0:
            raise MisconfigurationException(
                f"{self.name} makes an epoch of too few samples for one batch. Keep more of them, make the batches "
                "smaller, or use `drop_last=False`."
            )
        interval = trainer.val_check_interval
        counts_in_epoch = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None
        if counts_in_epoch and trainer.limit_val_batches and shortest < interval:
            raise MisconfigurationException(
                f"{self.name} makes epochs of {counted(shortest, 'batch')}, but Trainer(val_check_interval={interval}) "
                f"validates after {interval}. Give a fraction such as 1.0, or `check_val_every_n_epoch=None`."
            )

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Change the loader for this epoch, and tell Lightning how long it is."""
        self.loaders.has_all = True
        self.loaders.begin(trainer.current_epoch)

    def leave(self, trainer: Trainer) -> None:
        """Leave; the last one gives the loader back as it was."""
        Station.of(trainer.strategy, "setup_optimizers").leave(self)
        loaders = self.__dict__.pop("loaders", None)
        if loaders is None:
            return
        loaders.grips.remove(self)
        if not loaders.grips:
            loaders.give_back()
            Station.of(trainer.strategy, "process_dataloader").leave(loaders)


class LoaderSwap(Grip):
    """Puts other loaders in the place of those that Lightning begins to use, before a LoaderGrip sees them.

    Args:
        trick: Whose.
        swap: Takes the Trainer and a loader, also of validation, and returns the one to use.
        order: Where among others of this kind, below 0; lower comes first.
    """

    def __init__(self, trick: Trick, swap: Callable[[Trainer, Any], Any], order: int) -> None:
        super().__init__(trick)
        self.swap, self.order = swap, order

    def on_fit_start(self, trainer: Trainer) -> None:
        """Join; what tuners have left behind is asked for anew."""
        trainer.fit_loop._combined_loader = None
        Station.of(trainer.strategy, "process_dataloader").join(self, partial(self._take, trainer), self.order)

    def leave(self, trainer: Trainer) -> None:
        """Leave; the loaders themselves are as they were."""
        Station.of(trainer.strategy, "process_dataloader").leave(self)

    def _take(self, trainer: Trainer, process: Callable[[Any], Any], loader: Any) -> Any:
        loader = process(loader)
        return self.swap(trainer, loader) if self.trick.is_active(trainer) else loader


class Loaders:
    """Stands at ``strategy.process_dataloader`` and takes the training loader over."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.grips: list[LoaderGrip] = []
        self.loader: Any = None  # of several the last
        self.has_all = True  # Lightning hands over one loader after the other, and then starts an epoch
        self.selection: Selection | None = None  # of the only loader, if it can be changed
        self.epoch = 0
        self.order: Order | None = None  # of the epoch under way; None before its first batch
        self.skipped = 0
        self.early = 0  # the id of Lightning's iterator, if it had one when the epoch began
        self.hushed: Any = None
        self.tried: Any = None  # the `collate_fn` that rows are known of

    def take(self, process: Callable[[Any], Any], loader: Any) -> Any:
        """Take a loader over that Lightning begins to use."""
        loader, grips = process(loader), self.active_grips()
        if not self.trainer.training or not grips:
            for grip in grips:
                grip.see_evaluation_loader(self.trainer, loader)
            return loader
        several, self.has_all = not self.has_all, False
        self.give_back()
        self.loader = loader
        batcher = None if several else find_batcher(loader)
        if batcher is not None:
            self.selection = Selection(self, batcher)
            self._try_rows([grip.name for grip in grips if grip.reads_rows])
        elif strict := [grip.name for grip in grips if not grip.any_loader]:
            found = "there are several loaders" if several else f"this one is a {type(loader).__name__}"
            raise MisconfigurationException(
                f"{' and '.join(strict)} needs one training loader, a DataLoader over a map-style dataset with "
                f"torch's BatchSampler and `in_order=True`, but {found}."
            )
        self.begin(self.trainer.current_epoch)
        return loader

    def _try_rows(self, readers: list[str]) -> None:
        """Refuse a loader whose rows are not the samples that some tricks take them for."""
        if not readers or self.loader.collate_fn == self.tried:
            return
        with same_randomness(self.trainer):
            kept = keeps_rows(self.loader)
        if not kept:
            raise MisconfigurationException(
                f"{' and '.join(readers)} knows samples by their places in a batch, but the training loader's "
                "`collate_fn` hands out some in other places, or others in theirs. Let it keep the samples and their "
                "order: `pack_padded_sequence(..., enforce_sorted=False)` needs no sorted ones."
            )
        self.tried = self.loader.collate_fn

    def active_grips(self) -> list[LoaderGrip]:
        """Return the grips of the tricks that the Trainer runs."""
        return [grip for grip in self.grips if grip.trick.is_active(self.trainer)]

    @property
    def batch_size(self) -> int | None:
        """The loader's own batch size, or that of a trick that makes the batches; None where it is not known."""
        told = next((grip.planned_size for grip in self.active_grips() if grip.makes_batches), None)
        return told or (None if self.selection is None else self.selection.own_size)

    def start(self) -> None:
        """Catch up with a run that goes on from a checkpoint."""
        self.has_all, loop, epoch = True, self.trainer.fit_loop, self.trainer.current_epoch
        progress = loop.epoch_loop.batch_progress
        if self.epoch != epoch:
            # The checkpoint stood behind the last batch of an epoch. Lightning has made that epoch's iterator, and
            # would go on with it; and it finds that the epoch was over by comparing it with the next one's length.
            self.begin(epoch)
            if self.selection is not None:
                assert loop._data_fetcher is not None
                self.selection.first = None
                iter(loop._data_fetcher)
                progress.current.completed = max(progress.current.completed, self.selection.batches_in_epoch(epoch))
        self.early = id(self._iterator())
        if loop.epoch_loop.restarting and self.selection is not None and self.hushed is None:
            if progress.current.ready and not progress.is_last_batch and self.epoch_left() is None:
                self._warn_of_order(self.selection.batcher)
            # Lightning takes a number of steps for the end of an epoch if it is a multiple of this epoch's.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            self.hushed = warnings.filters[0]

    def _warn_of_order(self, batcher: BatchSampler) -> None:
        """Say that the epoch, under way already, goes on with samples that it has had."""
        # Torchdata's loader asks its sampler for a state, and not who stands there.
        if not goes_on(self.loader) or (_is_torchdatas(batcher) and not draws_alike(batcher)):
            rank_zero_warn(
                "You're resuming from a checkpoint that ended before the epoch ended, and beside "
                f"{self.grips[0].name} the training loader cannot go on in the order that it had: in this epoch some "
                "samples come again, and others do not come. Use a checkpoint between two epochs, or an "
                "`InMemoryLoader`."
            )

    def epoch_left(self) -> tuple[list[int], int] | None:
        """Return what a trick knows of the epoch that a resumed run goes on with."""
        return next((left for grip in self.active_grips() if (left := grip.epoch_left()) is not None), None)

    def begin(self, epoch: int) -> None:
        """Prepare an epoch."""
        self.epoch, self.order, self.early = epoch, None, id(self._iterator())
        for grip in self.active_grips():
            grip.change_loader(self.trainer, self.loader, epoch)
        if self.selection is not None:  # only now: a trick may have to see the loader first
            self.selection.begin(epoch)
            if self.has_all:  # before its first epoch Lightning asks the loader
                self._tell_length(self.selection.batches_in_epoch(epoch))

    def _tell_length(self, batches: int) -> None:
        loop, trainer = self.trainer.fit_loop, self.trainer
        assert loop._combined_loader is not None
        loop._combined_loader.limits = [batches]
        loop.max_batches = batches
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))

    def _iterator(self) -> Any:
        """Return Lightning's iterator over the only loader, if there is one."""
        iterators = getattr(getattr(self.trainer.fit_loop._combined_loader, "_iterator", None), "iterators", None)
        return iterators[0] if iterators else None

    def samples_of_batch(self) -> list[Any]:
        """Return the dataset's indices of the batch that is on its way."""
        selection, iterator = self.selection, self._iterator()
        assert selection is not None
        number = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        order, place = self.settle_order(number), number - self.skipped
        if _persists(iterator):
            # There is one for all: whoever iterates over the loader begins Lightning's iterator anew.
            order, place = selection.order, iterator._num_yielded - 1
        return order.batch(place, selection.batcher.batch_size)

    def settle_order(self, number: int) -> Order:
        """Return the order of the epoch under way, which its first batch settles: others may iterate over the loader
        too, before and after, and draw other orders.

        Args:
            number: How many batches of the epoch came before the one that is on its way.
        """
        if self.order is None:
            selection, iterator, loader = self.selection, self._iterator(), self.loader
            assert selection is not None
            # A loader that cannot go on in the middle of an epoch begins anew there, or with what is left.
            self.skipped = 0 if goes_on(loader) else number
            # Workers have drawn theirs when Lightning made its iterator: long ago, or just before this batch.
            draws_early = loader.num_workers > 0 and not getattr(loader, "draws_late", False)
            is_early = draws_early and id(iterator) == self.early and not _persists(iterator)
            self.order = selection.first if is_early and selection.first is not None else selection.order
        return self.order

    def give_back(self) -> None:
        """Put the loader's own sampler and batch size back."""
        if self.selection is not None:
            self.selection.give_back()
        self.loader = self.selection = self.order = None
        if self.hushed in warnings.filters:
            warnings.filters.remove(self.hushed)  # type: ignore[attr-defined]
        self.hushed = None


class Order(list[Any]):
    """The samples that an epoch hands out in their order, as far as they are drawn.

    Attributes:
        drawn: All that the sampler has drawn for the epoch, if a trick keeps them.
        cuts: Where batches of a trick's own begin, and the last one ends.
    """

    drawn: list[Any]
    cuts: Sequence[int] = ()

    def batch(self, place: int, size: int) -> list[Any]:
        """Return the samples of a batch; of batches of one size, if they are not a trick's own."""
        if self.cuts:
            return self[self.cuts[place] : self.cuts[place + 1]]
        return self[place * size : (place + 1) * size]


class Selection(Sampler[Any]):
    """Stands in for a loader's sampler: its order, less what the tricks leave out.

    Args:
        loaders: Who took the loader over.
        batcher: What batches the loader's indices; it is changed until `give_back`.
    """

    def __init__(self, loaders: Loaders, batcher: BatchSampler) -> None:
        self.loaders, self.batcher = loaders, batcher
        self.source: Any = batcher.sampler  # the loader's own
        self.own_size = batcher.batch_size
        self.own_class = type(batcher)
        self.order = Order()
        self.first: Order | None = None  # since Lightning was given the loader
        batcher.sampler = self
        if any(grip.makes_batches for grip in loaders.active_grips()):
            batcher.__class__ = Planned  # copies of the loader, and workers that it keeps, hold this very object

    def give_back(self) -> None:
        """Put the loader's own sampler and batch size back."""
        self.batcher.sampler, self.batcher.batch_size = self.source, self.own_size
        self.batcher.__class__ = self.own_class

    @property
    def planner(self) -> LoaderGrip | None:
        """Who makes the batches in the sampler's place, if anybody does."""
        return next((grip for grip in self.loaders.active_grips() if grip.batches_planned is not None), None)

    def begin(self, epoch: int) -> None:
        """Prepare an epoch."""
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)  # Lightning does so too late for workers that fetch ahead in a resumed epoch
        _, self.batcher.batch_size = self._sizes(epoch)

    def _sizes(self, epoch: int) -> tuple[int, int]:
        """Return the samples of an epoch and its batch size."""
        samples, size = len(self.source), self.own_size
        for grip in self.loaders.active_grips():
            samples, size = grip.samples_in_epoch(epoch, samples), grip.batch_size_in_epoch(epoch, size)
        return samples, size

    def batches_in_epoch(self, epoch: int | None) -> int:
        """Return the batches of an epoch; of None those that all would have without the tricks."""
        samples, size = (len(self.source), self.own_size) if epoch is None else self._sizes(epoch)
        batches = samples // size if self.batcher.drop_last else math.ceil(samples / size)
        if (planner := self.planner) is not None:
            batches = planner.batches_planned or 0
        trainer = self.loaders.trainer
        limited = class_of(trainer, "trainer.connectors.data_connector._parse_num_batches")
        stage = class_of(trainer, "trainer.states.RunningStage").TRAINING
        return int(limited(stage, batches, trainer.limit_train_batches))

    def __len__(self) -> int:
        return self._sizes(self.loaders.epoch)[0]

    def __iter__(self) -> Iterator[Any]:
        grips, is_whole = self.loaders.active_grips(), len(self) == len(self.source)
        if is_whole and not any(grip.keeps_order for grip in grips):
            order = self._note(Order())
            for index in self.source:  # one by one: asked for more than is needed, samplers draw more
                order.append(_plain(index))
                yield index
            return
        drawn, done = self.loaders.epoch_left() or (None, 0)
        if drawn is None:
            drawn = [_plain(index) for index in itertools.islice(self.source, len(self.source))]
        chosen = drawn
        for grip in [] if is_whole else grips:
            chosen = grip.select(self.loaders.trainer, self.loaders.epoch, chosen)
        order = self._note(Order(chosen[done * self.batcher.batch_size :]))
        order.drawn = drawn
        yield from order

    def planned(self, planner: LoaderGrip) -> Iterator[list[Any]]:
        """Yield the epoch's batches that a trick has made, of a resumed run those that are left."""
        batches, (_, done) = planner.batches_of(self.loaders.epoch), self.loaders.epoch_left() or (None, 0)
        order = self._note(Order(itertools.chain.from_iterable(batches[done:])))
        order.drawn = [*itertools.chain.from_iterable(batches)]
        order.cuts = [0, *itertools.accumulate(map(len, batches[done:]))]
        yield from batches[done:]

    def _note(self, order: Order) -> Order:
        self.order = order
        self.first = order if self.first is None else self.first
        return order

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: Lightning calls this before any callback's ``on_train_epoch_start``, a progress bar's too."""
        self.loaders.begin(epoch)


class Planned(BatchSampler):
    """What a loader's own batch sampler is while a trick makes the batches: it asks the trick."""

    sampler: Selection

    def __len__(self) -> int:
        planner = self.sampler.planner
        return super().__len__() if planner is None else planner.batches_planned or 0

    def __iter__(self) -> Iterator[list[Any]]:
        planner = self.sampler.planner  # None in a tuner's trial run
        return super().__iter__() if planner is None else self.sampler.planned(planner)


def find_loaders(trainer: Trainer) -> Loaders | None:
    """Return who stands at the training loader, if a trick has a hold on it."""
    return Station.of(trainer.strategy, "process_dataloader").find(Loaders)


def find_selection(trainer: Trainer) -> Selection | None:
    """Return what stands in for the sampler of the training loader, or None where tricks cannot change its epochs."""
    loaders = find_loaders(trainer)
    return None if loaders is None else loaders.selection


def goes_on(loader: Any) -> bool:
    """Tell whether a loader can go on in the middle of an epoch by itself.

    Args:
        loader: Any loader.

    Example:
        >>> goes_on(DataLoader(range(8)))
        False
    """
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _persists(iterator: Any) -> bool:
    """Tell whether an iterator is one for all epochs."""
    return isinstance(iterator, _MultiProcessingDataLoaderIter) and bool(iterator._persistent_workers)


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
    if not isinstance(batcher, BatchSampler) or not _only_cuts(batcher) or not isinstance(batcher.sampler, Sized):
        return None
    return batcher


def _only_cuts(batcher: BatchSampler) -> bool:
    """Tell whether a batch sampler does nothing but cut its sampler's order into batches."""
    return _is_torchdatas(batcher) or type(batcher).__iter__ is BatchSampler.__iter__


def _is_torchdatas(thing: Any) -> bool:
    return type(thing).__module__.startswith("torchdata.")


def draws_alike(sampler: Any) -> bool:
    """Tell whether a sampler, or a batch sampler, has the same order again in a run that goes on within an epoch.

    Args:
        sampler: Torch's, Lightning's or somebody's own, of which nothing is known unless it is told the epoch.

    Example:
        >>> draws_alike(BatchSampler([2, 0, 1], 2, False)), draws_alike({2, 0, 1})
        (True, False)
    """
    if isinstance(sampler, BatchSampler):
        return isinstance(sampler, Planned) or (_only_cuts(sampler) and draws_alike(sampler.sampler))
    if isinstance(sampler, Selection):
        return sampler.loaders.epoch_left() is not None or draws_alike(sampler.source)
    if (wrapped := getattr(getattr(sampler, "dataset", None), "_sampler", None)) is not None:  # by Lightning, for DDP
        return draws_alike(wrapped)
    return hasattr(sampler, "set_epoch") or isinstance(sampler, (Sequence, SequentialSampler))


def each_once(sampler: Any, samples: int) -> bool:
    """Tell whether a sampler hands out each sample once, in any order, or a process's share of them.

    Args:
        sampler: Torch's or Lightning's, of which that is known, or another one, which is asked for an epoch.
        samples: How many there are.

    Example:
        >>> each_once(RandomSampler(range(3)), 3), each_once([2, 0, 1], 3), each_once([2, 2, 0], 3)
        (True, True, False)
    """
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # what Lightning has wrapped, for DDP
    if isinstance(sampler, DistributedSampler):
        return len(sampler.dataset) == samples  # type: ignore[arg-type]
    if len(sampler) != samples or type(sampler) in (RandomSampler, SequentialSampler):
        return len(sampler) == samples and not getattr(sampler, "replacement", False)
    return sorted(map(_plain, itertools.islice(sampler, samples))) == [*range(samples)]


def take_batch(loader: DataLoader[Any], indices: Sequence[Any]) -> Any:
    """Return a batch of a map-style dataset, in this process.

    Args:
        loader: The loader that collates it.
        indices: Which samples.

    Example:
        >>> take_batch(DataLoader(range(8), batch_size=4), [2, 5])
        tensor([2, 5])
    """
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:  # the dataset is given whole batches of indices
        return loader.collate_fn(dataset[list(indices)])
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(indices)) if many else [dataset[index] for index in indices]
    return loader.collate_fn(samples)


def epoch_of_fit() -> int | None:
    """Return the epoch of the fit that asks for a batch, if one does; before, it gives loaders a checkpoint's places.

    Lightning does that when it makes the loaders; where ``configure_optimizers`` reads
    ``trainer.estimated_stepping_batches`` that is before it has read the checkpoint, and the places are lost (#20550).
    """
    frame = inspect.currentframe()
    while frame is not None and not is_a(frame.f_locals.get("self"), "_FitLoop"):
        frame = frame.f_back
    if frame is None:
        return None
    loop = frame.f_locals["self"]
    loop._load_combined_loader_states()
    return int(loop.epoch_progress.current.processed)  # which samplers are told
