"""A run that was interrupted, at any batch, ends with the samples and the bits of one that was not."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_speedups import BatchAugmentation, ExactResume, InMemory, InMemoryLoader, SubsetTraining
from zoo import (
    Classifier,
    Endless,
    Interrupted,
    OrderOfEpoch,
    ReplayLoader,
    assert_same_weights,
    images,
    scaled,
    trainer,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:ExactResume gives workers",
    "ignore:You are using the `dataloader_iter` step flavor",
)
SAMPLES = 30


def EXAMPLE():
    return {"callbacks": [ExactResume()]}


class Noisy(Classifier):
    """Draws in each step; notes the numbers of its samples."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def training_step(self, batch, batch_idx):
        inputs, labels, numbers = batch
        self.numbers.append(numbers.tolist())
        noise = 0.1 * np.random.rand()  # noqa: NPY002
        return super().training_step((F.dropout(inputs + noise, 0.3), labels), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[:2], batch_idx)


class Loads(Noisy):
    """Lets Lightning make its loaders before it has read the checkpoint."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class DrawsAtStart(Noisy):
    """Draws when an epoch begins."""

    def on_train_epoch_start(self):
        torch.rand(3)


def numbered():
    return TensorDataset(*images(SAMPLES), torch.arange(SAMPLES))


class Shuffles(Sampler):
    """A sampler of somebody's own, which draws from Python's generator as it goes."""

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        left = list(range(SAMPLES))
        while left:
            yield left.pop(random.randrange(len(left)))


class AmidSteps(Shuffles):
    """Draws as it goes from the generator that the steps draw from."""

    def __iter__(self):
        for _ in range(SAMPLES):
            yield int(torch.randint(SAMPLES, ()))


def own():
    return torch.Generator().manual_seed(4)


ORDERS = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "shuffled by a generator": lambda: {"shuffle": True, "generator": own()},
    "weighted": lambda: {"sampler": WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES, replacement=False)},
    "batches": lambda: {"batch_size": 1, "batch_sampler": BatchSampler(RandomSampler(range(SAMPLES)), 8, False)},
    "whole batches": lambda: {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(SAMPLES)), 8, False)},
    "of the epoch": lambda: {"sampler": OrderOfEpoch(SAMPLES)},
    "shares": lambda: {"sampler": DistributedSampler(range(SAMPLES), 1, 0, seed=3)},
    "random in shares": lambda: {
        "sampler": DistributedSamplerWrapper(RandomSampler(range(SAMPLES), generator=own()), num_replicas=1, rank=0)
    },
    "one's own": lambda: {"sampler": Shuffles()},
}


def loader(order="shuffled", **options):
    return DataLoader(numbered(), **{"batch_size": 8, **ORDERS[order](), **options})


class Saves(Callback):
    """Saves a checkpoint after each batch, and after each epoch."""

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.fit_loop.epoch_loop.batch_progress.total.ready}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(f"epoch{trainer.current_epoch}.ckpt")


def run(data=loader, kind=Noisy, tricks=(ExactResume,), callbacks=(), ckpt_path=None, val=None, **arguments):
    """The module of a run, which begins with the same random states, or goes on with others than there were."""
    seed = 1 if ckpt_path is None else 99
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
    module = kind()
    arguments = {key: value() if callable(value) else value for key, value in arguments.items()}
    one = trainer(callbacks=[*(trick() for trick in tricks), *callbacks], **arguments)
    one.fit(module, data(), val, ckpt_path=ckpt_path, weights_only=True)
    return module


def assert_goes_on(whole, ckpt_path, left, data=loader, **options):
    """A run from a checkpoint on has so many batches left, and they and its end are those of the whole run."""
    rest = run(data, ckpt_path=ckpt_path, **options)
    assert rest.numbers == whole.numbers[len(whole.numbers) - left :]
    assert_same_weights(weights(rest), weights(whole))


def check(points, data=loader, **options):
    """Go on from some batches of a run, 0 to n; return the module of the whole run."""
    whole = run(data, callbacks=[Saves()], **options)
    for point in points:
        assert_goes_on(whole, f"{point}.ckpt", len(whole.numbers) - point, data, **options)
    return whole


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_the_order_the_next_batch_comes_next(order):
    def data():
        return loader(order)

    whole = check((1, 4, 7), data)
    assert len(whole.numbers) == 12
    for epoch in range(3):
        assert sorted(itertools.chain(*whole.numbers[4 * epoch :][:4])) == list(range(SAMPLES))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_at_every_batch_also_with_a_limit_and_with_draws_in_pieces(limit, drop_last):
    def data():
        sampler = RandomSampler(range(SAMPLES), replacement=True, num_samples=70, generator=own())
        return DataLoader(numbered(), 16, sampler=sampler, drop_last=drop_last)

    whole = run(data, callbacks=[Saves()], limit_train_batches=limit)
    for point in range(1, len(whole.numbers) + 1, 2):
        left = len(whole.numbers) - point
        assert_goes_on(whole, f"{point}.ckpt", left, data, limit_train_batches=limit)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ("shuffled", {"num_workers": 1}),
        ("one's own", {"num_workers": 2}),
        ("whole batches", {"num_workers": 1}),
        ("shuffled by a generator", {"num_workers": 2, "persistent_workers": True}),
    ],
)
def test_with_workers_that_fetch_ahead(order, options):
    check((1, 4, 6), lambda: loader(order, **options), max_epochs=2)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_with_another_number_of_workers(before, after):
    whole = run(lambda: loader(num_workers=before), callbacks=[Saves()], max_epochs=2)
    for point in (2, 5):
        assert_goes_on(whole, f"{point}.ckpt", 8 - point, lambda: loader(num_workers=after), max_epochs=2)


def test_no_sample_that_the_run_has_had_is_loaded_again():
    loaded = []

    class Counts(Dataset):
        def __len__(self):
            return SAMPLES

        def __getitem__(self, index):
            loaded.append(index)
            return numbered()[index]

    def data():
        return DataLoader(Counts(), 8, shuffle=True)

    whole = run(data, callbacks=[Saves()])
    loaded.clear()
    assert_goes_on(whole, "6.ckpt", 6, data)
    assert sorted(loaded) == sorted(itertools.chain(*whole.numbers[6:]))


class Distorted(Dataset):
    """Draws from all three generators for each sample."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        image, label, number = numbered()[index]
        return image + torch.rand(1) + np.random.rand() + random.random(), label, number  # noqa: NPY002


