"""The run's length as it is really trained, and the batch size as it really comes."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from lightning_speedups import ProgressiveResizing, SubsetTraining
from lightning_speedups.attach.run_length import (
    accumulation,
    batches_in_epoch,
    facts,
    loader_batch_size,
    raw_optimizers,
    run_length,
)
from lightning_speedups.attach.trick import callbacks_of
from zoo import Classifier, ReplayLoader, TwoOptimizers, fit_interrupted, images, loader, resume, trainer


def steps_of(one):
    return run_length(one).steps


def batches_of(one):
    return run_length(one).batches


class Looks(Callback):
    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(self.look(trainer))


def looked(look, data=None, **arguments):
    eye = Looks(look)
    one = trainer(callbacks=[*arguments.pop("callbacks", []), eye], **arguments)
    one.fit(Classifier(), data if data is not None else loader(32, 8))
    return eye.seen[0], one


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": -1, "max_steps": 7}, 4),
        ({"max_epochs": 3, "max_steps": 10}, 5),
        ({"max_epochs": 1, "max_steps": 100}, 4),
    ],
)
def test_in_manual_optimization_batches_stand_for_steps_and_max_steps_is_shared_by_the_optimizers(arguments, steps):
    module, eye = TwoOptimizers(), Looks(lambda one: (run_length(one), facts(one, one.lightning_module)))
    trainer(callbacks=[eye], **arguments).fit(module, loader(32, 8))
    ((length, told),) = eye.seen
    assert (length.steps, length.batches) == (steps, steps)
    assert (told.steps, told.batches, told.told, told.steps_in_epochs(2)) == (None, steps, steps, 8)


def test_in_manual_optimization_the_batches_of_a_resumed_run_are_known():
    eyes = [Looks(run_length), Looks(run_length)]
    for eye, (stop, epoch_end) in zip(eyes, ((6, False), (8, True)), strict=True):  # 4 of 5 batches in an epoch of 4
        fit_interrupted(TwoOptimizers(1), ReplayLoader(), stop, [], epoch_end)
        resume(TwoOptimizers(1), ReplayLoader(), [eye])
    assert [(eye.seen[0].epoch, eye.seen[0].before, eye.seen[0].steps) for eye in eyes] == [(0, 0, 12), (1, 4, 12)]


class Endless(IterableDataset):
    def __init__(self, batches=5):
        self.batches = batches

    def __iter__(self):
        for i in range(self.batches):
            yield tuple(part[0] for part in images(1, seed=i))


RUNS = {
    "by epochs": {"max_epochs": 3},
    "by steps": {"max_epochs": -1, "max_steps": 7},
    "steps come first": {"max_epochs": 3, "max_steps": 5},
    "epochs come first": {"max_epochs": 2, "max_steps": 50},
    "accumulating": {"max_epochs": 3, "accumulate_grad_batches": 2},
    "accumulating with a rest": {"max_epochs": 3, "accumulate_grad_batches": 3},
    "some of the batches": {"max_epochs": 3, "limit_train_batches": 3},
    "a fraction of the batches": {"max_epochs": 3, "limit_train_batches": 0.5},
    "one batch over and over": {"max_epochs": 3, "overfit_batches": 1},
    "fast_dev_run": {"max_epochs": 3, "fast_dev_run": 2},
}


@pytest.mark.parametrize("run", RUNS)
def test_the_total_is_the_number_of_steps_that_the_run_takes(run):
    total, one = looked(steps_of, **RUNS[run])
    assert total == one.global_step > 0


@pytest.mark.parametrize("schedule", [{0: 1, 1: 2, 2: 4}, {1: 3}, {0: 4, 2: 1}])
def test_the_total_is_right_under_an_accumulation_schedule(schedule):
    total, one = looked(steps_of, callbacks=[GradientAccumulationScheduler(schedule)], max_epochs=4)
    assert total == one.global_step > 0


def test_the_total_counts_from_the_start_of_the_run_after_a_resume():
    _, one = looked(steps_of, max_epochs=1)
    one.save_checkpoint("first.ckpt")
    eye = Looks(steps_of)
    two = trainer(max_epochs=3, callbacks=[eye])
    two.fit(Classifier(), loader(32, 8), ckpt_path="first.ckpt")
    assert eye.seen == [12]
    assert two.global_step == 12


class Reloads(Classifier):
    """Has a loader of another length in each epoch."""

    batches = (2, 4, 6)

    def train_dataloader(self):
        return ReplayLoader(self.batches[self.trainer.current_epoch])


class LooksAlways(Callback):
    """Notes the total of each hook, and that of the epoch's end, which belongs to what comes."""

    def __init__(self):
        self.seen, self.at_ends = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, steps_of(trainer)))

    on_train_start = on_train_epoch_start

    def on_train_batch_end(self, trainer, *args):
        self.seen.append((trainer.current_epoch, steps_of(trainer)))

    def on_train_epoch_end(self, trainer, pl_module):
        self.at_ends.append(steps_of(trainer))


