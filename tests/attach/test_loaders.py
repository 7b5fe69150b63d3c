"""What an epoch hands out when tricks change it, what Lightning believes of it, and the loader as it was afterwards."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.loaders import LoaderGrip, LoaderSwap, find_batcher
from lightning_speedups.attach.run_length import batches_in_epoch, run_length
from lightning_speedups.attach.trick import Trick
from zoo import Batches, Classifier, OrderOfEpoch, ReplayLoader, fit_interrupted, images, resume, trainer


class Planned(LoaderGrip):
    def of(self, epoch):
        plan = self.trick.plan
        return plan[epoch] if epoch < len(plan) else (1.0, None)

    def samples_in_epoch(self, epoch, samples):
        return round(self.of(epoch)[0] * samples)

    def batch_size_in_epoch(self, epoch, batch_size):
        return self.of(epoch)[1] or batch_size

    def select(self, trainer, epoch, order):
        return order[len(order) - self.samples_in_epoch(epoch, len(order)) :]

    def change_loader(self, trainer, loader, epoch):
        self.trick.changed.append((loader, epoch))


class Plan(BatchTrick):
    """Epochs by a plan of (share of the samples, batch size), then full ones; notes what it is told of each batch."""

    batch_order = BatchOrder.LOOK

    def __init__(self, *plan, any_loader=False):
        super().__init__()
        self.plan = plan
        self.told, self.changed = [], []
        self.loader = Planned(self, any_loader)
        self.grips = (self.loader,)

    def change_batch(self, trainer, pl_module, batch):
        if not self.loader.any_loader:
            self.told.append(self.loader.samples_of_batch())
        return batch


class Numbered(Classifier):
    def __init__(self):
        super().__init__()
        self.numbers, self.totals, self.lengths = [], [], []

    def training_step(self, batch, batch_idx):
        self.numbers.append(batch[2].tolist())
        self.lengths.append(self.trainer.num_training_batches)
        return super().training_step(batch[:2], batch_idx)

    def on_train_start(self):
        run = self.trainer
        epochs = run.max_epochs
        self.totals = [
            run_length(run).batches,
            run_length(run).steps_in_epochs(epochs),
            [batches_in_epoch(run, e) for e in range(epochs)],
        ]


def numbered(count=32):
    return TensorDataset(*images(count), torch.arange(count))


def ordered(count=32, **options):
    return DataLoader(numbered(count), **{"batch_size": 8, "sampler": OrderOfEpoch(count), **options})


def order_of(epoch, count=32):
    sampler = OrderOfEpoch(count)
    sampler.set_epoch(epoch)
    return list(sampler)


def expected(plan, epochs=4, size=8, drop_last=False, limit=None, count=32):
    """The batches of the samples' numbers that a plan means."""
    batches = []
    for epoch in range(epochs):
        share, other = plan[epoch] if epoch < len(plan) else (1.0, None)
        kept = order_of(epoch, count)[count - round(share * count) :]
        step = other or size
        parts = [kept[begin : begin + step] for begin in range(0, len(kept), step)]
        batches.append([part for part in parts if not drop_last or len(part) == step][:limit])
    return batches


def flat(batches):
    return [batch for epoch in batches for batch in epoch]


PLAN = ((1.0, None), (0.5, None), (0.7, 4), (1.0, 16))