def test_transforms_that_draw_in_the_main_process_draw_the_same():
    check((1, 3, 4, 6), lambda: DataLoader(Distorted(), 8, shuffle=True))


def test_a_resume_within_an_epoch_warns_of_workers_and_one_between_epochs_is_exact():
    def data():
        return DataLoader(Distorted(), 8, shuffle=True, num_workers=1)

    whole = run(data, callbacks=[Saves()], max_epochs=2)
    with pytest.warns(UserWarning, match="ExactResume gives workers the samples that come next"):
        rest = run(data, ckpt_path="2.ckpt", max_epochs=2)
    assert rest.numbers[:2] == whole.numbers[2:4]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ExactResume gives workers")
        for path in ("4.ckpt", "epoch0.ckpt"):
            assert_goes_on(whole, path, 4, data, max_epochs=2)


def test_a_sampler_that_draws_from_what_the_steps_draw_from_has_drawn_before_them():
    check((1, 4, 6), lambda: DataLoader(numbered(), 8, sampler=AmidSteps()), max_epochs=2)


@pytest.mark.parametrize(
    "data", [loader, lambda: InMemoryLoader(numbered(), 8, shuffle=True, seed=2), lambda: Numbered(batches=4)]
)
@pytest.mark.parametrize("kind", [Noisy, Loads])
def test_loaders_that_keep_their_place_are_given_it_also_where_lightning_loads_early(kind, data):
    check((2, 4, 6), data, kind=kind)


class Numbered(ReplayLoader):
    """Has numbers too."""

    def __init__(self, batches, sampler=OrderOfEpoch):
        size = 8 * batches
        data = TensorDataset(*images(size), torch.arange(size))
        DataLoader.__init__(self, data, 8, sampler=sampler(size))
        self.position = 0


@pytest.mark.parametrize(
    "data",
    [
        lambda: InMemoryLoader(numbered(), 8, sampler=RandomSampler(range(SAMPLES))),
        lambda: Numbered(4, lambda size: RandomSampler(range(size), generator=own())),
    ],
)
@pytest.mark.parametrize("kind", [Noisy, Loads])
def test_loaders_that_keep_their_place_are_given_their_order_where_it_is_random(kind, data):
    check((2, 4, 6), data, kind=kind)


def test_a_shuffled_loader_whose_samples_moved_into_memory():
    check((2, 4, 6), tricks=(ExactResume, InMemory))