RELOAD = {"reload_dataloaders_every_n_epochs": 1}


@pytest.mark.parametrize(
    ("arguments", "totals", "at_ends", "stop"),
    [
        *(({}, (6, 10, 12), [6, 10, 12], stop) for stop in (None, 1, 3, 4)),
        *(({"accumulate_grad_batches": 3}, (3, 5, 5), [3, 5, 5], stop) for stop in (None, 2)),
        *(({"max_steps": 9}, (6, 9, 9), [6, 9], stop) for stop in (None, 1, 3, 4)),
    ],
)
def test_the_total_is_what_is_done_and_what_is_left_by_the_present_loader(arguments, totals, at_ends, stop):
    if stop is None:
        eye = LooksAlways()
        trainer(callbacks=[eye], **RELOAD, **arguments).fit(Reloads())
        assert eye.at_ends[: len(at_ends) - 1] == at_ends[:-1]
    else:
        fit_interrupted(Reloads(), None, stop, [], **RELOAD, **arguments)
        eye = LooksAlways()
        resume(Reloads(), None, [eye], **RELOAD, **arguments)
    assert set(eye.seen) <= set(enumerate(totals))
    assert len(eye.seen) > 5


@pytest.mark.parametrize("epochs", [1, 2, 2.5])
def test_epochs_that_are_over_count_as_they_were(epochs):
    class Asks(LooksAlways):
        def on_train_epoch_start(self, trainer, pl_module):
            self.seen.append(run_length(trainer).steps_in_epochs(epochs))

        def on_train_start(self, *args):
            pass

        on_train_batch_end = on_train_start

    eye = Asks()
    trainer(callbacks=[eye], **RELOAD).fit(Reloads())
    # 2, then 2 and 4, then 2, 4 and 6 steps; of the first of two that are over, their mean
    assert eye.seen == {1: [2, 2, 3], 2: [4, 6, 6], 2.5: [5, 8, 9]}[epochs]


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"max_epochs": 2}, None), ({"max_epochs": -1, "max_steps": 4}, 4)]
)
def test_a_loader_without_a_length_leaves_the_total_to_max_steps(arguments, expected):
    total, _ = looked(steps_of, DataLoader(Endless(), batch_size=2), **arguments)
    assert total == expected


def test_an_endless_run_has_no_total():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    total, _ = looked(steps_of, max_epochs=-1, callbacks=[Stops()])
    assert total is None


def test_an_epoch_without_a_length_is_none():
    assert looked(partial(batches_in_epoch, epoch=0), DataLoader(Endless(), batch_size=2), max_epochs=1)[0] is None
    assert (
        looked(lambda one: run_length(one).steps_in_epochs(2.0), DataLoader(Endless(), batch_size=2), max_epochs=1)[0]
        is None
    )
    assert looked(partial(batches_in_epoch, epoch=0), max_epochs=1)[0] == 4