def fit(trick, data, module=None, callbacks=(), epochs=4, val=None, **arguments):
    module = module or Numbered()
    run = trainer(
        callbacks=[*callbacks, *(trick if isinstance(trick, list) else [trick])], max_epochs=epochs, **arguments
    )
    run.fit(module, data, val)
    return module, run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_last": True},
        {"num_workers": 2},
        {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4},
        {"batch_sampler": BatchSampler(OrderOfEpoch(32), 8, False)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_each_epoch_has_its_samples_in_batches_of_its_size_and_lightning_knows_how_many(options):
    if "batch_sampler" in options:
        options = {**options, "batch_size": 1, "sampler": None}
    trick = Plan(*PLAN)
    module, _ = fit(trick, ordered(**options))
    batches = expected(PLAN, drop_last=options.get("drop_last", False))
    assert module.numbers == trick.told == flat(batches)
    lengths = [len(epoch) for epoch in batches]
    assert module.lengths == [length for length in lengths for _ in range(length)]
    assert module.totals == [sum(lengths), sum(lengths), lengths]


def test_whole_batches_as_samples():
    class Whole(TensorDataset):
        def __getitem__(self, indices):
            return [part[indices] for part in self.tensors]

    data, sampler = Whole(*numbered().tensors), OrderOfEpoch(32)
    module, _ = fit(Plan(*PLAN), DataLoader(data, batch_size=None, sampler=BatchSampler(sampler, 8, False)))
    assert module.numbers == flat(expected(PLAN))


@pytest.mark.parametrize(("limit", "lengths"), [(3, [3, 2, 3, 2]), (0.5, [2, 1, 3, 1]), (1, [1, 1, 1, 1])])
def test_limits_on_the_batches_hold_in_each_epoch(limit, lengths):
    trick = Plan(*PLAN)
    module, _ = fit(trick, ordered(), limit_train_batches=limit)
    batches = [epoch[:length] for epoch, length in zip(expected(PLAN), lengths, strict=True)]
    assert module.numbers == trick.told == flat(batches)
    assert module.totals == [sum(lengths), sum(lengths), lengths]


def test_steps_count_accumulation():
    module, run = fit(Plan(*PLAN), ordered(), accumulate_grad_batches=3)
    # 4, 2, 6 and 2 batches.
    assert module.totals[:2] == [14, 2 + 1 + 2 + 1]
    assert run.global_step == 6


def test_max_steps_in_the_middle_of_a_short_epoch():
    module, _ = fit(Plan(*PLAN), ordered(), max_steps=5)
    assert module.numbers == flat(expected(PLAN))[:5]
    assert module.totals[0] == 5


def test_a_shuffled_loader():
    trick = Plan(*PLAN)
    module, _ = fit(trick, DataLoader(numbered(), batch_size=8, shuffle=True))
    assert module.numbers == trick.told
    assert [len(batch) for batch in module.numbers] == [len(batch) for batch in flat(expected(PLAN))]
    assert sorted(flat(module.numbers[:4])) == list(range(32))


def test_two_tricks_work_on_each_other():
    halves, smaller = Plan((1.0, None), (0.5, None)), Plan((1.0, None), (0.5, 4))
    module, _ = fit([halves, smaller], ordered(), epochs=3)
    assert module.numbers[4:6] == [order_of(1)[24:28], order_of(1)[28:]]
    assert module.numbers == halves.told == smaller.told
    assert module.totals[2] == [4, 2, 4]


def test_the_loader_is_asked_to_change_for_each_epoch_before_it_begins():
    trick, data = Plan(*PLAN), ordered()
    fit(trick, data, epochs=3)
    assert {id(loader) for loader, _ in trick.changed} == {id(data)}
    epochs = [epoch for _, epoch in trick.changed]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}


class Totals(TQDMProgressBar):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_epoch_start(self, trainer, *arguments):
        self.seen.append(trainer.num_training_batches)
        super().on_train_epoch_start(trainer, *arguments)


@pytest.mark.parametrize("first", [True, False])
def test_a_progress_bar_before_or_after_it_has_the_right_total(first):
    bar, trick = Totals(), Plan(*PLAN)
    fit([], ordered(), callbacks=[bar, trick] if first else [trick, bar], enable_progress_bar=True)
    assert bar.seen == [4, 2, 6, 2]


class Validations(Callback):
    def __init__(self):
        self.at = []

    def on_validation_start(self, trainer, pl_module):
        self.at.append(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, [4, 6, 12, 14]),
        ({"val_check_interval": 0.5}, [2, 4, 5, 6, 9, 12, 13, 14]),
        ({"val_check_interval": 2}, [2, 4, 6, 8, 10, 12, 14]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9, 12]),
        ({"check_val_every_n_epoch": 2}, [6, 14]),
    ],
)
def test_validation_comes_when_it_should(options, at):
    validations = Validations()
    val = DataLoader(TensorDataset(*images(8)))
    fit(Plan(*PLAN), ordered(), callbacks=[validations], val=val, **options)
    assert validations.at == at


def test_an_interval_longer_than_an_epoch_is_refused_at_fit_start():
    module, val = Numbered(), DataLoader(TensorDataset(*images(8)))
    with pytest.raises(
        MisconfigurationException, match=r"Plan makes epochs of 2 batches.*val_check_interval=3.*after 3"
    ):
        fit(Plan(*PLAN), ordered(), module, val=val, val_check_interval=3)
    assert not module.numbers
    fit(Plan(*PLAN), ordered(), module, val=val, val_check_interval=3, limit_val_batches=0)


