"""Whole batches: what a DataLoader over the same tensors hands out, in an order that a resumed run goes on with."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from two_processes import Notes, forked

from lightning_speedups import BatchAugmentation, InMemoryLoader, SubsetTraining
from lightning_speedups.core.augmentation import coins
from lightning_speedups.tricks.batches.in_memory import in_memory_loader
from zoo import Batches, Seer, fit_interrupted, images, resume, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def EXAMPLE():
    return {"trainer": {}}  # it is the loader of the tests in here


class Hooked(Seer):
    """Makes its own loaders, in hooks that Lightning watches."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()

    def predict_dataloader(self):
        return self.make()


def numbers(count=10):
    return torch.arange(count), torch.arange(count) * 2.0


def read(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [batch[0].tolist() for batch in loader]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 20])
def test_it_hands_out_what_a_dataloader_does(batch_size, drop_last):
    data = TensorDataset(*images(10))
    for dataset in (data, list(data.tensors), data.tensors):
        ours = list(loader := InMemoryLoader(dataset, batch_size, drop_last=drop_last))
        theirs = list(DataLoader(data, batch_size, drop_last=drop_last))
        assert len(ours) == len(theirs) == len(loader)
        for one, other in zip(ours, theirs, strict=True):
            assert type(one) is type(other)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_a_dictionary_gives_dictionaries_and_a_single_tensor_lists_of_one():
    x, y = numbers()
    (first, _) = InMemoryLoader({"x": x, "y": y}, 5)
    assert first.keys() == {"x", "y"}
    assert torch.equal(first["y"], y[:5])
    assert [len(batch) for batch in InMemoryLoader(x, 5)] == [1, 1]


def test_no_sample_is_touched_on_its_own(monkeypatch):
    monkeypatch.setattr(in_memory_loader._Rows, "__getitem__", lambda *_: 1 / 0)
    assert len(list(InMemoryLoader(numbers(), 5, shuffle=True))) == 2


def test_a_sample_on_its_own_is_there_for_whoever_asks():
    loader = InMemoryLoader(numbers(), 5)
    assert [part.item() for part in loader.dataset[3]] == [3, 6.0]
    assert Subset(loader.dataset, [2, 4])[1][0] == 4


