"""A schedule's place on its curve: real steps, resumes of any length, and who else may stand on the same value."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_speedups import ProgressiveResizing, StopAtTarget, SubsetTraining
from lightning_speedups.attach.steps import get_value
from lightning_speedups.core.schedules import Course
from lightning_speedups.tricks.rates.base import ScheduleTrick, entry
from zoo import (
    STOPS,
    Classifier,
    Memory,
    ReplayLoader,
    SometimesInfinite,
    TwoOptimizers,
    endless,
    fit_interrupted,
    loader,
    resume,
    scaled,
    scheduled,
    trainer,
)


class Place(ScheduleTrick):
    """Sets the rate to where the curve stands, from 1 on, so that the rates of a run are its places."""

    keys = ("lr",)

    def __init__(self, keys=("lr",), total_steps=None, optimizer=None, on_resume="stretch", name="Place", unit=1):
        super().__init__(total_steps, optimizer, on_resume)
        self.unit = unit
        self.__class__ = type(name, (type(self),), {"keys": keys, "__module__": __name__})

    def group_values(self, optimizer, group, step, values):
        if not self.drives(optimizer):
            return {}
        rate = self.unit * (1 + self.position(optimizer, step)) * self._ratio(optimizer, group, values)
        return {name: changed for key in self.keys for name, changed in entry(values, key, rate).items()}


def rates(module, group=0):
    return [step[group]["lr"] for step in module.values if len(step) > group]


# ---- the place on the curve


@pytest.mark.parametrize(
    ("arguments", "tricks", "steps"),
    [
        ({}, [], 18),
        ({"accumulate_grad_batches": 4}, [], 6),  # 4 + 2 batches in each epoch
        ({}, [GradientAccumulationScheduler({0: 1, 1: 4})], 6 + 2 + 2),
        ({"max_steps": 11}, [], 11),
        ({"max_steps": 99}, [], 18),
        ({"max_epochs": -1, "max_steps": 11}, [], 11),
        ({"limit_train_batches": 0.5}, [], 9),
    ],
)
def test_each_step_stands_one_further_and_the_curve_has_the_runs_length(arguments, tricks, steps):
    module, place = Classifier(), Place()
    trainer(callbacks=[place, *tricks], **arguments).fit(module, loader(48))
    assert place.length == steps
    assert rates(module) == [1 + t for t in range(steps)]


def test_past_its_end_it_stays_there():
    module = Classifier()
    trainer(callbacks=[Place(total_steps=5)]).fit(module, loader())
    assert rates(module) == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_step_that_the_grad_scaler_skips_moves_it_not():
    module, place = SometimesInfinite(bad={2, 6, 10}), Place()
    trainer(callbacks=[place], plugins=[scaled()]).fit(module, loader())
    assert rates(module) == [1 + t for t in range(9)]
    assert place.length == 12


# ---- resume


@pytest.mark.parametrize("how", ["stretch", "extend"])
@pytest.mark.parametrize("stop", STOPS)
def test_resumed_at_the_same_length_it_goes_on_at_the_same_place(stop, how):
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), stop, [Place(on_resume=how)])
    resume(module, ReplayLoader(), [Place(on_resume=how)])  # a warning would be an error
    assert rates(module) == [1 + t for t in range(12)]


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_from_an_epochs_end_it_goes_on_at_the_same_place(epoch):
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 4 * epoch, [Place()], epoch_end=True)
    resume(module, ReplayLoader(), [Place()])
    assert rates(module) == [1 + t for t in range(12)]


def told_once(record, text):
    told = [str(warning.message) for warning in record if "Place" in str(warning.message)]
    assert len(told) == 1
    assert text in told[0]


@pytest.mark.parametrize(("now", "epochs"), [(8, 2), (20, 5)])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_with_another_length_it_is_stretched_and_one_warning_names_both_totals(stop, now, epochs):
    module, place = Classifier(), Place()
    fit_interrupted(module, ReplayLoader(), stop, [Place()])
    module.values.clear()
    with pytest.warns(UserWarning, match="Place") as record:
        resume(module, ReplayLoader(), [place], max_epochs=epochs)
    told_once(record, f"had 12 optimizer steps, this one has {now}; the curve is stretched over the new total")
    assert place.length == now
    assert rates(module) == [1 + t for t in range(stop, now)]


@pytest.mark.parametrize(("now", "epochs"), [(8, 2), (20, 5)])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_extended_it_goes_on_without_a_jump_and_ends_at_the_new_total(stop, now, epochs):
    module, place = Classifier(), Place(on_resume="extend")
    fit_interrupted(module, ReplayLoader(), stop, [Place()])
    module.values.clear()
    with pytest.warns(UserWarning, match="Place") as record:
        resume(module, ReplayLoader(), [place], max_epochs=epochs)
    told_once(record, f"had 12 optimizer steps, this one has {now}; the curve goes on from where it stood and ends at")
    assert place.length == 12
    assert place.position(0, now) == 12
    np.testing.assert_allclose(rates(module), [1 + stop + t * (12 - stop) / (now - stop) for t in range(now - stop)])


def test_extended_twice_and_then_resumed_at_the_same_length():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 6, [Place(on_resume="extend")])
    with (
        pytest.warns(UserWarning, match="had 12 optimizer steps, this one has 16"),
        pytest.raises(Exception, match=r"^$"),
    ):
        resume(module, ReplayLoader(), [Place(on_resume="extend"), Stop(10)], max_epochs=4)
    first = [6 + t * 6 / 10 for t in range(5)]
    with (
        pytest.warns(UserWarning, match="had 16 optimizer steps, this one has 20"),
        pytest.raises(Exception, match=r"^$"),
    ):
        resume(module, ReplayLoader(), [Place(on_resume="extend"), Stop(13)], max_epochs=5)
    second = [first[-1] + t * (12 - first[-1]) / 10 for t in range(11)]
    resume(module, ReplayLoader(), [Place(on_resume="extend")], max_epochs=5)
    expected = [*range(6), *first[:-1], *second[:-1]]
    np.testing.assert_allclose(rates(module), 1 + np.array(expected))


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("at.ckpt")
            raise Exception


@pytest.mark.parametrize("how", ["stretch", "extend"])
def test_a_new_total_that_is_over_already_is_no_error(how):
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 7, [Place(total_steps=12)])
    module.values.clear()
    with pytest.warns(UserWarning, match="had 12 optimizer steps, this one has 5"):
        resume(module, ReplayLoader(), [Place(total_steps=5, on_resume=how)])
    assert rates(module) == [1 + (5 if how == "stretch" else 12)] * 5


def test_a_checkpoint_made_without_it_puts_it_where_the_run_stands():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 5, [])
    module.values.clear()
    resume(module, ReplayLoader(), [Place()])
    assert rates(module) == [1 + t for t in range(5, 12)]


def test_a_second_fit_of_another_length_starts_anew_and_warns_of_nothing():
    place = Place()
    for epochs in (3, 2):
        module = Classifier()
        trainer(callbacks=[place], max_epochs=epochs).fit(module, loader())
        assert rates(module) == [1 + t for t in range(4 * epochs)]
        assert place.length == 4 * epochs


def test_a_callback_that_was_resumed_with_a_stretch_starts_anew_as_well():
    place = Place()
    fit_interrupted(Classifier(), ReplayLoader(), 5, [Place()])
    with pytest.warns(UserWarning, match="this one has 16"):
        resume(Classifier(), ReplayLoader(), [place], max_epochs=4)
    module = Classifier()
    trainer(callbacks=[place]).fit(module, loader())
    assert rates(module) == [1 + t for t in range(12)]


# ---- a run that is not the planned one


class Reloads(Classifier):
    """Has a loader of another length in each epoch."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return ReplayLoader(self.batches[self.trainer.current_epoch])