def test_hooks_that_draw_at_an_epochs_start_draw_the_same():
    whole = check((4, 6), kind=DrawsAtStart)
    for epoch in range(2):
        assert_goes_on(whole, f"epoch{epoch}.ckpt", 8 - 4 * epoch, kind=DrawsAtStart)


@pytest.mark.parametrize("order", ["shuffled", "shuffled by a generator", "random in shares"])
def test_between_epochs(order):
    def data():
        return loader(order)

    whole = run(data, callbacks=[Saves()])
    for epoch in range(2):
        assert_goes_on(whole, f"epoch{epoch}.ckpt", 8 - 4 * epoch, data)


def test_with_a_number_of_steps_checkpoints_of_batches_go_on_and_those_of_an_epochs_end_are_refused():
    """Lightning would train a batch too many."""
    check((2, 4, 6), max_steps=100)
    with pytest.raises(MisconfigurationException, match="cannot go on from an epoch's end with `max_steps`"):
        run(ckpt_path="epoch0.ckpt", max_steps=100)


def test_checkpoints_of_lightnings_own_callback_beside_validation_within_and_after_epochs():
    def val():
        return DataLoader(numbered(), 16)

    keepers = [
        ModelCheckpoint("each", "{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint("validated", "{step}", monitor="val_loss", save_top_k=-1),
    ]
    options = {"val_check_interval": 2, "max_epochs": 2}
    whole = run(callbacks=keepers, val=val(), enable_checkpointing=True, **options)
    for folder, steps in (("each", range(1, 9)), ("validated", (2, 4, 6, 8))):
        for step in steps:
            assert_goes_on(whole, f"{folder}/step={step}.ckpt", 8 - step, val=val(), **options)


@pytest.mark.parametrize("options", [{}, {"plugins": scaled, "gradient_clip_val": 0.1}])
def test_unfinished_accumulations_are_finished(options):
    check(range(1, 9), accumulate_grad_batches=3, max_epochs=2, **options)
    kept = [torch.load(f"{point}.ckpt", weights_only=True)["callbacks"]["ExactResume"] for point in range(1, 5)]
    assert [bool(one["gradients"]) for one in kept] == [True, True, False, False]


def test_a_run_that_was_resumed_is_resumed_again():
    whole = run(callbacks=[Saves()])
    run(ckpt_path="2.ckpt", callbacks=[Saves()])
    for point in (3, 6):  # of the second run
        assert_goes_on(whole, f"{point}.ckpt", 12 - point)


def test_a_run_that_was_resumed_behind_an_epochs_last_batch_is_resumed_again():
    """Lightning does not count the epoch that it begins there."""
    whole = run(callbacks=[Saves()])
    run(ckpt_path="4.ckpt", callbacks=[Saves()])
    for point in (6, 8, 9):
        assert_goes_on(whole, f"{point}.ckpt", 12 - point)
    assert_goes_on(whole, "epoch1.ckpt", 4)


class SavesAtStart(Callback):
    def on_train_start(self, trainer, *_):
        trainer.save_checkpoint("start.ckpt")


def test_a_checkpoint_saved_before_a_resumed_run_goes_on_has_its_place():
    whole = run(callbacks=[Saves()])
    run(ckpt_path="6.ckpt", callbacks=[SavesAtStart()])
    assert_goes_on(whole, "start.ckpt", 6)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [lambda: BatchAugmentation(crop=1, flip="alternating", seed=2), lambda: SubsetTraining(0.7, stop_at=1.0, seed=3)],
)
def test_beside_tricks_that_know_or_choose_the_samples(other, first):
    tricks = (ExactResume, other) if first else (other, ExactResume)
    check((2, 4, 6), tricks=tricks)


def test_a_run_without_interruption_is_what_it_is_without_the_trick():
    plain = run(tricks=())
    for options in ({}, {"callbacks": [Saves()]}):
        with_trick = run(**options)
        assert with_trick.numbers == plain.numbers
        assert_same_weights(weights(with_trick), weights(plain))