@pytest.mark.parametrize(
    ("epochs", "accumulate", "expected"),
    [(0.0, 1, 0), (1.0, 1, 4), (2.5, 1, 10), (0.25, 1, 1), (2.0, 3, 4), (1.5, 2, 3), (0.75, 2, 2)],
)
def test_parts_of_an_epoch_count_in_proportion(epochs, accumulate, expected):
    steps, _ = looked(
        lambda one: run_length(one).steps_in_epochs(epochs), max_epochs=1, accumulate_grad_batches=accumulate
    )
    assert steps == expected


def test_epochs_beyond_the_run_count_as_the_schedule_goes_on():
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    steps, _ = looked(lambda one: run_length(one).steps_in_epochs(3.5), max_epochs=1, callbacks=[schedule])
    assert steps == 4 + 2 + 2 + 1


def dataset():
    return TensorDataset(*images(12))


class Plain:
    """A loader that says nothing about itself."""

    def __iter__(self):
        yield images(4)


LOADERS = {
    "batch_size": (lambda: DataLoader(dataset(), batch_size=4), 4),
    "batch_sampler": (lambda: DataLoader(dataset(), batch_sampler=BatchSampler(SequentialSampler(dataset()), 3, False)), 3),
    "batches as samples": (
        lambda: DataLoader(dataset(), sampler=BatchSampler(SequentialSampler(dataset()), 6, False), batch_size=None), 6,
    ),
    "no batching": (lambda: DataLoader([images(4)], batch_size=None), None),
    "without a length": (lambda: DataLoader(Endless(), batch_size=2), 2),
    "not a DataLoader": (Plain, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_the_batch_size_is_the_one_that_comes_or_none(kind):
    make, expected = LOADERS[kind]
    module, eye = Classifier(), Looks(loader_batch_size)
    trainer(max_epochs=1, callbacks=[eye]).fit(module, make())
    assert eye.seen == [expected]
    assert expected is None or len(module.seen[0][0]) == expected


class TwoLoaders(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def test_several_loaders_have_no_one_batch_size():
    eye = Looks(loader_batch_size)
    trainer(max_epochs=1, callbacks=[eye]).fit(TwoLoaders(), {"a": loader(8, 4), "b": loader(8, 2)})
    assert eye.seen == [None]


def test_optimizers_come_without_lightnings_wrapper():
    (optimizers, callbacks), one = looked(lambda one: (raw_optimizers(one), callbacks_of(one)), max_epochs=1)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD]
    assert callbacks == one.callbacks


# ---- schedulers of the module's own, beside tricks that make epochs shorter


class Decays(Classifier):
    """Has a scheduler that is built from the run's length, as told by the Trainer or given."""

    def __init__(self, make, interval="step", steps=None, **config):
        super().__init__()
        self.make, self.steps, self.config = make, steps, {"interval": interval, **config}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.told = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": self.make(optimizer, self.steps or self.told), **self.config}]


def linear(optimizer, steps):
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def warmed_up(optimizer, steps):
    return SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, steps - 5)], [5]
    )


MAKES = {
    "LambdaLR": linear,
    "OneCycleLR": lambda optimizer, steps: OneCycleLR(optimizer, 0.1, steps),
    "CosineAnnealingLR": CosineAnnealingLR,
    "PolynomialLR": PolynomialLR,
    "SequentialLR": warmed_up,
}
SHORTER = {
    "SubsetTraining": lambda: [SubsetTraining(0.5, method="random")],
    "ProgressiveResizing": lambda: [ProgressiveResizing(fill_batch=True, multiple=2, probe=False)],
}