class StepsInEverySecond(Classifier):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Leaves(Classifier):
    """Leaves an epoch before its end."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


RELOAD = {"reload_dataloaders_every_n_epochs": 1}
STREAM = {"limit_train_batches": 10, "max_epochs": 4}
ODD = {
    # name: (module, data, arguments, steps of each epoch, lengths of the run as planned in each)
    "growing": (lambda: Reloads((2, 4, 6)), None, RELOAD, (2, 4, 6), (6, 10, 12)),
    "shrinking": (lambda: Reloads((6, 4, 2)), None, RELOAD, (6, 4, 2), (18, 14, 12)),
    "growing once": (lambda: Reloads((2, 2, 5)), None, RELOAD, (2, 2, 5), (6, 6, 9)),
    "growing, up to max_steps": (lambda: Reloads((2, 4, 6)), None, RELOAD | {"max_steps": 9}, (2, 4, 3), (6, 9, 9)),
    "a stream shorter than its limit": (Classifier, endless, STREAM, (4, 4, 4, 4), (40, 16, 16, 16)),
    "such a stream, up to max_steps": (Classifier, endless, STREAM | {"max_steps": 11}, (4, 4, 3), (11, 11, 11)),
    "steps in every second batch": (StepsInEverySecond, loader, {}, (2, 2, 2), (12, 6, 6)),
    "epochs that are left": (Leaves, loader, {}, (2, 2, 2), (12, 6, 6)),
    "accumulating and growing": (
        lambda: Reloads((4, 8, 8)), None, RELOAD | {"accumulate_grad_batches": 3}, (2, 3, 3), (6, 8, 8),
    ),
}  # fmt: skip


def places(steps, lengths, end=0):
    """Places on a curve over the first length: in each epoch evenly on towards the end that it is then thought to have."""
    place, done, seen = 0.0, 0, []
    for count, length in zip(steps, lengths, strict=False):
        pace = (lengths[0] - end - place) / (length - end - done)
        seen += [place + i * pace for i in range(count)]
        place, done = place + count * pace, done + count
    return [1 + min(one, lengths[0] - end) for one in seen]


@pytest.mark.parametrize("kind", ODD)
def test_the_curve_goes_to_the_end_of_the_run_as_it_comes_and_one_warning_says_so(kind):
    make, data, arguments, steps, lengths = ODD[kind]
    module, place = make(), Place()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer(callbacks=[place], **arguments).fit(module, data and data())
    np.testing.assert_allclose(rates(module), places(steps, lengths))
    changes = [epoch for epoch in range(1, len(steps)) if lengths[epoch] != lengths[epoch - 1]]
    if not changes:
        assert not [one for one in record if "Place" in str(one.message)]
        return
    now = lengths[changes[0]]
    told_once(
        record,
        f"the run was planned with {lengths[0]} optimizer steps, but {sum(steps[: changes[0]])} are done before epoch "
        f"{changes[0]} and some {now - sum(steps[: changes[0]])} are to come; from here on the curve goes to its end "
        f"at step {now}. Give the true number as `total_steps=`",
    )


@pytest.mark.parametrize(
    ("make", "data", "arguments", "planned", "ended"),
    [
        (Classifier, endless, {"limit_train_batches": 10}, 10, 4),
        (StepsInEverySecond, loader, {}, 4, 2),
        (Leaves, loader, {}, 4, 2),
    ],
)
def test_a_run_of_one_epoch_that_is_shorter_says_so_at_its_end(make, data, arguments, planned, ended):
    with pytest.warns(UserWarning, match="Place") as record:
        trainer(callbacks=[Place()], max_epochs=1, **arguments).fit(make(), data())
    told_once(record, f"the run was planned with {planned} optimizer steps and ended after {ended}, so that the curve")


@pytest.mark.parametrize(
    ("kind", "stop", "epoch_end"),
    [
        *((kind, stop, False) for kind in ("growing", "shrinking") for stop in (1, 7, 9)),
        ("growing", 6, True), ("shrinking", 10, True),
        *(("steps in every second batch", stop, end) for stop, end in ((1, False), (5, False), (8, True), (9, False))),
        ("epochs that are left", 1, False), ("epochs that are left", 4, True),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Place")
def test_such_a_run_resumes_as_if_it_had_not_been_interrupted(kind, stop, epoch_end):
    make, data, arguments, steps, lengths = ODD[kind]
    module, data = make(), data and data()
    fit_interrupted(module, data, stop, [Place(on_resume="extend")], epoch_end=epoch_end, **arguments)
    resume(module, data, [Place(on_resume="extend")], **arguments)
    np.testing.assert_allclose(rates(module), places(steps, lengths))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Place")
def test_resumed_in_mid_epoch_with_longer_epochs_it_takes_the_next_ones_to_be_as_long():
    module = Classifier()
    fit_interrupted(module, loader(), 1, [Place(on_resume="extend")])  # of 4 batches each
    again = Place(on_resume="extend")
    resume(module, loader(64), [again])
    assert again.planned == again.steps_done[0] == 24
    assert len(again.saved.courses) == 1
    assert again.saved.courses[0].since == 1  # settled once


class StopsItself(Callback):
    """Ends the run in the middle of an epoch, as EarlyStopping, a Timer or a target would."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 6