def test_an_epoch_without_a_batch_is_refused_at_fit_start():
    module = Numbered()
    with pytest.raises(MisconfigurationException, match="too few samples for one batch"):
        fit(Plan((1.0, None), (0.2, None)), ordered(drop_last=True), module)
    assert not module.numbers


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_the_loader_is_as_before_after_the_fit(failing, several):
    module, sampler = Numbered(), OrderOfEpoch(32)
    data = ordered(sampler=sampler)
    state = (data.sampler, data.batch_sampler, data.batch_sampler.sampler, data.batch_size)
    run = trainer(callbacks=[Plan(*PLAN)] + [Plan()] * several, max_epochs=4)
    if failing:
        module.on_train_batch_end = lambda outputs, batch, batch_idx: 1 / 0 if len(module.numbers) == 6 else None
        with pytest.raises(ZeroDivisionError):
            run.fit(module, data)
        del module.on_train_batch_end
    else:
        run.fit(module, data)
    assert (data.sampler, data.batch_sampler, data.batch_sampler.sampler, data.batch_sampler.batch_size) == state
    assert len(data) == 4
    sampler.set_epoch(9)
    assert [batch[2].tolist() for batch in data] == [order_of(9)[begin : begin + 8] for begin in (0, 8, 16, 24)]
    assert not patched(run)


def test_without_a_change_a_run_is_the_same_to_the_bit():
    plain, with_trick = Numbered(), Numbered()
    with_trick.load_state_dict(plain.state_dict())
    trainer(max_epochs=4).fit(plain, ordered())
    fit(Plan(), ordered(), with_trick)
    assert plain.losses == with_trick.losses


def test_reloaded_loaders_are_changed_too_and_given_back():
    made = []

    class Reloads(Numbered):
        def train_dataloader(self):
            made.append(ordered())
            return made[-1]

    module, trick = Reloads(), Plan(*PLAN)
    run = trainer(callbacks=[trick], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    run.fit(module)
    assert module.numbers == trick.told == flat(expected(PLAN))
    assert len(made) == 4
    assert all(isinstance(data.batch_sampler.sampler, OrderOfEpoch) for data in made)
    assert all(data.batch_sampler.batch_size == 8 for data in made)


def test_the_same_loader_reloaded():
    data, trick, module = ordered(), Plan(*PLAN), Numbered()
    module.train_dataloader = lambda: data
    trainer(callbacks=[trick], max_epochs=4, reload_dataloaders_every_n_epochs=2).fit(module)
    assert module.numbers == trick.told == flat(expected(PLAN))
    assert isinstance(data.batch_sampler.sampler, OrderOfEpoch)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(*numbered().tensors, strict=True))


class Unsized:
    def __iter__(self):
        return iter(range(32))


class OwnBatches(BatchSampler):
    def __iter__(self):
        return iter([[0, 1], [2]])


@pytest.mark.parametrize(
    "data",
    [
        lambda: Batches(*ordered()),
        lambda: DataLoader(Endless(), batch_size=8),
        lambda: ordered(in_order=False),
        lambda: DataLoader(numbered(), batch_sampler=OwnBatches(SequentialSampler(range(3)), 2, False)),
        lambda: DataLoader(numbered(), batch_sampler=[[0, 1], [2, 3]]),
        lambda: ordered(sampler=Unsized()),
        lambda: {"a": ordered(), "b": ordered()},
    ],
)
def test_loaders_that_cannot_be_changed_are_refused_where_they_must_be(data):
    module = Numbered()
    with pytest.raises(
        MisconfigurationException, match=r"Plan needs one training loader, a DataLoader over a map-style"
    ):
        fit(Plan(*PLAN), data(), module)
    assert not module.numbers


class TakesSeveral(Numbered):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