class Dies(Noisy):
    """Is killed in the middle of its seventh step."""

    def training_step(self, batch, batch_idx):
        if len(self.numbers) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_run_that_was_killed_in_an_epoch_ends_with_the_same_bits():
    whole = run()
    keeper = ModelCheckpoint("kept", "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"kind": Dies, "callbacks": [keeper], "enable_checkpointing": True}
    process = multiprocessing.get_context("fork").Process(target=run, kwargs=options)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert_goes_on(whole, "kept/step=6.ckpt", 6)


class Fails(Noisy):
    """Fails in its seventh step."""

    failing = 6

    def training_step(self, batch, batch_idx):
        if len(self.numbers) == self.failing:
            raise Interrupted
        return super().training_step(batch, batch_idx)


class FailsAtTheEnd(Fails):
    """Fails in the last step of its second epoch."""

    failing = 7


class SavesFailure(Callback):
    def on_exception(self, trainer, *_):
        trainer.save_checkpoint("failed.ckpt")


@pytest.mark.parametrize("kind", [Fails, FailsAtTheEnd])
def test_after_a_step_that_failed_the_samples_are_those_that_come_next(kind):
    whole = run()
    with pytest.raises(Interrupted):
        run(kind=kind, callbacks=[SavesFailure()])
    rest, left = run(ckpt_path="failed.ckpt"), 8 - kind.failing
    assert rest.numbers[:left] == whole.numbers[kind.failing : 8]  # the rest of that epoch
    assert len(rest.numbers) == left + 4


def test_a_failure_after_which_no_place_can_be_asked_is_told_and_leaves_nothing_behind(monkeypatch):
    def answers_no_more(_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr("lightning_speedups.attach.places.plain_states", answers_no_more)
    data, trick = loader(), ExactResume()
    sampler = data.batch_sampler.sampler
    one = trainer(callbacks=[trick])
    with pytest.raises(Interrupted):
        one.fit(Fails(), data)
    assert data.batch_sampler.sampler is sampler
    assert "process_dataloader" not in vars(one.strategy)
    assert trick.state_dict() == {"places": [], "gradients": {}}


class Stream:
    """Is no DataLoader."""

    def __iter__(self):
        return iter(loader())


class Fetches(Noisy):
    def training_step(self, dataloader_iter):
        batch, number, _ = next(dataloader_iter)
        return super().training_step(batch, number)


class OwnBatches(BatchSampler):
    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"data": lambda: DataLoader(Endless(), 8)},
            "ExactResume needs one training loader, .* this one is a DataLoader",
        ),
        ({"data": lambda: [loader(), loader()]}, "ExactResume needs one training loader, .* several loaders"),
        (
            {"data": lambda: DataLoader(numbered(), batch_sampler=OwnBatches(range(SAMPLES), 8, False))},
            "ExactResume needs one training loader, .* this one is a DataLoader",
        ),
        ({"data": Stream}, "ExactResume needs one training loader, .* this one is a Stream"),
        (
            {"data": lambda: DataLoader(dict(zip("abcdefgh", numbered(), strict=False)), 2, sampler=list("abcdefgh"))},
            "ExactResume needs a sampler of whole numbers",
        ),
        ({"kind": Fetches}, r"Fetches.training_step takes `dataloader_iter`"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
            "cannot go beside GradientAccumulationScheduler",
        ),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused_at_the_start(options, told):
    with pytest.raises(MisconfigurationException, match=told):
        run(**options)


def change(path, **changes):
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["ExactResume"]
    checkpoint["callbacks"]["ExactResume"] = {key: changes.get(key, lambda one: one)(state[key]) for key in state}
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"places": lambda places: places * 2}, "the checkpoint has 2, and this run 1"),
        ({"gradients": lambda _: {}}, "cannot finish the accumulation"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(changes, told):
    run(callbacks=[Saves()], accumulate_grad_batches=3)
    change("2.ckpt", **changes)
    with pytest.raises(MisconfigurationException, match=told):
        run(ckpt_path="2.ckpt", accumulate_grad_batches=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_of_another_length_is_refused_before_a_step(workers):
    run(callbacks=[Saves()])
    with pytest.raises(MisconfigurationException, match="cannot let an epoch of 4 batches go on, which has 5 now"):
        run(lambda: loader(batch_size=7, num_workers=workers), ckpt_path="2.ckpt")
    rest = run(lambda: loader(batch_size=7, num_workers=workers), ckpt_path="epoch0.ckpt")
    assert len(rest.numbers) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_in_its_order_whatever_the_sampler_is_now(workers):
    whole = run(callbacks=[Saves()])
    rest = run(lambda: loader("in order", num_workers=workers), ckpt_path="2.ckpt")
    assert rest.numbers[:3] == [*whole.numbers[2:4], [*range(8)]]


def test_a_checkpoint_saved_without_the_trick_is_warned_of():
    run(tricks=(), callbacks=[Saves()])
    with pytest.warns(UserWarning, match="The checkpoint has no place of ExactResume"):
        run(ckpt_path="epoch0.ckpt")