def test_a_length_that_the_user_gave_is_theirs():
    module = Reloads((2, 4, 6))
    trainer(callbacks=[Place(total_steps=12)], **RELOAD).fit(module)
    assert rates(module) == [1 + t for t in range(12)]
    module = Leaves()
    trainer(callbacks=[Place(total_steps=6)]).fit(module, loader())
    assert rates(module) == [1 + t for t in range(6)]


@pytest.mark.parametrize(
    ("make", "data", "arguments", "tricks"),
    [
        (Classifier, loader, {"max_steps": 5}, []),
        (Classifier, loader, {"limit_train_batches": 3}, []),
        (Classifier, loader, {"limit_train_batches": 0.5}, []),
        (Classifier, loader, {"overfit_batches": 2}, []),
        (Classifier, loader, {"fast_dev_run": 2}, []),
        (Classifier, loader, {"accumulate_grad_batches": 3}, []),
        (Classifier, loader, {}, [GradientAccumulationScheduler({0: 1, 1: 3})]),
        (Classifier, loader, {"max_epochs": 9, "max_steps": 10}, [GradientAccumulationScheduler({0: 1, 1: 3})]),
        (lambda: Reloads((4, 4, 4)), None, RELOAD, []),
        (Classifier, endless, {"limit_train_batches": 4}, []),
        (Classifier, endless, {"max_epochs": -1, "max_steps": 9}, []),
        (Classifier, loader, {}, [StopsItself()]),
        (Classifier, loader, {"min_epochs": 3}, [StopsItself()]),
        (Classifier, loader, {}, [StopAtTarget("train_loss", 99.0, "min")]),
        (Classifier, loader, {}, [EarlyStopping("train_loss", patience=1, check_on_train_epoch_end=True, mode="max")]),
        (Classifier, lambda: loader(64), {"max_epochs": 4}, [SubsetTraining(0.5, method="random")]),
        (Classifier, lambda: loader(64), {"max_epochs": 4}, [ProgressiveResizing(fill_batch=True, multiple=2, probe=False)]),
        (Classifier, lambda: loader(64), {"max_epochs": 4, "accumulate_grad_batches": 3, "limit_train_batches": 0.5},
         [SubsetTraining(0.5, method="random"), ProgressiveResizing(fill_batch=True, multiple=2, probe=False)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [1, -1])
def test_an_ordinary_run_is_as_it_was_planned_and_nothing_is_said(make, data, arguments, tricks, order):
    module, place = make(), Place()
    trainer(callbacks=[place, *tricks][::order], **arguments).fit(module, data and data())  # a warning is an error
    assert place.saved.courses == [Course(place.length, place.length)]


# ---- several optimizers


class Adversaries(TwoOptimizers):
    def __init__(self, schedule=False, lr=0.01):
        super().__init__(lr=(lr, 2 * lr))
        self.schedule = schedule

    def configure_optimizers(self):
        made = super().configure_optimizers()
        return made, [StepLR(made[0], 1, 0.5)] if self.schedule else []


def test_each_optimizer_goes_by_its_own_steps():
    module, place = Adversaries(), Place(total_steps=12)
    trainer(callbacks=[place], max_epochs=2).fit(module, loader(48))
    assert place.steps_done == [12, 4]
    assert module.rates == ([1 + t for t in range(12)], [1 + t for t in range(4)])


def test_each_optimizer_may_have_its_own_curve_or_none():
    module = Adversaries()
    trainer(callbacks=[Place(total_steps=3, optimizer=1)], max_epochs=2).fit(module, loader(48))
    assert module.rates == ([0.01] * 12, [1, 2, 3, 4])
    module = Adversaries()
    tricks = [Place(total_steps=5, optimizer=0), Place(total_steps=2, optimizer=1, name="Other")]
    trainer(callbacks=tricks, max_epochs=2).fit(module, loader(48))
    assert module.rates == ([1, 2, 3, 4, 5] + [6] * 7, [1, 2, 3, 3])


@pytest.mark.parametrize("stop", [1, 5, 8, 14])  # Lightning counts the steps of both
def test_several_optimizers_resume_each_at_its_own_step(stop):
    module = Adversaries()
    fit_interrupted(module, ReplayLoader(6), stop, [Place(total_steps=12)], max_epochs=2)
    first, second = module.rates
    resume(module, ReplayLoader(6), [Place(total_steps=12)], max_epochs=2)
    assert first + module.rates[0] == [1 + t for t in range(12)]
    assert second + module.rates[1] == [1 + t for t in range(4)]


def test_several_optimizers_extend_each_from_its_own_place():
    module = Adversaries()
    fit_interrupted(module, ReplayLoader(6), 8, [Place(total_steps=12)], max_epochs=3)
    with pytest.warns(UserWarning, match="had 12 optimizer steps, this one has 18") as record:
        resume(module, ReplayLoader(6), [Place(total_steps=18, on_resume="extend")], max_epochs=3)
    told_once(record, "18")
    np.testing.assert_allclose(module.rates[0], [1 + 6 + t * 6 / 12 for t in range(12)])
    np.testing.assert_allclose(module.rates[1], [1 + 2 + t * 10 / 16 for t in range(4)])


def test_a_curve_over_a_part_of_the_optimizers_names_a_missing_one():
    with pytest.raises(
        MisconfigurationException,
        match=r"Place\(optimizer=2\) counts from 0, but this run has 2 optim",
    ):
        trainer(callbacks=[Place(total_steps=5, optimizer=2)]).fit(Adversaries(), loader())


# ---- other owners


def with_scheduler():
    return scheduled(lambda optimizer: StepLR(optimizer, 1, 0.5), "epoch")


@pytest.mark.parametrize(
    ("module", "tricks", "told"),
    [
        (with_scheduler, [Place()], "Place sets the learning rate of every step, and so does the scheduler StepLR from configure_optimizers. Remove one"),
        (Classifier, [Place(), StochasticWeightAveraging(0.1)], "the callback StochasticWeightAveraging"),
        (Classifier, [Place(), Place(name="Other")], "Place sets the learning rate .* the callback Other"),
        (Classifier, [Place(("lr", "momentum")), Place(("momentum",), name="Other")], "the callback Other"),
        (Classifier, [Place(("momentum", "weight_decay")), Place(("momentum",), name="Other")], "sets the momentum and weight_decay of every step"),
        (lambda: Adversaries(schedule=True), [Place(total_steps=9)], "the scheduler StepLR"),
        (lambda: Adversaries(schedule=True), [Place(total_steps=9, optimizer=0)], "the scheduler StepLR"),
        (Adversaries, [Place(total_steps=9), Place(total_steps=9, optimizer=1, name="Other")], "the callback Other"),
        (Adversaries, [Place(total_steps=9, optimizer=1), Place(total_steps=9, optimizer=1, name="Other")], "the callback Other"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_another_owner_of_the_same_value_is_refused_at_fit_start_by_name(module, tricks, told):
    module = module()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=tricks).fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize(
    ("module", "tricks"),
    [
        (with_scheduler, [Place(("momentum",))]),
        (Classifier, [Place(), Place(("momentum",), name="Other")]),
        (lambda: Adversaries(schedule=True), [Place(total_steps=9, optimizer=1)]),
        (lambda: Adversaries(schedule=True), [Place(("momentum",), total_steps=9, optimizer=0)]),
        (Adversaries, [Place(total_steps=9, optimizer=0), Place(total_steps=9, optimizer=1, name="Other")]),
    ],
)
def test_owners_of_other_values_or_other_optimizers_may_stay(module, tricks):
    module = module()
    trainer(callbacks=tricks, max_epochs=1).fit(module, loader())
    assert len(module.losses) == 4


class With(Classifier):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        optimizer = self.make(self)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


@pytest.mark.parametrize(
    ("make", "key", "told"),
    [
        (lambda m: Adagrad(m.parameters()), "momentum", r"drives `momentum`, but Adagrad has none, only \['lr', .*Name one of these"),
        (lambda m: SGD(m.parameters(), 0.1), "beta", "drives `beta`, but SGD has none"),
        (lambda m: SGD(m.parameters(), 0.1), "foreach", "drives `foreach`, which must be a number, but SGD has None there"),
        (lambda m: SGD(m.parameters(), 0.1), "nesterov", "drives `nesterov`, which must be a number, but SGD has False there"),
    ],
)  # fmt: skip
def test_a_value_that_the_optimizer_lacks_is_refused_at_fit_start(make, key, told):
    module = With(make)
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[Place((key,))]).fit(module, loader())
    assert not module.losses


def test_a_value_that_only_another_optimizer_lacks_is_none_of_its_business():
    class Mixed(Adversaries):
        def configure_optimizers(self):
            return [super().configure_optimizers()[0][0], Adagrad(self.backbone.parameters())]

    trainer(callbacks=[Place(("momentum",), total_steps=9, optimizer=0)], max_epochs=1).fit(Mixed(), loader())


def test_momentum_is_the_first_beta_of_the_adam_family():
    assert get_value({"betas": (0.8, 0.99)}, "momentum") == 0.8
    assert get_value({"momentum": 0.7}, "momentum") == 0.7
    assert entry({"betas": (0.8, 0.99)}, "momentum", 0.5) == {"betas": (0.5, 0.99)}
    assert entry({"momentum": 0.7}, "momentum", 0.5) == {"momentum": 0.5}
    assert entry({"betas": (0.8, 0.99), "lr": 1.0}, "lr", 0.5) == {"lr": 0.5}


# ---- unknown lengths


@pytest.mark.parametrize(
    ("module", "data", "arguments"),
    [
        (Classifier, endless, {}),
        (Classifier, loader, {"max_epochs": -1}),
        (Classifier, loader, {"max_epochs": None, "max_time": {"hours": 1}}),
        (Adversaries, endless, {}),
        (Adversaries, loader, {"max_epochs": -1}),
    ],
)
def test_an_unknown_length_is_refused_at_fit_start_with_the_way_out(module, data, arguments):
    module = module()
    told = "Place needs the length of the run, and this one's is unknown .* Give `total_steps=`, in optimizer steps, or `Trainer\\(max_steps"
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[Place()], **arguments).fit(module, data())
    assert not module.losses


@pytest.mark.parametrize(
    ("data", "given", "arguments"),
    [
        (endless, {"total_steps": 12}, {}),
        (endless, {}, {"max_steps": 12}),
        (endless, {}, {"max_steps": 12, "max_epochs": -1}),
        (loader, {"total_steps": 12}, {"max_epochs": -1, "limit_train_batches": 12}),
    ],
)
def test_the_ways_out_of_an_unknown_length_lead_out(data, given, arguments):
    module = Classifier()
    trainer(callbacks=[Place(**given), Ends()], **arguments).fit(module, data())
    assert rates(module) == [1 + t for t in range(12)]


class Ends(Callback):
    """Ends an endless run after 12 steps."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 12


# ---- groups that appear later


class Unfreezes(BaseFinetuning):
    """A user's own finetuning: the backbone joins in epoch 1, at a fifth of the head's rate, its norms in epoch 2."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer, initial_denom_lr=5.0)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[1], optimizer, lr=0.1)


def head_first(**options):
    def make(module):
        trained = [p for p in module.parameters() if p.requires_grad]
        return SGD(trained, lr=0.05, momentum=0.9, **options)

    return With(make)


def later_rates(module):
    np.testing.assert_allclose(rates(module), [1 + t for t in range(12)])
    np.testing.assert_allclose(rates(module, 1), [(1 + t) / 5 for t in range(4, 12)])
    np.testing.assert_allclose(rates(module, 2), [(1 + t) * 2 for t in range(8, 12)])


@pytest.mark.parametrize("order", [1, -1])
def test_groups_that_appear_later_keep_the_ratio_of_their_rate_to_the_first_groups(order):
    module = head_first()
    trainer(callbacks=[Place(), Unfreezes()][::order]).fit(module, loader())
    later_rates(module)


@pytest.mark.parametrize("stop", [2, 4, 5, 8, 11])
def test_groups_that_appear_later_keep_their_ratio_over_a_resume(stop):
    module = head_first()
    # Resumed from the last batch of an epoch Lightning calls no hook of its end, nor of the next one's start.
    fit_interrupted(module, ReplayLoader(), stop, [Place(), Unfreezes()], epoch_end=stop % 4 == 0)
    again = head_first()
    again.values = module.values
    resume(again, ReplayLoader(), [Place(), Unfreezes()])
    later_rates(again)


def test_groups_that_are_there_from_the_start_go_by_the_curve_alone():
    module = With(
        lambda m: SGD([{"params": m.backbone.parameters(), "lr": 0.3}, {"params": m.head.parameters()}], lr=0.1)
    )
    trainer(callbacks=[Place()]).fit(module, loader())
    assert rates(module, 0) == rates(module, 1) == [1 + t for t in range(12)]


def test_a_later_group_beside_a_first_one_at_rate_0_goes_by_the_curve_alone():
    def make(module):
        return SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)

    module = With(make)
    trainer(callbacks=[Place(), Unfreezes()]).fit(module, loader())
    assert rates(module, 2) == [1 + t for t in range(8, 12)]


class Lists(Place):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.rates = {"max_lr": [0.1]}


def test_a_list_of_rates_is_for_the_groups_of_its_own_optimizer():
    class Three(Adversaries):
        def configure_optimizers(self):
            (first, second), _ = super().configure_optimizers()
            first.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
            return first, second

    trainer(callbacks=[Lists(total_steps=9, optimizer=1)], max_epochs=1).fit(Three(), loader())
    with pytest.raises(MisconfigurationException, match="has 1 value, but SGD has 2 parameter groups"):
        trainer(callbacks=[Lists(total_steps=9, optimizer=0)], max_epochs=1).fit(Three(), loader())


@pytest.mark.parametrize("order", [1, -1])
def test_a_list_of_rates_is_for_the_groups_of_the_start_also_when_resumed_with_more(order):
    fit_interrupted(head_first(), ReplayLoader(), 6, [Lists(), Unfreezes()][::order])
    again = head_first()
    resume(again, ReplayLoader(), [Lists(), Unfreezes()][::order])
    assert len(again.values[-1]) == 3
    two = With(lambda m: SGD([{"params": m.backbone.parameters()}, {"params": m.head.parameters()}], lr=0.1))
    with pytest.raises(
        MisconfigurationException, match=r"max_lr=\[0.1\]\) has 1 value, but SGD has 2 parameter groups"
    ):
        trainer(callbacks=[Lists()]).fit(two, loader())


# ---- a rate given as a tensor


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_rate_given_as_a_tensor_is_a_tensor_in_each_step_and_the_users_own_afterwards(kind):
    rate, seen = torch.tensor(0.25, dtype=kind), []

    def make(module):
        optimizer = AdamW(module.parameters(), lr=rate, foreach=False)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append((o.param_groups[0]["lr"].clone(), rate.clone())))
        return optimizer

    module, one = With(make), trainer(callbacks=[Place()])
    one.fit(module, loader())
    assert [(float(shown), float(own)) for shown, own in seen] == [(1.0 + t, 0.25) for t in range(12)]
    assert {shown.dtype for shown, _ in seen} == {kind}
    assert one.strategy.optimizers[0].param_groups[0]["lr"] is rate


# ---- what the user sees


def watched(module, tricks, data=None, **monitor):
    logger = Memory()
    trainer(
        callbacks=[*tricks, LearningRateMonitor("step", **monitor)], logger=logger, log_every_n_steps=1
    ).fit(module, data or loader())  # fmt: skip
    return logger


def test_the_rate_monitor_shows_the_true_values_under_lightnings_own_names():
    logger = watched(
        Classifier(), [Place(("lr", "momentum", "weight_decay"))], log_momentum=True, log_weight_decay=True
    )
    for name in ("lr-SGD", "lr-SGD-momentum", "lr-SGD-weight_decay"):
        assert logger[name] == [1 + t for t in range(12)]


def test_the_rate_monitor_shows_the_first_beta():
    logger = watched(Classifier(optimizer="adam"), [Place(("momentum",), unit=0.05)], log_momentum=True)
    np.testing.assert_allclose(logger["lr-AdamW-momentum"], [0.05 * (1 + t) for t in range(12)])
    assert logger["lr-AdamW"] == [0.05] * 12


def test_the_rate_monitor_shows_the_true_values_in_manual_optimization():
    logger = watched(Adversaries(), [Place(total_steps=12)], loader(24))
    assert logger["lr-SGD"] == [1 + t for t in range(9)]
    assert logger["lr-SGD-1"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_rate_monitor_shows_groups_that_appear_later():
    logger = watched(head_first(), [Place(), Unfreezes()])
    assert logger["lr-SGD/pg1"] == [1 + t for t in range(4, 12)]
    np.testing.assert_allclose(logger["lr-SGD/pg2"], [(1 + t) / 5 for t in range(4, 12)])


def test_a_checkpoint_has_the_optimizers_own_values_and_plain_numbers_alone():
    run = trainer(callbacks=[Place()], max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05
    assert saved["callbacks"]["Place"] == {
        "steps_done": [4], "courses": [[4, 4, 0, 0.0]], "groups": [1], "told": 4, "outlook": [1, 0, 4, 8],
    }  # fmt: skip