@pytest.mark.parametrize("reload", [0, 1])
def test_a_trick_that_takes_any_loader_is_told_of_each_and_of_the_last_in_every_epoch(reload):
    module, trick = TakesSeveral(), Plan(*PLAN, any_loader=True)
    data = {"a": ordered(), "b": ordered()}
    module.train_dataloader = lambda: data
    trainer(callbacks=[trick], max_epochs=3, reload_dataloaders_every_n_epochs=reload).fit(module)
    assert module.numbers == flat(expected((), epochs=3))
    told = {name: {epoch for other, epoch in trick.changed if other is loader} for name, loader in data.items()}
    assert told == {"a": {0, 1, 2} if reload else {0}, "b": {0, 1, 2}}
    assert all(isinstance(loader.batch_sampler.sampler, OrderOfEpoch) for loader in data.values())


def test_a_trick_that_takes_any_loader_knows_no_length_of_one_that_has_none():
    trick, module = Plan(any_loader=True), Numbered()
    fit(trick, DataLoader(Endless(), batch_size=8), module, epochs=2)
    assert module.totals == [None, None, [None, None]]
    assert len(module.numbers) == 8


def test_find_batcher():
    data = ordered()
    assert find_batcher(data) is data.batch_sampler
    batches = BatchSampler(SequentialSampler(range(32)), 8, False)
    assert find_batcher(DataLoader(numbered(), batch_size=None, sampler=batches)) is batches
    assert find_batcher(DataLoader(numbered(), batch_size=None)) is None
    assert find_batcher([1, 2]) is None


def test_keys_that_are_no_numbers_and_indices_that_are_tensors():
    class Keyed(TensorDataset):
        def __getitem__(self, key):
            return super().__getitem__(int(key[1:]) if isinstance(key, str) else key)

    for sampler, told in (([f"k{i}" for i in range(32)], str), (list(torch.arange(32)), int)):
        trick = Plan((1.0, None), (0.5, None))
        module, _ = fit(trick, DataLoader(Keyed(*numbered().tensors), batch_size=8, sampler=sampler), epochs=2)
        assert module.numbers[4] == list(range(16, 24))
        assert all(type(index) is told for batch in trick.told for index in batch)


def test_others_may_iterate_over_the_loader_in_the_middle_of_an_epoch():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_):
            next(iter(trainer.train_dataloader))

    trick = Plan(*PLAN)
    module, _ = fit(trick, DataLoader(numbered(), batch_size=8, shuffle=True), callbacks=[Looks()])
    assert module.numbers == trick.told


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_the_samples_are_those_of_lightnings_iterator_whoever_else_iterates(hook, whole, options):
    if whole and hook == "on_train_batch_end":
        return  # slow

    class Looks(Callback):
        pass

    def look(self, trainer, *_):
        for _ in trainer.train_dataloader:
            if not whole:
                return

    setattr(Looks, hook, look)
    trick, module = Plan((1.0, None), (0.5, None)), Numbered()
    if options.get("persistent_workers") and hook == "on_train_batch_end":
        trick = Plan()
    fit(trick, DataLoader(numbered(), batch_size=8, shuffle=True, **options), module, [Looks()], epochs=3)
    assert len(module.numbers) > 4
    assert module.numbers == trick.told


