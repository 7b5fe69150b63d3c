"""A fit with workers behind its loader is the fit without, to the bit; how many there are, and what is said of them."""

import itertools
import logging
import os
import signal
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

from lightning_speedups import InMemoryLoader, LoaderTuning, PrefetchToDevice, ProgressiveResizing, SubsetTraining
from lightning_speedups.attach import data_wait
from lightning_speedups.attach.range_test import run_range_test
from lightning_speedups.core.range_test import Sweep
from lightning_speedups.tricks.steps import loader_tuning
from lightning_speedups.tricks.steps.loader_tuning import best_count, passed_by, verdict
from zoo import Classifier, Manual, OrderOfEpoch, assert_same_weights, fit_interrupted, images, resume, trainer, weights

pytestmark = pytest.mark.usefixtures("no_process_is_left")

COUNT = 32


def EXAMPLE():
    return {"callbacks": [LoaderTuning()]}


class Numbers(Classifier):
    """Notes the samples of each step, and what the loader shows at the end."""

    def __init__(self):
        super().__init__()
        self.numbers, self.shown = [], None

    def training_step(self, batch, batch_idx):
        self.numbers.append(batch[2].tolist())
        return super().training_step(batch[:2], batch_idx)

    def on_train_end(self):
        loader = self.trainer.train_dataloader
        names = ("num_workers", "prefetch_factor", "pin_memory")
        self.shown = tuple(getattr(loader, name, None) for name in names)


def numbered():
    return TensorDataset(*images(COUNT), torch.arange(COUNT))


def data(dataset=None, **options):
    return DataLoader(dataset or numbered(), **{"batch_size": 8, "shuffle": True, **options})


def fit(*callbacks, loader=None, module=None, val=None, epochs=3, **arguments):
    torch.manual_seed(3)
    module = (module or Numbers)()
    run = trainer(callbacks=[*callbacks], max_epochs=epochs, **arguments)
    if isinstance(loader, LightningDataModule):
        run.fit(module, datamodule=loader)
    else:
        run.fit(module, data() if loader is None else loader, val)
    return module


def own(loader):
    """A loader's attributes but Lightning's notes, which it makes for ever after an error in a `train_dataloader`."""
    return {name: value for name, value in vars(loader).items() if not name.startswith("__pl_")}


def assert_same_fit(one, other):
    assert one.numbers == other.numbers
    assert_same_weights(weights(one), weights(other))


