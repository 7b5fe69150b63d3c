"""A copy of a loader with workers hands out what the loader does, in the same order, and the process draws the same."""

import itertools
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data._utils import signal_handling

from lightning_speedups import InMemoryLoader
from lightning_speedups.attach import workers as module
from lightning_speedups.attach.workers import (
    copy_loader,
    outline,
    reason_against,
    try_workers,
    usable_cpus,
    with_workers,
)

pytestmark = pytest.mark.usefixtures("no_process_is_left")

COUNT = 20


class Numbers:
    """Whole numbers, also many at once."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return torch.as_tensor(index)


def loader(kind, **options):
    data = Numbers()
    kinds = {
        "in order": {"batch_size": 3},
        "shuffled": {"batch_size": 3, "shuffle": True, "drop_last": True},
        "generator": {"batch_size": 3, "shuffle": True, "generator": torch.Generator().manual_seed(5)},
        "subset": {"batch_size": 3, "sampler": SubsetRandomSampler(range(0, COUNT, 2))},
        "weighted": {"batch_size": 3, "sampler": WeightedRandomSampler(torch.ones(COUNT), COUNT)},
        "replaced": {"batch_size": 3, "sampler": RandomSampler(data, replacement=True)},
        "distributed": {"batch_size": 3, "sampler": DistributedSampler(data, 2, 1)},
        "batches": {"batch_sampler": BatchSampler(RandomSampler(data), 3, False)},
        "whole": {"batch_size": None, "sampler": BatchSampler(RandomSampler(data), 3, False)},
        "single": {"batch_size": None, "shuffle": True},
    }
    return DataLoader(data, **(kinds[kind] | options))


KINDS = [
    "in order",
    "shuffled",
    "generator",
    "subset",
    "weighted",
    "replaced",
    "distributed",
    "batches",
    "whole",
    "single",
]


def epochs(data, count=3):
    """The batches of some epochs, before and in which others draw; and what they drew."""
    seen, drawn = [], []
    for _ in range(count):
        iter(data)  # as Lightning does beside its own iterators
        batches = iter(data)
        drawn.append(torch.rand(1).item())
        seen.append([])
        for batch in batches:
            seen[-1].append(batch.tolist())
            drawn.append(torch.rand(1).item())
    return seen, drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [False, True])
def test_batches_order_and_draws_are_those_of_the_loader_without_workers(kind, keep):
    torch.manual_seed(1)
    plain = epochs(loader(kind))
    torch.manual_seed(1)
    ours = loader(kind)
    before = dict(vars(ours))
    twin = with_workers(ours, 2, keep=keep)
    assert epochs(twin) == plain
    assert vars(ours) == before
    assert (twin.persistent_workers, twin.generator) == (False, ours.generator)


@pytest.mark.parametrize("keep", [False, True])
def test_workers_and_settings_of_its_own_stay(keep):
    ours = with_workers(loader("in order", num_workers=1, prefetch_factor=3, in_order=False), 2, keep=keep)
    assert (type(ours), ours.num_workers, ours.prefetch_factor, ours.in_order) == (DataLoader, 1, 3, False)
    assert torch.cat([*ours]).sort()[0].tolist() == [*range(COUNT)]


@pytest.mark.parametrize("pin", [False, True])
def test_memory_is_pinned_if_asked_for_or_if_it_was(pin):
    assert with_workers(loader("in order"), 1, pin).pin_memory == pin
    assert with_workers(loader("in order", pin_memory=True), 1, pin).pin_memory


class Pids:
    """The process that has loaded; a setting that may change."""

    def __init__(self):
        self.size, self.table = 1, torch.zeros(3)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid(), self.size


def pids_and_sizes(data):
    batches = [*data]
    return [{one for batch in batches for one in batch[part].tolist()} for part in (0, 1)]


def test_workers_go_on_from_epoch_to_epoch_until_the_dataset_has_changed():
    twin = with_workers(DataLoader(Pids(), batch_size=2), 2, keep=True)
    first = pids_and_sizes(twin)
    assert pids_and_sizes(twin) == first
    assert len(first[0] - {os.getpid()}) == 2
    twin.dataset.size = 5
    changed = pids_and_sizes(twin)
    assert changed[1] == {5}
    assert not changed[0] & first[0]
    assert pids_and_sizes(twin) == changed
    twin.dataset.table.fill_(3.0)
    assert not pids_and_sizes(twin)[0] & changed[0]


def test_workers_that_are_not_kept_are_others_in_each_epoch():
    twin = with_workers(DataLoader(Pids(), batch_size=2), 1)
    assert pids_and_sizes(twin)[0] != pids_and_sizes(twin)[0]


def test_where_nobody_knows_whether_something_has_changed_they_are_too():
    class Collates:
        lock = None

        def __call__(self, samples):
            return torch.tensor(samples).T

    twin = with_workers(DataLoader(Pids(), batch_size=2, collate_fn=Collates()), 1, keep=True)
    assert pids_and_sizes(twin) == pids_and_sizes(twin)
    twin.collate_fn.lock = threading.Lock()
    assert pids_and_sizes(twin)[0] != pids_and_sizes(twin)[0]


def test_an_epoch_that_is_left_leaves_nothing_to_the_next():
    twin = with_workers(loader("in order"), 2, keep=True)
    for _ in range(2):
        next(iter(twin))
        assert torch.cat([*twin]).tolist() == [*range(COUNT)]


def test_two_can_iterate_at_the_same_time():
    twin = with_workers(loader("in order"), 1, keep=True)
    pairs = [*zip(twin, twin, strict=True)]
    assert torch.cat([one for one, _ in pairs]).tolist() == torch.cat([other for _, other in pairs]).tolist()
    assert torch.cat([*twin]).tolist() == [*range(COUNT)]


class Boasts:
    """Has another length than it says, or says none."""

    def __init__(self, says):
        self.says = says

    def __iter__(self):
        return iter(range(6))


class BoastsOfLength(Boasts):
    def __len__(self):
        return self.says


def test_samplers_that_say_no_length_hand_out_all_and_a_wrong_one_is_an_error():
    twin = with_workers(DataLoader(Numbers(), sampler=Boasts(None)), 1)
    assert [int(batch) for batch in twin] == [*range(6)]
    with pytest.raises(RuntimeError, match="as many batches as its `len`"):
        [*with_workers(DataLoader(Numbers(), sampler=BoastsOfLength(4)), 1)]


def test_a_copy_iterates_in_another_way_and_remembers_no_workers():
    class Backwards(DataLoader):
        def __iter__(self):
            return reversed([*super().__iter__()])

    twin = with_workers(loader("in order"), 1, keep=True)
    ahead = [*twin]
    back = copy_loader(twin, Backwards, drop_last="as you like")
    assert back._iterator is None
    assert [batch.tolist() for batch in back] == [batch.tolist() for batch in reversed(ahead)]
    assert back.drop_last == "as you like"


# ---- what can have workers


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class Own(DataLoader):
    def __iter__(self):
        return iter(())


class Holds(Numbers):
    def __init__(self, thing):
        self.thing = thing


def test_loaders_that_are_left_as_they_are():
    with open(__file__) as file:
        reasons = [
            ([1], "a list is no DataLoader"),
            (DataLoader(Stream()), "an IterableDataset gives other samples"),
            (InMemoryLoader(torch.zeros(4)), "checkpoints hold its place in an epoch"),
            (Own(range(4)), "Own iterates in a way of its own"),
            (DataLoader(Holds(file)), "processes cannot share its Holds (cannot pickle"),
            (DataLoader(Holds({"lock": threading.Lock()})), "processes cannot share its Holds (cannot pickle"),
        ]
        for one, reason in reasons:
            assert reason in reason_against(one)


def test_what_processes_can_share():
    class Local:
        pass

    for thing in (lambda index: index, Local(), torch.zeros(2), np.zeros(3), random.Random(3), [Local()] * 5, Numbers):
        assert reason_against(DataLoader(Holds(thing))) == ""


def test_what_new_interpreters_cannot_be_given_is_refused_where_processes_are_not_forked(monkeypatch):
    monkeypatch.setattr(module.multiprocessing, "get_start_method", lambda: "spawn")
    assert "processes cannot share" in reason_against(DataLoader(Holds(lambda index: index)))
    assert reason_against(DataLoader(Holds(3))) == ""


def test_an_outline_changes_with_settings_and_not_with_reading():
    class Transform:
        def __init__(self):
            self.size, self.steps, self.scale = 24, [1, {"a": (2,)}], torch.ones(2)

    data = Holds(Transform())
    data.names, data.array = [str(number) for number in range(5000)], np.zeros((2, 3))
    outlines = [outline(data)]
    assert outline(data) == outlines[0]

    def changes(change):
        change()
        outlines.append(outline(data))

    changes(lambda: setattr(data.thing, "size", 28))
    changes(lambda: data.thing.steps.append(3))
    changes(lambda: data.thing.steps[1].update(a=(4,)))
    changes(lambda: data.thing.scale.add_(1))
    changes(lambda: data.array.__iadd__(1))
    changes(lambda: setattr(data.thing, "size", lambda: 3))
    changes(lambda: setattr(data, "names", data.names[:4000]))
    assert len(set(outlines)) == 8


def test_large_data_are_not_looked_into():
    assert len(outline(Holds([torch.zeros(10**6), np.zeros(10**6), ["name"] * 10**6, "name" * 10**6]))) < 1000


# ---- trials


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_trial_loads_batches_of_the_loader_draws_nothing_and_moves_no_sampler(kind, count):
    torch.manual_seed(1)
    plain = epochs(loader(kind))
    torch.manual_seed(1)
    ours = loader(kind)
    size = () if kind == "single" else (3,)
    indices = itertools.cycle([0] if kind == "single" else [[0, 1, 2]])
    seconds, batch = try_workers(ours, count, indices, seconds=0.01)
    assert seconds > 0
    assert batch.shape == size
    assert epochs(ours) == plain


class Fails(Numbers):
    """Loads in this process alone."""

    def __init__(self, way):
        self.way = way

    def __getitem__(self, index):
        if get_worker_info() is not None:
            self.way()
        return index


def refuse():
    raise KeyError("the key")


def leave():
    os._exit(3)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("way", "error", "said"),
    [(refuse, KeyError, "the key"), (leave, RuntimeError, "exit"), (die, RuntimeError, "DataLoader worker")],
)
def test_what_goes_wrong_in_a_worker_is_raised(way, error, said, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 2)  # torch is told of a worker's end at once, unless a fit has seen to that
    with pytest.raises(error, match=said):
        try_workers(DataLoader(Fails(way), batch_size=2), 1, itertools.cycle([[0, 1]]))


def test_a_worker_that_hangs_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="timed out"):
        try_workers(DataLoader(Fails(lambda: time.sleep(1.5)), batch_size=2), 1, itertools.cycle([[0, 1]]))


class EndsSoon(Numbers):
    """Its worker dies at the third sample."""

    def __getitem__(self, index):
        return die() if index == 2 else torch.tensor(os.getpid())


@pytest.mark.parametrize("told", [True, False])
def test_that_a_worker_is_gone_is_raised_where_its_batch_was_asked_for(told, monkeypatch):
    ours = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: told and signal_handling._error_if_any_worker_fails())
    try:
        batches = iter(with_workers(DataLoader(EndsSoon()), 1))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.waitid(os.P_PID, int(next(batches)), os.WEXITED | os.WNOWAIT)
        with pytest.raises(RuntimeError, match="DataLoader worker") as error:
            next(batches)
    finally:
        signal.signal(signal.SIGCHLD, ours)
    assert isinstance(error.value.__context__, ConnectionError)


# ---- CPUs


@pytest.fixture
def cpu_max(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(16)}, raising=False)
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("quota", "processes", "cpus"),
    [
        (None, 1, 16), (None, 4, 4), (None, 32, 1), ("max 100000", 1, 16),
        ("350000 100000", 1, 3), ("350000 100000", 2, 1), ("50000 100000", 1, 1), ("9000000 100000", 1, 16),
    ],
)  # fmt: skip
def test_cpus_are_those_that_the_process_may_use(quota, processes, cpus, cpu_max):
    if quota is not None:
        cpu_max.write_text(quota + "\n")
    assert usable_cpus(processes, cpu_max) == cpus


def test_where_there_is_no_affinity_all_are_counted(cpu_max, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cpus(1, cpu_max) == 6