@pytest.mark.parametrize("step", [4, 5])
def test_others_iterate_in_a_resumed_run(step):
    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            list(trainer.train_dataloader)

    def data():
        return DataLoader(numbered(), batch_size=8, shuffle=True, num_workers=1)

    fit_interrupted(Numbered(), data(), step, [Plan(*PLAN)], max_epochs=3)
    rest, trick = Numbered(), Plan(*PLAN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume(rest, data(), [Looks(), trick, Looks()], max_epochs=3)
    assert rest.numbers
    assert rest.numbers == trick.told


class ReplayNumbered(ReplayLoader):
    def __init__(self, **options):
        DataLoader.__init__(self, numbered(), **{"batch_size": 8, "sampler": OrderOfEpoch(32), **options})
        self.position = 0


RESUMED = ((1.0, None), (0.5, None), (0.7, 4), (0.25, None), (1.0, 4))
ENDS = [4, 6, 12, 13, 21]


@pytest.mark.parametrize("step", [1, 3, *ENDS[:-1], 9, 15, 20])  # first, middle, ends of epochs, last
def test_a_run_resumed_at_any_step_goes_on_with_the_next_batch(step):
    batches = flat(expected(RESUMED, epochs=5))
    assert len(batches) == 21
    half, rest, trick = Numbered(), Numbered(), Plan(*RESUMED)
    fit_interrupted(half, ReplayNumbered(), step, [Plan(*RESUMED)], max_epochs=5)
    resume(rest, ReplayNumbered(), [trick], max_epochs=5)
    assert half.numbers == batches[:step]
    assert rest.numbers == trick.told == batches[step:]
    assert rest.totals[0] == 21


@pytest.mark.parametrize("step", [2, 4, 5, 6, 12, 13, 15])
def test_workers_that_fetch_ahead_do_so_for_the_right_epoch(step):
    rest, trick = Numbered(), Plan(*RESUMED)
    fit_interrupted(Numbered(), ReplayNumbered(), step, [Plan(*RESUMED)], max_epochs=5)
    resume(rest, ReplayNumbered(num_workers=1), [trick], max_epochs=5)
    assert rest.numbers == trick.told == flat(expected(RESUMED, epochs=5))[step:]


@pytest.mark.parametrize("step", ENDS[:-1])
def test_a_run_resumed_at_the_end_of_an_epoch_warns_of_nothing(step):
    """A plain loader; the warnings are errors here."""
    rest, trick = Numbered(), Plan(*RESUMED)
    for epoch_end in (False, True):
        fit_interrupted(Numbered(), ordered(), step, [Plan(*RESUMED)], epoch_end, max_epochs=5)
        rest, trick = Numbered(), Plan(*RESUMED)
        before = list(warnings.filters)
        resume(rest, ordered(), [trick], max_epochs=5)
        assert list(warnings.filters) == before
        assert rest.numbers == trick.told == flat(expected(RESUMED, epochs=5))[step:]


@pytest.mark.parametrize("step", [5, 9])
def test_a_plain_loader_resumed_in_the_middle_of_an_epoch_begins_it_anew(step):
    rest, trick = Numbered(), Plan(*RESUMED)
    fit_interrupted(Numbered(), ordered(), step, [Plan(*RESUMED)], max_epochs=5)
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        resume(rest, ordered(), [trick], max_epochs=5)
    epoch = next(i for i, end in enumerate(ENDS) if step < end)
    batches = expected(RESUMED, epochs=5)
    done = step - ([0, *ENDS])[epoch]
    assert rest.numbers == trick.told == batches[epoch][: len(batches[epoch]) - done] + flat(batches[epoch + 1 :])


# Epochs of 4, 3, 3 and 4 batches: after 6 steps Lightning takes the second one to be over, as 6 is a multiple of 3; and
# where an epoch is a single step, it takes each for over. After 8 steps it sees what is.
@pytest.mark.parametrize(("step", "options"), [(6, {}), (8, {}), (9, {}), (0, {"accumulate_grad_batches": 4})])
def test_a_plain_loader_that_begins_an_epoch_anew_is_warned_of_once_also_where_lightning_does_not_see_it(step, options):
    def tricks():
        return [Plan((1.0, None), (0.7, None), (0.7, None)), Plan()]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit_interrupted(Numbered(), ordered(), step, tricks(), max_epochs=4, **options)
        resume(Numbered(), ordered(), tricks(), max_epochs=4, **options)
    (one,) = [str(one.message) for one in told if "ended before the epoch ended" in str(one.message)]
    assert "beside Plan the training loader cannot go on" in one


class Torchdatas(ReplayLoader):
    """Asks its batch sampler for the order's state, which a trick's stand-in does not have."""

    def __init__(self, sampler):
        batches = type("Torchdatas", (BatchSampler,), {"__module__": "torchdata.stateful_dataloader.sampler"})
        DataLoader.__init__(self, numbered(), batch_sampler=batches(sampler, 8, False))
        self.position = 0


@pytest.mark.parametrize("step", [2, 5])
def test_torchdatas_loader_is_warned_of_unless_its_order_is_the_same_again(step):
    fit_interrupted(Numbered(), Torchdatas(range(32)), step, [Plan()])
    for sampler in (range(32), SequentialSampler(range(32)), DistributedSampler(range(32), 1, 0)):
        resume(Numbered(), Torchdatas(sampler), [Plan()])  # warnings are errors here
    with pytest.warns(UserWarning, match="ended before the epoch ended, and beside Plan"):
        resume(Numbered(), Torchdatas(RandomSampler(range(32))), [Plan(), Plan()])


@pytest.mark.parametrize("finder", ["rate", "size"])
def test_lightnings_tuners_see_the_whole_loader_and_the_run_the_plan(finder):
    class Tuned(Numbered):
        def __init__(self):
            super().__init__()
            self.batch_size = 8

        def train_dataloader(self):
            return ordered(batch_size=self.batch_size)

        def val_dataloader(self):
            return DataLoader(TensorDataset(*images(8)))

    class Starts(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.numbers.clear()

    options = {
        "rate": LearningRateFinder(num_training_steps=3),
        "size": BatchSizeFinder(max_trials=1, steps_per_trial=1),
    }
    module, trick = Tuned(), Plan(*PLAN)
    run = trainer(callbacks=[options[finder], Starts(), trick], max_epochs=4)
    run.fit(module)
    size = 8 if finder == "rate" else module.batch_size
    assert module.numbers == trick.told == flat(expected(PLAN, size=size))


def test_a_second_fit_of_the_same_trainer_and_a_copy():
    module, trick, data = Numbered(), Plan(*PLAN), ordered()
    run = trainer(callbacks=[trick], max_epochs=2)
    run.fit(module, data)
    run.fit_loop.max_epochs = 4
    run.fit(module, data)
    assert module.numbers == trick.told == flat(expected(PLAN))
    again = copy.deepcopy(trick)
    again.told.clear()
    module, _ = fit(again, data)
    assert module.numbers == again.told == flat(expected(PLAN))


def test_a_random_sampler_with_its_own_generator_draws_as_without_the_trick():
    def data():
        sampler = RandomSampler(range(32), generator=torch.Generator().manual_seed(1))
        return DataLoader(numbered(), batch_size=8, sampler=sampler)

    plain, with_trick = Numbered(), Numbered()
    trainer(max_epochs=3).fit(plain, data())
    fit(Plan((1.0, None), (0.5, None)), data(), with_trick, epochs=3)
    assert with_trick.numbers == plain.numbers[:4] + plain.numbers[6:]


class Swaps(Trick):
    """Puts copies in the place of loaders, and notes which came by."""

    def __init__(self, order):
        super().__init__()
        self.came, self.made = [], []
        self.grips = (LoaderSwap(self, self.swap, order),)

    def swap(self, trainer, loader):
        self.came.append(loader)
        self.made.append(copy.copy(loader))
        return self.made[-1]


class SeesLoaders(Trick):
    def __init__(self):
        super().__init__()
        self.grips = (LoaderGrip(self),)


@pytest.mark.parametrize("turn", [1, -1])
def test_other_loaders_are_used_and_seen_in_the_place_of_those_given(turn):
    first, second, sees = Swaps(-2), Swaps(-1), SeesLoaders()
    seen = []
    sees.grips[0].change_loader = lambda trainer, loader, epoch: seen.append(loader)
    given, val = DataLoader([*zip(*images(8), strict=True)], 4), DataLoader([*zip(*images(4), strict=True)], 4)
    before = dict(vars(given))
    run = trainer(callbacks=[first, second, sees][::turn], max_epochs=2)
    run.fit(Classifier(), given, val)
    assert first.came == [given, val]
    assert second.came == first.made
    assert run.train_dataloader is second.made[0]
    assert all(loader is second.made[0] for loader in seen)
    assert vars(given) == before
    assert "process_dataloader" not in vars(run.strategy)


def test_loaders_of_tuners_trial_runs_are_left_alone():
    swaps = Swaps(-1)
    finder = LearningRateFinder(num_training_steps=3)
    given = DataLoader([*zip(*images(8), strict=True)], 4)
    run = trainer(callbacks=[finder, swaps], max_epochs=1)
    run.fit(Classifier(), given)
    assert swaps.came == [given]
    assert run.train_dataloader is swaps.made[0]


def test_loaders_of_trial_runs_within_a_fit_are_left_alone():
    class Tries(Classifier):
        def on_train_start(self):
            callbacks, self.trainer.callbacks = self.trainer.callbacks, []
            self.found = self.trainer.strategy.process_dataloader(given)
            self.trainer.callbacks = callbacks

    swaps, module, given = Swaps(-1), Tries(), DataLoader([*zip(*images(8), strict=True)], 4)
    trainer(callbacks=[swaps], max_epochs=1).fit(module, given)
    assert module.found is given
    assert len(swaps.made) == 1