def test_images_with_channels_last_stay_so():
    images = torch.arange(7 * 3 * 4 * 5, dtype=torch.uint8).view(7, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch, rows in InMemoryLoader([images.contiguous(memory_format=layout), torch.arange(7)], 3, shuffle=True):
            assert torch.equal(batch, images[rows])
            assert batch.is_contiguous(memory_format=layout)


def test_batches_are_copies():
    x = torch.zeros(6, 2)
    for (batch,) in InMemoryLoader([x], 6):
        batch.add_(1)
    InMemoryLoader([x], 1).dataset[0][0].add_(1)
    assert not x.any()


def test_each_epoch_has_an_order_of_its_own_that_seed_and_epoch_alone_decide():
    orders = [read(InMemoryLoader(numbers(30), 30, shuffle=True, seed=5), epoch)[0] for epoch in (0, 1, 2)]
    one = InMemoryLoader(numbers(30), 30, shuffle=True, seed=5)
    assert [read(one, epoch)[0] for epoch in (2, 0, 1, 0)] == [orders[2], orders[0], orders[1], orders[0]]
    other = read(InMemoryLoader(numbers(30), 30, shuffle=True, seed=6))[0]
    assert len({tuple(order) for order in (*orders, other, range(30))}) == 5
    assert all(sorted(order) == list(range(30)) for order in (*orders, other))


def test_without_a_seed_it_is_that_of_torchs_generator():
    torch.manual_seed(12)
    loader = InMemoryLoader(numbers(), 10, shuffle=True)
    torch.manual_seed(13)
    assert read(loader) == read(InMemoryLoader(numbers(), 10, shuffle=True, seed=12))


def test_a_sampler_of_ones_own():
    assert read_plain(InMemoryLoader(numbers(), 2, sampler=[4, 1, 3])) == [[4, 1], [3]]


def read_plain(loader):
    return [batch[0].tolist() for batch in loader]


def test_a_trainer_tells_it_the_epoch_and_validation_keeps_the_order():
    module = Seer()
    trainer(max_epochs=3).fit(
        module, InMemoryLoader(numbers(), 10, shuffle=True, seed=1), InMemoryLoader(numbers(), 10)
    )
    expected = [read(InMemoryLoader(numbers(), 10, shuffle=True, seed=1), epoch)[0] for epoch in range(3)]
    assert [batch[0].tolist() for batch in module.seen] == expected
    assert [batch[0].tolist() for batch in module.validated] == [list(range(10))] * 3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", [1.0, 3])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_an_interrupted_run_goes_on_with_the_next_batch(stop, limit, shuffle):
    whole, parted = Seer(), Seer()

    def data():
        return InMemoryLoader(numbers(), 2, shuffle=shuffle)

    torch.manual_seed(1)
    trainer(limit_train_batches=limit).fit(whole, data())
    torch.manual_seed(1)
    fit_interrupted(parted, data(), stop, [], limit_train_batches=limit)
    torch.manual_seed(2)  # the checkpoint knows better
    resume(parted, data(), [], limit_train_batches=limit)
    assert [batch[0].tolist() for batch in parted.seen] == [batch[0].tolist() for batch in whole.seen]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("limit", [1.0, 3])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_resumed_between_epochs_begins_the_next_one(epochs, limit, shuffle):
    def data():
        return InMemoryLoader(numbers(), 2, shuffle=shuffle, seed=4)

    whole, parted = Seer(), Seer()
    trainer(limit_train_batches=limit).fit(whole, data())
    stop = epochs * (3 if limit == 3 else 5)
    fit_interrupted(parted, data(), stop, [], epoch_end=True, limit_train_batches=limit)
    resume(parted, data(), [], limit_train_batches=limit)
    assert [batch[0].tolist() for batch in parted.seen] == [batch[0].tolist() for batch in whole.seen]


class Shuffles(Sampler):
    """A sampler of somebody's own, which draws from Python's generator as it goes."""

    def __len__(self):
        return 10

    def __iter__(self):
        left = list(range(10))
        while left:
            yield left.pop(random.randrange(len(left)))


class Loads(Seer):
    """Lets Lightning make its loaders before it has read the checkpoint."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class Rotates(Shuffles):
    """One's own, whose order follows from the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(3 * self.epoch + place) % 10 for place in range(10)])


def shares():
    return DistributedSampler(range(10), 1, 0, seed=3)


KNOWN = {
    "a list": lambda: {"sampler": [3, 1, 4, 5, 9, 2, 6]},
    "shuffled": lambda: {"shuffle": True},
    "batches in order": lambda: {"batch_size": 1, "batch_sampler": BatchSampler(range(9, -1, -1), 2, True)},
    "distributed": lambda: {"sampler": shares()},
    "distributed batches": lambda: {"batch_size": 1, "batch_sampler": BatchSampler(shares(), 2, False)},
    "a list in shares": lambda: {"sampler": DistributedSamplerWrapper(range(10), num_replicas=1, rank=0)},
    "one's own": lambda: {"sampler": Rotates()},
}
RANDOM = {
    "weighted": lambda: {"sampler": WeightedRandomSampler(torch.ones(10), 10)},
    "random with a generator": lambda: {"sampler": RandomSampler(range(10), generator=torch.Generator())},
    "random batches": lambda: {"batch_size": 1, "batch_sampler": BatchSampler(RandomSampler(range(10)), 2, False)},
    "random in shares": lambda: {
        "sampler": DistributedSamplerWrapper(RandomSampler(range(10)), num_replicas=1, rank=0)
    },
    "one's own": lambda: {"sampler": Shuffles()},
}


def interrupted(make, stop, seer=Seer, callbacks=(), **options):
    """The batches of a run, and of another in two parts, from other random states in the second one."""
    runs = whole, parted = seer(), seer()
    for module in runs:
        random.seed(1)
        torch.manual_seed(1)
        if module is whole:
            trainer(callbacks=[make_one() for make_one in callbacks], **options).fit(module, make())
        else:
            fit_interrupted(module, make(), stop, [make_one() for make_one in callbacks], **options)
    random.seed(2)
    torch.manual_seed(2)
    resume(parted, make(), [make_one() for make_one in callbacks], **options)
    return [[batch[0].tolist() for batch in module.seen] for module in runs]


def of_epoch(batches, stop, length=5):
    """Those of the epoch in which a run was interrupted."""
    return batches[stop // length * length :][:length]


@pytest.mark.parametrize("seer", [Seer, Loads])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", KNOWN)
def test_an_interrupted_epoch_goes_on_in_its_order_also_where_lightning_loads_early(kind, stop, seer):
    def make():
        return InMemoryLoader(numbers(), **{"batch_size": 2, **KNOWN[kind]()})

    length = len(make())
    whole, parted = interrupted(make, stop, seer)
    assert of_epoch(parted, stop, length) == of_epoch(whole, stop, length)
    assert len(parted) == len(whole) == 3 * length


@pytest.mark.parametrize("seer", [Seer, Loads])
@pytest.mark.parametrize("stop", [2, 6])
@pytest.mark.parametrize("kind", RANDOM)
def test_an_interrupted_epoch_is_warned_of_where_its_order_is_gone(kind, stop, seer):
    def make():
        return InMemoryLoader(numbers(), **{"batch_size": 2, **RANDOM[kind]()})

    with pytest.warns(UserWarning, match=r"is resumed within an epoch, but its sampler's order.*Use `shuffle=True`"):
        whole, parted = interrupted(make, stop, seer)
    assert len(parted) == len(whole) == 15


@pytest.mark.parametrize("stop", [2, 6])
def test_tricks_that_know_the_samples_know_those_of_an_interrupted_epoch(stop):
    class Numbered(Seer):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return F.l1_loss(self.layer.weight.sum() * 0 + batch[0], torch.zeros_like(batch[0]))

    subset = SubsetTraining(0.6, stop_at=1.0, seed=1)
    for sampler, says in (
        ([*range(9, -1, -1)], nullcontext()),
        (RandomSampler(range(10)), pytest.warns(UserWarning, match="InMemoryLoader is resumed")),
    ):
        with says:
            whole, parted = interrupted(
                lambda sampler=sampler: InMemoryLoader([torch.arange(10.0)], 2, sampler=sampler), stop, Numbered,
                [lambda: subset],
            )  # fmt: skip
        assert len(parted) == len(whole) == 5 + 3 + 3
        known = subset.saved.losses
        assert torch.equal(known[known.isfinite()], torch.arange(10.0)[known.isfinite()])
        assert known.isfinite().sum() > 5


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("kind", ["a list", "batches in order"])
def test_an_epoch_that_a_limit_ended_leaves_no_place_with_a_sampler_either(kind):
    seen, limits = [], {"limit_train_batches": 3, "max_steps": 9}  # which make Lightning take any resume for one within
    for loader in (DataLoader, InMemoryLoader):
        module = Seer()
        first, second = (loader(TensorDataset(*numbers()), **{"batch_size": 2, **KNOWN[kind]()}) for _ in range(2))
        fit_interrupted(module, first, 3, [], epoch_end=True, **limits)
        resume(module, second, [], **limits)
        seen.append([batch[0].tolist() for batch in module.seen])
    assert seen[0] == seen[1]


def test_outside_a_trainer_a_place_is_taken_up_once_and_by_its_own_epoch_only():
    loader = InMemoryLoader(numbers(), 5, sampler=Rotates())
    state = {"position": 1, "epoch": 0, "seed": None}
    loader.load_state_dict(state)
    assert [len(read_plain(loader)) for _ in range(2)] == [1, 2]
    loader.load_state_dict(state)
    loader.sampler.set_epoch(1)
    assert read_plain(loader) == [[3, 4, 5, 6, 7], [8, 9, 0, 1, 2]]


def test_a_sampler_draws_what_it_does_under_a_dataloader():
    for options in ({"replacement": True, "num_samples": 40}, {}):
        runs = []
        for kind in (InMemoryLoader, DataLoader):
            sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(1), **options)
            loader = kind(TensorDataset(*numbers()), 4, sampler=sampler)
            runs.append([read_plain(loader) for _ in range(3)])
            assert loader.sampler is sampler
        assert runs[0] == runs[1]


def test_a_given_seed_beats_the_checkpoints():
    old, new = (InMemoryLoader(numbers(), 2, shuffle=True, seed=seed) for seed in (1, 2))
    new.load_state_dict(old.state_dict())
    assert read(new) == read(InMemoryLoader(numbers(), 2, shuffle=True, seed=2))


def test_a_place_is_taken_up_once_and_by_its_own_epoch_only():
    loader = InMemoryLoader(numbers(), 2)
    loader.load_state_dict({"position": 3, "epoch": 0, "seed": None})
    assert [len(read(loader)) for _ in range(2)] == [2, 5]
    loader.load_state_dict({"position": 3, "epoch": 0, "seed": None})
    assert [len(read(loader, epoch=1)) for _ in range(2)] == [5, 5]
    assert loader.state_dict() == {"position": 0, "epoch": 1, "seed": None}


def test_an_epoch_that_goes_on_draws_nothing_of_what_its_beginning_drew():
    for position in (0, 1):
        loader = InMemoryLoader(numbers(), 5, shuffle=True, seed=1)
        loader.load_state_dict({"position": position, "epoch": 0, "seed": 1})
        before = torch.get_rng_state()
        next(iter(loader))
        assert torch.equal(torch.get_rng_state(), before) == (position == 1)


def test_an_epoch_left_in_the_middle_is_begun_anew():
    loader = InMemoryLoader(numbers(), 2)
    assert next(iter(loader))[0].tolist() == [0, 1]
    assert len(list(loader)) == 5
    loader.load_state_dict({"position": 2, "epoch": 0, "seed": None})
    assert next(iter(loader))[0].tolist() == [4, 5]
    assert len(list(loader)) == 5


@pytest.mark.parametrize("in_hook", [True, False])
def test_prediction_gives_every_sample_in_order(in_hook):
    def make():
        return InMemoryLoader(numbers(7), batch_size=3, drop_last=True)

    run = trainer()
    batches = run.predict(Hooked(make)) if in_hook else run.predict(Seer(), make())
    assert torch.cat(batches).tolist() == list(range(7))


@pytest.mark.parametrize("in_hook", [True, False])
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_processes_share_the_samples_and_the_coins_of_an_alternating_flip(in_hook, shuffle, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    count, marks = 12, torch.zeros(12, 1, 2, 2)
    marks[..., 0] = torch.arange(1.0, 13).view(-1, 1, 1)

    def make():
        return InMemoryLoader([marks, torch.arange(count)], 3, shuffle=shuffle)

    notes = Notes()
    tricks = [BatchAugmentation(crop=0, flip="alternating", seed=1), notes]
    run = trainer(devices=2, strategy=forked(), max_epochs=2, callbacks=tricks)
    run.fit(*((Hooked(make),) if in_hook else (Seer(), make())))
    ranks = [torch.cat(rank["inputs"]).split(6) for rank in notes.read()]
    for epoch in range(2):
        both = torch.cat([rank[epoch] for rank in ranks])[:, 0, 0]
        samples = both.sum(1).long() - 1
        assert sorted(samples.tolist()) == list(range(count))
        assert torch.equal(both[:, 0] == 0, (coins(1, samples) + epoch) % 2 == 1)
    assert not torch.equal(*(ranks[0][epoch].sum((1, 2, 3)) for epoch in range(2)))  # set_epoch reached the sampler


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_takes_the_same_batches_again():
    for shuffle in (True, False):
        module = Seer()
        trainer(overfit_batches=2, max_epochs=2).fit(module, InMemoryLoader(numbers(), 2, shuffle=shuffle))
        assert [batch[0].tolist() for batch in module.seen] == [[0, 1], [2, 3]] * 2


class Halves(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0] / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"dataset": Halves(torch.ones(3))}, "`dataset` to be .*no subclass, .* but got Halves"),
        ({"dataset": [torch.ones(3), [1, 2, 3]]}, r"but got list of \['Tensor', 'list'\]"),
        ({"dataset": []}, r"but got list of \[\]"),
        ({"dataset": [torch.tensor(1)]}, "`dataset`"),
        ({"dataset": Batches()}, "but got Batches"),
        ({"dataset": numbers(3) + numbers(4)}, r"tensors of one length, but got lengths \[3, 3, 4, 4\]"),
        ({"batch_size": 0}, "`batch_size` to be a whole number of 1 or more, but got 0"),
        ({"seed": 0.5}, "`seed`"),
        ({"collate_fn": list}, "no `collate_fn`"),
        ({"shuffle": True, "sampler": [1]}, "`shuffle` or `sampler`, but got both"),
    ],
)
def test_arguments_it_cannot_use_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        InMemoryLoader(**({"dataset": numbers()} | arguments))
