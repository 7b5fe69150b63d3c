"""What every trick that sets values step by step must be able to do; the tricks are found, not listed.

The test file of a schedule has ``CURVES``: by name, what it makes of a group's values, said a second time (see `curves`). Other tricks may have it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pickle

import pytest
import torch
from curves import OWN, Curve, Steps, own_values, value_of
from found import TRICKS, own_tests
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rivals import RIVALS, ByHand, ByHandAtTheStep, ByHandTold, Rival
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_speedups import LRCurve, WarmupLRScaler
from lightning_speedups.attach.steps import OptimizerTrick
from lightning_speedups.tricks.rates.base import ScheduleTrick
from zoo import (
    STOPS,
    Classifier,
    Interrupted,
    Joins,
    Manual,
    Memory,
    ReplayLoader,
    SometimesInfinite,
    TwoGroups,
    TwoOptimizers,
    assert_same_weights,
    endless,
    fit_interrupted,
    loader,
    resume,
    scaled,
    scheduled,
    trainer,
    weights,
)

DRIVERS = [name for name, trick in TRICKS.items() if isinstance(trick, type) and issubclass(trick, OptimizerTrick)]
CURVES = {f"{name}: {key}": curve for name in DRIVERS for key, curve in getattr(own_tests(name), "CURVES", {}).items()}
ONE_OF_EACH = {(key.split(":")[0], *curve.values(Steps(), OWN)[0]): key for key, curve in reversed(CURVES.items())}
"""The first curve of each trick and each set of values that it drives, for what does not depend on its shape."""
SCHEDULES = [key for key in ONE_OF_EACH.values() if isinstance(CURVES[key].make(), ScheduleTrick)]


def of_curves(keys):
    return pytest.mark.parametrize("curve", [pytest.param(CURVES[key], id=key) for key in keys])


OF_THE_RATE = [key for key in SCHEDULES if "lr" in CURVES[key].make().keys]
every_curve, every_driver, every_schedule = of_curves(CURVES), of_curves(ONE_OF_EACH.values()), of_curves(SCHEDULES)
every_rate = of_curves(OF_THE_RATE)


def each_rate_once(name, values):
    """Each curve of the rate with one of the values, and each of these at least once."""
    assert len(OF_THE_RATE) >= len(values)
    pairs = zip(OF_THE_RATE, itertools.cycle(values), strict=False)
    return pytest.mark.parametrize(("curve", name), [(CURVES[key], value) for key, value in pairs])


def test_every_schedule_has_curves():
    schedules = {name for name in DRIVERS if issubclass(TRICKS[name], ScheduleTrick)}
    assert schedules
    assert schedules == {key.split(":")[0] for key in SCHEDULES}
    assert len(CURVES) > len(ONE_OF_EACH) > len(SCHEDULES)


@pytest.mark.parametrize("accumulate", [1, 4])
@every_curve
def test_each_step_has_its_values_also_with_a_short_last_window(curve, accumulate):
    module = Classifier()
    trainer(callbacks=[curve.make()], accumulate_grad_batches=accumulate).fit(module, loader(48))
    curve.check(module.values, Steps([6] * 3 if accumulate == 1 else [2] * 3))


@every_driver
def test_a_changing_accumulation_is_counted_right(curve):
    module = Classifier()
    tricks = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), curve.make()]
    trainer(callbacks=tricks).fit(module, loader(80))
    curve.check(module.values, Steps([10, 5, 3]))


@every_driver
def test_max_steps_ends_the_curve(curve):
    module = Classifier()
    trainer(callbacks=[curve.make()], max_epochs=-1, max_steps=6).fit(module, loader())
    curve.check(module.values, Steps([4, 4], limit=6))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@every_driver
def test_a_step_that_the_grad_scaler_skips_moves_nothing(curve):
    module, trick = SometimesInfinite(bad={0, 5, 6}), curve.make()
    trainer(callbacks=[trick], plugins=[scaled()]).fit(module, loader())
    assert trick.steps_done == [9]
    curve.check(module.values, Steps(done=[3, 2, 4]))


@every_driver
def test_adams_first_beta_is_its_momentum_and_the_second_stays(curve):
    module = Classifier(optimizer="adam")
    own = own_values(module)
    trainer(callbacks=[curve.make()]).fit(module, loader())
    curve.check(module.values, Steps(), own)
    assert {step[0]["betas"][1] for step in module.values} == {0.999}


@every_driver
def test_each_group_that_is_there_from_the_start_follows_from_its_own_values(curve):
    module = TwoGroups()
    trainer(callbacks=[curve.make()]).fit(module, loader())
    for group, lr in enumerate(module.rates):
        curve.check(module.values, Steps(), {**OWN, "lr": lr, "weight_decay": 0.0}, group)


@every_driver
def test_a_group_that_appears_later_keeps_its_ratio_and_gets_the_momentum(curve):
    module = Joins()
    own = own_values(module)
    trainer(callbacks=[curve.make()]).fit(module, loader())
    curve.check(module.values, Steps(), own)
    for first, later in module.values[4:]:
        assert later["lr"] == pytest.approx(first["lr"] / 4, rel=1e-9)
        assert later["momentum"] == first["momentum"]


@functools.cache
def uninterrupted(curve):
    """A module after a whole run."""
    torch.manual_seed(0)
    module = Classifier()
    trainer(callbacks=[curve.make()]).fit(module, ReplayLoader())
    return module


def resumes_exactly(curve, stop, epoch_end):
    whole = uninterrupted(curve)
    torch.manual_seed(0)
    parted = Classifier()
    if stop < len(whole.values):  # one ends its run earlier
        fit_interrupted(parted, ReplayLoader(), stop, [curve.make()], epoch_end)
        resume(parted, ReplayLoader(), [curve.make()])
        curve.check(parted.values, Steps())
        assert parted.values == whole.values
        assert_same_weights(weights(whole), weights(parted))


@pytest.mark.parametrize(("stop", "epoch_end"), [*((stop, False) for stop in STOPS), (8, True)])
@every_driver
def test_a_resumed_run_goes_on_exactly(curve, stop, epoch_end):
    resumes_exactly(curve, stop, epoch_end)


@every_curve
def test_a_run_resumed_in_the_middle_follows_any_curve(curve):
    resumes_exactly(curve, 6, False)


@every_driver
def test_checkpoints_hold_the_users_own_values(curve):
    run, module = trainer(callbacks=[trick := curve.make()]), Classifier(lr=0.123)
    own = own_values(module)
    run.fit(module, loader())
    run.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=True)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert {key: value_of(group, key) for key in OWN} == own
    assert saved["callbacks"][trick.state_key]["steps_done"] == [len(module.values)]


@every_driver
def test_it_pickles_with_its_count(curve):
    module, trick = Classifier(), curve.make()
    trainer(callbacks=[trick]).fit(module, loader())
    assert pickle.loads(pickle.dumps(trick)).steps_done == [len(module.values)]


@every_driver
def test_an_exception_leaves_the_optimizers_own_values(curve):
    module = Classifier()
    own = own_values(module)
    module.on_train_batch_end = lambda outputs, batch, batch_idx: fail() if batch_idx == 2 else None

    def fail():
        raise Interrupted

    run = trainer(callbacks=[curve.make()])
    with pytest.raises(Interrupted):
        run.fit(module, loader())
    assert {key: value_of(run.optimizers[0].param_groups[0], key) for key in OWN} == own


@every_driver
def test_the_rate_monitor_shows_the_true_values(curve):
    logger, module = Memory(), Classifier()
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    trainer(callbacks=[curve.make(), monitor], logger=logger, log_every_n_steps=1).fit(module, loader())
    assert logger["lr-SGD"] == [step[0]["lr"] for step in module.values]
    for key in ("momentum", "weight_decay"):
        assert logger[f"lr-SGD-{key}"] == [step[0][key] for step in module.values]


# ---- schedules: tricks that own a value for the whole run


@every_schedule
def test_a_warm_up_lies_on_top(curve):
    module = Classifier()
    trainer(callbacks=[WarmupLRScaler(scale=2.0, warmup_steps=4), curve.make()]).fit(module, loader())
    factors = [1 + min(step, 4) / 4 for step in range(12)]

    def values(steps, own):
        rows = zip(factors, curve.values(steps, own), strict=True)
        return [{**row, "lr": factor * row.get("lr", own["lr"])} for factor, row in rows]

    Curve(curve.make, values).check(module.values, Steps())


@every_schedule
def test_manual_optimization_moves_each_optimizer_by_its_own_steps(curve):
    module = TwoOptimizers()
    trick = curve.make(total_steps=12)
    trainer(callbacks=[trick], max_epochs=2).fit(module, loader(48))
    assert trick.steps_done == [12, 4]
    for notes, lr in zip(module.notes, module.own_rates, strict=True):
        curve.check(notes, Steps([6, 6], done=[len(notes)]), {**OWN, "lr": lr, "weight_decay": 0.0})


@pytest.mark.parametrize("every", [1, 3])
@every_schedule
def test_manual_optimization_of_unknown_steps_goes_by_batches(curve, every):
    module, trick = TwoOptimizers(every), curve.make()
    trainer(callbacks=[trick], max_epochs=2).fit(module, loader(48))
    assert trick.steps_done == [12, 12 // every]
    steps = Steps([6, 6])
    for (notes, lr), apart in zip(zip(module.notes, module.own_rates, strict=True), (1, every), strict=True):
        own = {**OWN, "lr": lr, "weight_decay": 0.0}
        first = apart - 1 if trick.needs_length else 0  # a cycle of so many steps has no end that it must meet
        by_batch = list(curve.values(steps, own))[first :: apart if trick.needs_length else 1][: len(notes)]
        Curve(curve.make, lambda *_, rows=by_batch: rows).check(notes, Steps([len(notes)]), own)


@every_schedule
def test_one_of_two_optimizers_may_be_driven_alone(curve):
    module = TwoOptimizers()
    trainer(callbacks=[curve.make(total_steps=4, optimizer=1)], max_epochs=2).fit(module, loader(48))
    alone = Curve(curve.make, lambda steps, own: [{}] * 12)
    for notes, lr, own in zip(module.notes, module.own_rates, (alone, curve), strict=True):
        own.check(notes, Steps([len(notes)]), {**OWN, "lr": lr, "weight_decay": 0.0})


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise([*SCHEDULES, SCHEDULES[0]])))
def test_each_optimizer_may_have_a_curve_of_its_own(first, second):
    module, curves = TwoOptimizers(), (CURVES[first], CURVES[second])
    tricks = [curve.make(total_steps=12 if i == 0 else 4, optimizer=i) for i, curve in enumerate(curves)]
    trainer(callbacks=tricks, max_epochs=2).fit(module, loader(48))
    for notes, lr, curve in zip(module.notes, module.own_rates, curves, strict=True):
        curve.check(notes, Steps([len(notes)]), {**OWN, "lr": lr, "weight_decay": 0.0})


@every_schedule
def test_an_optimizer_that_is_not_there_is_refused(curve):
    told = r"\(optimizer=1\) counts from 0, but this run has 1 optimizer"
    with pytest.raises(MisconfigurationException, match=f"^{type(curve.make()).__name__}{told}"):
        trainer(callbacks=[curve.make(optimizer=1)]).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("make", "data", "arguments"),
    [(Classifier, endless, {}), (Classifier, loader, {"max_epochs": -1}), (Manual, endless, {})],
)
@every_schedule
def test_an_unknown_length_is_refused_with_the_way_out_where_it_matters(curve, make, data, arguments):
    module, trick = make(), curve.make()
    if trick.needs_length:
        with pytest.raises(MisconfigurationException, match=f"{trick.name} needs the length of .* Give `total_steps="):
            trainer(callbacks=[trick], **arguments).fit(module, data())
        assert not module.losses
    trainer(callbacks=[curve.make(total_steps=12)], **({"max_epochs": 3} | arguments), max_steps=12).fit(module, data())
    curve.check(module.values, Steps())


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@every_schedule
def test_another_owner_of_the_rate_is_refused_at_fit_start_by_name(curve):
    trick = curve.make()
    others = {
        "the scheduler StepLR from configure_optimizers": (scheduled(lambda o: StepLR(o, 1), "epoch"), []),
        "the callback StochasticWeightAveraging": (Classifier(), [StochasticWeightAveraging(0.1)]),
    }
    for name, (module, callbacks) in others.items():
        if "lr" in trick.keys:
            with pytest.raises(
                MisconfigurationException, match=f"{trick.name} sets the .* every step, and so does {name}"
            ):
                trainer(callbacks=[trick, *callbacks]).fit(module, loader())
            assert not module.losses


# ---- in the place of the module's own schedulers


def own_part(values):
    """What a run without schedulers has in its groups: theirs note more there."""
    return [[{key: group[key] for key in OWN} for group in step] for step in values]


@functools.cache
def alone(curve):
    """A run of the same module without a scheduler."""
    torch.manual_seed(0)
    module = Rival(None)
    trainer(callbacks=[curve.make()]).fit(module, loader())
    return module


def assert_same_run(one, other):
    assert own_part(one.values) == own_part(other.values)
    assert one.losses == other.losses
    assert_same_weights(weights(one), weights(other))


@pytest.mark.parametrize("rival", RIVALS)
@every_rate
def test_in_a_schedulers_place_the_run_is_that_without_one(curve, rival, caplog):
    torch.manual_seed(0)
    module, trick = Rival(rival), curve.make(replace=True)
    run = trainer(callbacks=[trick, LearningRateMonitor()], logger=Memory())
    with caplog.at_level(logging.INFO):
        run.fit(module, loader())
    assert_same_run(module, alone(curve))
    told = [record.message for record in caplog.records if "takes the place" in record.message]
    assert len(told) == 1
    for config in run.lr_scheduler_configs:
        assert f"{type(config.scheduler).__name__} (interval {config.interval})" in told[0]
        assert config.frequency == 1
    falls_away = rival in ("OneCycleLR", "CyclicLR") and "momentum" not in trick.keys
    assert ("; the momentum that it cycles stays" in told[0]) is falls_away


@every_schedule
def test_where_there_is_no_scheduler_nothing_is_said_or_changed(curve, caplog):
    module = Classifier()
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[curve.make(replace=True)]).fit(module, loader())
    curve.check(module.values, Steps())
    assert "takes the place" not in caplog.text


@pytest.mark.parametrize("kind", [ByHand, ByHandAtTheStep, ByHandTold])
@every_rate
def test_a_scheduler_that_the_module_steps_itself_rests_too(curve, kind, caplog):
    torch.manual_seed(0)
    module = kind()
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[curve.make(replace=True)]).fit(module, loader())
    curve.check(module.values, Steps())
    assert "takes the place of OneCycleLR (" in caplog.text


@each_rate_once("rival", ["StepLR", "OneCycleLR", "SequentialLR", "timm's"])
def test_a_resumed_run_in_a_schedulers_place_goes_on_exactly(curve, rival):
    whole, parted = alone_on_replay(curve), replayed(Rival(rival))
    stop = min(6, len(whole.values) - 1)
    fit_interrupted(parted, ReplayLoader(), stop, [curve.make(replace=True)])
    resume(parted, ReplayLoader(), [curve.make(replace=True)])
    assert_same_run(parted, whole)


def replayed(module):
    """The module with the weights that all of them begin with."""
    torch.manual_seed(0)
    module.load_state_dict(Classifier().state_dict())
    return module


@functools.cache
def alone_on_replay(curve):
    module = replayed(Rival(None))
    trainer(callbacks=[curve.make()]).fit(module, ReplayLoader())
    return module


@each_rate_once("rivals", [("OneCycleLR", "OneCycleLR"), ("StepLR", "LambdaLR from 0"), ("timm's", "two of them")])
def test_a_run_that_a_scheduler_began_is_resumed_from_the_optimizers_own_values(curve, rivals):
    begun, module = map(Rival, rivals)
    stop = 4
    fit_interrupted(begun, ReplayLoader(), stop, [])
    resume(module, ReplayLoader(), [curve.make(replace=True)])
    assert own_part(module.values) == own_part(alone(curve).values[stop:])


@every_rate
def test_the_refusal_and_the_warning_name_this_way_out(curve):
    with pytest.raises(MisconfigurationException, match=r"Remove one .*, or give `replace=True` to take its place\.$"):
        trainer(callbacks=[curve.make()]).fit(Rival("StepLR"), loader())
    with pytest.warns(UserWarning, match="steps itself\\? `replace=True` lays it to rest"):
        trainer(callbacks=[curve.make()]).fit(ByHand(), loader())


def test_the_warning_names_no_way_out_that_leads_nowhere():
    class MakesItLater(ByHand):
        def configure_optimizers(self):
            return Classifier.configure_optimizers(self)

        def on_train_start(self):
            self.own = OneCycleLR(self.optimizers().optimizer, 0.7, total_steps=200)

    for trick, module in ((LRCurve(replace=True), MakesItLater()), (LRCurve(key="momentum"), ByHand())):
        with pytest.warns(UserWarning, match=r"steps itself\?\)"):
            trainer(callbacks=[trick]).fit(module, loader())


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("total_steps", 0, "`total_steps` to be a whole number of 1 or more, or None, but got 0"),
        ("total_steps", 1.5, "`total_steps`"),
        ("optimizer", -1, "`optimizer` to be a whole number of 0 or more, or None, but got -1"),
        ("optimizer", 0.0, "`optimizer`"),
        ("on_resume", "stop", "`on_resume` to be 'stretch' or 'extend', but got 'stop'"),
    ],
)
@every_schedule
def test_arguments_that_all_schedules_have_are_checked_at_once(curve, argument, value, told):
    with pytest.raises(ValueError, match=told):
        curve.make(**{argument: value})