@pytest.fixture
def cpus(monkeypatch):
    """Sets how many CPUs there are."""

    def set_cpus(count):
        monkeypatch.setattr(loader_tuning, "usable_cpus", lambda processes=1: max(1, count // processes))

    set_cpus(2)
    return set_cpus


@pytest.fixture
def said(caplog):
    """Returns the lines that were said."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "LoaderTuning" in record.getMessage()]


@pytest.mark.parametrize(("threads", "workers"), [(1, 3), (3, 1), (4, 0), (6, 0)])
def test_cpus_on_which_torch_computes_are_not_for_workers(threads, workers, cpus, monkeypatch):
    cpus(4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert LoaderTuning().tuned(data()).num_workers == workers


@pytest.mark.parametrize(("count", "workers"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_by_the_cpus_change_neither_samples_nor_order_nor_weights(count, workers, shuffle, cpus, said):
    cpus(count)
    plain, loader = fit(loader=data(shuffle=shuffle)), data(shuffle=shuffle)
    before = own(loader)
    tuned = fit(LoaderTuning(), loader=loader)
    assert_same_fit(tuned, plain)
    assert tuned.shown == (workers, 2 if workers else None, False)
    assert own(loader) == before
    for epoch in range(3):
        assert sorted(itertools.chain(*tuned.numbers[4 * epoch : 4 * epoch + 4])) == list(range(COUNT))
    (line,) = said()
    facts = "a loader is left as it is, since 1 CPU, 1 at work, and `max_workers=8` leave none for workers"
    if workers:
        facts = f"{workers} worker{'s' * (workers > 1)} on {count} CPUs"
    too_short = "the run is too short to tell whether the loader is the bottleneck"
    assert line == f"LoaderTuning: {facts}; {too_short}."


@pytest.mark.parametrize(
    ("loads", "step", "workers"),
    [
        ({1: 0.004}, 0.1, 0),
        ({1: 0.05}, 0.1, 1),
        ({1: 0.2, 2: 0.1}, 0.1, 2),
        ({1: 0.2, 2: 0.102, 4: 0.05}, 0.1, 2),
        ({1: 0.8, 2: 0.4, 4: 0.39, 8: 0.41}, 0.1, 2),
        ({1: 0.8, 2: 0.4}, 0.0, 2),
    ],
)
def test_as_few_workers_are_chosen_as_make_training_as_quick_as_any(loads, step, workers):
    assert best_count(loads, step) == workers


@pytest.mark.parametrize(
    ("load", "tried", "workers"), [(0.001, [1], 0), (0.05, [1], 1), (0.2, [1, 2], 2), (0.8, [1, 2, 4], 4)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_numbers_of_workers_are_tried_until_they_hide_the_loading(load, tried, workers, cpus, said, monkeypatch):
    cpus(8)
    asked, own = [], loader_tuning.try_workers

    def try_workers(loader, count, indices, seconds):
        assert seconds == 1.0
        asked.append(count)
        return load / count, own(loader, count, indices)[1]

    monkeypatch.setattr(loader_tuning, "try_workers", try_workers)
    monkeypatch.setattr(loader_tuning, "step_seconds", lambda trainer, batch: 0.1)
    tuned = fit(LoaderTuning("measure"))
    assert_same_fit(tuned, fit())
    assert asked == tried
    assert tuned.shown[0] == workers
    assert f"{workers} worker{'s' * (workers != 1)} on 8 CPUs" in said()[0]


def test_real_trials_and_rehearsed_steps_change_nothing(cpus):
    assert_same_fit(fit(LoaderTuning("measure")), fit())


def test_a_module_that_cannot_be_rehearsed_is_not_measured(cpus, said):
    torch.manual_seed(3)
    trainer(callbacks=[LoaderTuning("measure")]).fit(Manual(), data(TensorDataset(*images(COUNT))))
    assert "a loader is left as it is, since a trial failed (Manual optimizes manually)" in said()[0]


@pytest.mark.parametrize(
    ("waited", "seconds", "said"),
    [
        (0.4, 10.0, "4% of the time: the loader is not"),
        (0.6, 10.0, "6% of the time: the loader is"),
        (0.0, 0.0, "too short"),
    ],
)
def test_the_loader_is_the_bottleneck_if_training_waits_for_a_twentieth_of_the_time(waited, seconds, said):
    assert said in verdict(waited, seconds)
    assert ("is not" in verdict(waited, seconds)) == (waited == 0.4)


@pytest.mark.parametrize(("wait", "share"), [(3.0, "75%"), (0.0, "0%")])
def test_waits_are_those_for_batches_after_the_first_ones(wait, share, cpus, said, monkeypatch):
    now = 100.0

    class Clock:
        def perf_counter(self):
            return now

    class Waits(Dataset):
        def __getitem__(self, index):
            nonlocal now
            now += wait
            return numbered()[index]

        def __len__(self):
            return COUNT

    class Works(Numbers):
        def training_step(self, batch, batch_idx):
            nonlocal now
            now += 1.0
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(data_wait, "time", Clock())
    fit(LoaderTuning(max_workers=0), loader=data(Waits(), batch_size=1), module=Works)
    (line,) = said()
    assert f"training waits for data {share} of the time" in line


class Pair:
    def __init__(self):
        self.image = torch.ones(2)


class Pins(Pair):
    def pin_memory(self):
        return self


def test_types_are_told_that_hold_tensors_and_that_pinning_passes_by():
    batch = {"images": [torch.ones(2)], "pairs": (Pair(), Pins()), "name": "a", "encoded": UserDict(ids=torch.ones(2))}
    assert passed_by(batch) == {"Pair"}
    assert passed_by([torch.ones(2), 3, None]) == set()


@pytest.mark.parametrize("tune", ["cpus", "measure"])
def test_a_number_of_workers_that_the_user_chose_stays(tune, cpus, said):
    cpus(8)
    tuned = fit(LoaderTuning(tune), loader=data(num_workers=1))
    assert_same_fit(tuned, fit(loader=data(num_workers=1)))
    assert tuned.shown[0] == 1
    assert "a loader is left as it is, since it has workers" in said()[0]


def test_no_worker_is_started_where_none_is_wanted(cpus, said):
    assert_same_fit(fit(LoaderTuning(max_workers=0)), fit())
    assert "since 2 CPUs, 1 at work, and `max_workers=0` leave none for workers" in said()[0]


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*numbered().tensors, strict=True)


class OwnLoader:
    """No DataLoader at all."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(data(shuffle=False))


class Alone(Dataset):
    """No worker can load it."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if get_worker_info() is not None:
            raise OSError("not from here")
        return numbered()[index]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DataLoader(Stream(), batch_size=8), "an IterableDataset gives other samples"),
        (lambda: InMemoryLoader(list(numbered().tensors), 8), "checkpoints hold its place in an epoch"),
        (lambda: data(num_workers=1, persistent_workers=True), "it has workers"),
        (OwnLoader, "a OwnLoader is no DataLoader"),
        (lambda: data(Alone()), "a trial failed (OSError: not from here)"),
    ],
)
def test_other_loaders_are_left_as_they_are_and_it_is_said_why(make, reason, cpus, said):
    tuned = fit(LoaderTuning(), loader=make())
    assert_same_fit(tuned, fit(loader=make()))
    (line,) = said()
    assert f"a loader is left as it is, since {reason}" in line


class Several(Numbers):
    def training_step(self, batch, batch_idx):
        self.numbers.append(batch["b"][2].tolist())
        return super().training_step(batch["a"], batch_idx)


def test_several_loaders_get_workers_each(cpus):
    def make():
        return {"a": data(), "b": data(batch_size=4, shuffle=False)}

    loaders = make()
    before = [own(loader) for loader in loaders.values()]
    assert_same_fit(fit(LoaderTuning(), loader=loaders, module=Several), fit(loader=make(), module=Several))
    assert [own(loader) for loader in loaders.values()] == before


class Data(LightningDataModule):
    """Knows nothing of it; makes a new loader whenever it is asked."""

    def train_dataloader(self):
        return data()


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_datamodule_stays_untouched_also_if_it_makes_loaders_anew(every, cpus, said):
    options = {"reload_dataloaders_every_n_epochs": every, "epochs": 4}
    tuned = fit(LoaderTuning(), loader=Data(), **options)
    assert_same_fit(tuned, fit(loader=Data(), **options))
    assert tuned.shown[0] == 1
    assert len(said()) == 1


def test_nothing_is_measured_for_loaders_that_are_made_anew(cpus, monkeypatch):
    looked_on, own = [], loader_tuning.try_workers

    def try_workers(loader, count, indices, seconds):
        looked_on.append((count, seconds))
        return own(loader, count, indices)

    cpus(8)
    monkeypatch.setattr(loader_tuning, "try_workers", try_workers)
    fit(LoaderTuning("measure", max_workers=1), loader=Data(), reload_dataloaders_every_n_epochs=1, epochs=2)
    assert looked_on == [(1, 0.0)] * 2


class Aging(Dataset):
    """Samples depend on the epoch, which a hook tells."""

    def __init__(self):
        self.epoch, self.tensors = 0, numbered().tensors

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        inputs, label, number = (part[index] for part in self.tensors)
        return inputs * (1 + self.epoch), label, number


class Tells(Numbers):
    def on_train_epoch_start(self):
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch


def test_what_hooks_change_in_the_dataset_reaches_workers_that_go_on(cpus):
    plain = fit(loader=data(Aging()), module=Tells)
    tuned = fit(LoaderTuning(), loader=data(Aging()), module=Tells)
    assert tuned.shown[0] == 1
    assert_same_fit(tuned, plain)


class Sized(Dataset):
    """Makes images of a size that can be set."""

    def __init__(self):
        self.size, (self.images, self.labels) = 16, images(COUNT, side=16)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return F.interpolate(self.images[index : index + 1], self.size)[0], self.labels[index]


@pytest.mark.parametrize("first", [True, False])
def test_images_that_the_loader_makes_small_are_small_from_workers_too(first, cpus, caplog):
    def tricks(*more):
        return [*more, ProgressiveResizing(by="epoch", multiple=2)][:: 1 if first else -1]

    def run(*more):
        with caplog.at_level(logging.INFO):
            return fit(*tricks(*more), loader=data(Sized()), module=Classifier, epochs=4)

    tuned, plain = run(LoaderTuning()), run()
    assert "on the device only" not in caplog.text
    assert [inputs.shape for inputs, _ in tuned.seen] == [inputs.shape for inputs, _ in plain.seen]
    assert_same_weights(weights(tuned), weights(plain))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", ["loss", "infobatch"])
def test_a_subset_is_the_same_with_workers(first, method, cpus):
    def run(*more):
        tricks = [*more, SubsetTraining(0.5, method=method, stop_at=1.0, seed=5)]
        return fit(*tricks[:: 1 if first else -1], epochs=4)

    tuned, plain = run(LoaderTuning()), run()
    assert tuned.shown[0] == 1
    assert len(plain.numbers) == 4 + 3 * 2
    assert_same_fit(tuned, plain)


class Looks(Callback):
    """Asks the loader for a batch before the first step."""

    def on_train_start(self, trainer, pl_module):
        next(iter(trainer.train_dataloader))


def test_a_subset_knows_its_samples_also_if_somebody_else_has_looked_at_the_loader(cpus):
    def run(*more):
        subset = SubsetTraining(0.5, method="loss", stop_at=1.0, seed=5)
        return fit(*more, subset, Looks(), loader=data(generator=torch.Generator().manual_seed(7)), epochs=4)

    assert_same_fit(run(LoaderTuning()), run())


class Sweeps(Callback):
    """Makes a range test on a copy, which copies the loader, before the first step."""

    def on_train_start(self, trainer, pl_module):
        run_range_test(trainer, pl_module, Sweep(1e-6, 1e-3, 10, "minimum", 0.9, 4.0))


@pytest.mark.parametrize("trick", [LoaderTuning, PrefetchToDevice])
def test_a_range_test_takes_nothing_from_the_run(trick, cpus):
    assert_same_fit(fit(trick(), Sweeps()), fit(Sweeps()))


class Dies(Dataset):
    """The system ends the worker that comes to sample 28."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index == 28 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered()[index]


def test_the_error_of_a_worker_that_dies_names_the_cause_and_a_way_out(cpus):
    loader = data(Dies(), shuffle=False)
    before = own(loader)
    with pytest.raises(RuntimeError, match="DataLoader worker") as error:
        fit(LoaderTuning(), loader=loader)
    (note,) = error.value.__notes__
    assert note.startswith("LoaderTuning: 1 worker on 2 CPUs. What kills a worker is most often a lack of memory")
    assert "try a smaller `max_workers`" in note
    assert own(loader) == before


def test_an_error_in_a_worker_is_the_datasets_and_nothing_is_said_of_memory(cpus):
    class Breaks(Dies):
        def __getitem__(self, index):
            if index == 28:
                raise ConnectionError("sample 28")
            return numbered()[index]

    with pytest.raises(ConnectionError, match="Caught ConnectionError in DataLoader worker process 0") as error:
        fit(LoaderTuning(), loader=data(Breaks(), shuffle=False))
    assert not getattr(error.value, "__notes__", [])


def test_an_interrupted_run_goes_on_with_the_same_samples(cpus):
    def make():
        torch.manual_seed(3)
        return Numbers(), data(sampler=OrderOfEpoch(COUNT), shuffle=None)

    whole, parted, resumed = make(), make(), make()
    trainer(callbacks=[LoaderTuning()]).fit(*whole)
    fit_interrupted(*parted, 8, [LoaderTuning()], epoch_end=True)
    resume(*resumed, [LoaderTuning()])
    assert parted[0].numbers + resumed[0].numbers == whole[0].numbers
    assert_same_weights(weights(resumed[0]), weights(whole[0]))


class Pids(Dataset):
    """Says which process has loaded."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return *numbered()[index], os.getpid()


class Validates(Numbers):
    def __init__(self):
        super().__init__()
        self.pids, self.validated = set(), []

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[2].tolist())
        self.pids |= {*batch[3].tolist()}


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_validation_has_workers_too_also_if_its_loader_is_that_of_training(sanity, shared, cpus):
    def run(*callbacks):
        loader = data(Pids(), shuffle=False)
        val = loader if shared else data(Pids(), shuffle=False, batch_size=16)
        before = [own(one) for one in (loader, val)]
        module = fit(*callbacks, loader=loader, val=val, module=Validates, epochs=2, num_sanity_val_steps=sanity)
        assert [own(one) for one in (loader, val)] == before
        return module

    tuned, plain = run(LoaderTuning()), run()
    assert_same_fit(tuned, plain)
    assert tuned.validated == plain.validated
    assert plain.pids == {os.getpid()}
    assert os.getpid() not in tuned.pids


# ---- without a Trainer


def test_a_plain_loader_gets_workers_in_a_copy(cpus):
    def epochs(loader):
        return [[batch[2].tolist() for batch in loader] for _ in range(3)]

    torch.manual_seed(3)
    plain = epochs(data())
    torch.manual_seed(3)
    loader = data()
    before = own(loader)
    tuned = LoaderTuning().tuned(loader)
    assert (tuned.num_workers, loader.num_workers) == (1, 0)
    assert epochs(tuned) == plain
    assert own(loader) == before
    assert epochs(tuned)[0] != plain[0]


def test_a_plain_loader_gets_as_many_as_hide_its_loading_in_a_step(cpus, monkeypatch):
    cpus(8)
    monkeypatch.setattr(loader_tuning, "try_workers", lambda loader, count, indices, seconds: (0.2 / count, []))
    assert [LoaderTuning("measure").tuned(data(), step).num_workers for step in (9.0, 0.2, 0.1, 0.0)] == [0, 1, 2, 4]


def test_a_plain_loader_that_cannot_have_workers_is_said_to_be_left(cpus, said):
    loader = LoaderTuning().tuned(DataLoader(Stream(), batch_size=8))
    assert len([*loader]) == 4
    reason = "an IterableDataset gives other samples to another number of workers"
    assert said() == [f"LoaderTuning: a loader is left as it is, since {reason}."]


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="Expected `tune` to be 'cpus' or 'measure', but got 'auto'"):
        LoaderTuning("auto")
    with pytest.raises(ValueError, match="Expected `max_workers` to be a whole number of 0 or more, but got -1"):
        LoaderTuning(max_workers=-1)