def warned(module, tricks, **arguments):
    """Fit; return the warnings that schedulers were the reason for, and the steps."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        one = trainer(callbacks=tricks, **({"max_epochs": 8} | arguments))
        one.fit(module, loader(64, 8))
    return [
        str(warning.message) for warning in record if "configure_optimizers" in str(warning.message)
    ], one.global_step


@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.parametrize("kind", MAKES)
def test_a_scheduler_that_counts_on_full_epochs_is_told_the_true_number_of_steps(kind, name):
    module = Decays(MAKES[kind])
    (said,), steps = warned(module, SHORTER[name]())
    assert module.told == 64 > steps
    assert said.startswith(
        f"{name}: the run has {steps} optimizer steps, where `trainer.estimated_stepping_batches` says 64"
    )
    assert f"the scheduler {kind} from configure_optimizers does not come to its end. Give it {steps} steps" in said
    assert warned(Decays(MAKES[kind], steps=steps), SHORTER[name]())[0] == []  # it was given it


@pytest.mark.parametrize(
    ("module", "tricks", "arguments"),
    [
        (lambda: Decays(linear), lambda: [], {}),
        (lambda: Decays(linear), lambda: [SubsetTraining(1.0)], {}),
        (lambda: Decays(linear), lambda: [ProgressiveResizing(multiple=2, probe=False)], {}),
        (lambda: Decays(linear), SHORTER["SubsetTraining"], {"max_steps": 9}),
        (lambda: Decays(lambda optimizer, _: CosineAnnealingLR(optimizer, 8), "epoch"), SHORTER["SubsetTraining"], {}),
        (lambda: Decays(lambda optimizer, _: ExponentialLR(optimizer, 0.99)), SHORTER["SubsetTraining"], {}),
        (lambda: Decays(lambda optimizer, _: LinearLR(optimizer, 0.1, total_iters=5)), SHORTER["SubsetTraining"], {}),
        (lambda: Decays(lambda optimizer, _: LambdaLR(optimizer, lambda step: min(1, step / 5))), SHORTER["SubsetTraining"], {}),
        (lambda: Decays(lambda optimizer, _: ReduceLROnPlateau(optimizer), monitor="train_loss", strict=False), SHORTER["SubsetTraining"], {}),
        (lambda: Decays(lambda optimizer, told: CosineAnnealingLR(optimizer, told // 8), frequency=4), SHORTER["SubsetTraining"], {}),
    ],
)  # fmt: skip
def test_of_other_schedulers_nothing_is_said(module, tricks, arguments):
    assert warned(module(), tricks(), **arguments)[0] == []


class SeesBatches(Callback):
    def __init__(self):
        self.count = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1


@pytest.mark.parametrize("run", RUNS)
def test_the_total_of_batches_is_the_number_that_the_run_takes(run):
    eye, counter = Looks(batches_of), SeesBatches()
    trainer(callbacks=[eye, counter], **RUNS[run]).fit(Classifier(), loader(32, 8))
    assert eye.seen == [counter.count]


@pytest.mark.parametrize("max_steps", [-1, 4, 5, 7])
@pytest.mark.parametrize("schedule", [{0: 3}, {0: 1, 1: 2, 2: 4}])
def test_the_total_of_batches_is_right_under_an_accumulation_schedule(schedule, max_steps):
    eye, counter = Looks(batches_of), SeesBatches()
    accumulation_schedule = GradientAccumulationScheduler(schedule)
    trainer(callbacks=[eye, accumulation_schedule, counter], max_epochs=5, max_steps=max_steps).fit(
        Classifier(), loader(32, 8)
    )
    assert eye.seen == [counter.count]


@pytest.mark.parametrize("first", [True, False])
def test_the_accumulation_of_an_epoch_is_known_before_the_schedule_had_its_turn(first):
    schedule, told = GradientAccumulationScheduler({0: 1, 1: 2, 3: 4}), []

    class Asks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            told.append(accumulation(trainer, trainer.current_epoch))

    callbacks = [Asks(), schedule] if first else [schedule, Asks()]
    trainer(max_epochs=5, callbacks=callbacks).fit(Classifier(), loader(32, 8))
    assert told == [1, 2, 2, 4, 4]
