"""A run that ends when it is good enough, at a known step, and says what that took."""

import logging
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from curves import Curve
from lightning.pytorch.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LambdaLR
from two_processes import Notes, Regressor, two

from lightning_speedups import LRCurve, OneCycleMomentum, StopAtTarget, WarmupLRScaler
from lightning_speedups.core.plateau import is_reached
from lightning_speedups.core.schedules import OneCycle
from zoo import (
    Classifier,
    Clock,
    InterruptAt,
    Interrupted,
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


def EXAMPLE():
    return {"callbacks": [StopAtTarget("train_loss", 0.0, mode="min", finish="anneal")]}


class Learns(Classifier):
    """Its score is the number of batches it has seen, whenever it is asked."""

    def validation_step(self, batch, batch_idx):
        self.log("score", float(len(self.losses)))
        self.log("error", 1.0 / len(self.losses))


def at(target, **options):
    return StopAtTarget("score", target, "max", **options)


def rates(module):
    return [step[0]["lr"] for step in module.values]


def fit(module, tricks, data=None, **arguments):
    run = trainer(callbacks=tricks, **({"max_epochs": 6} | arguments))
    run.fit(module, loader() if data is None else data, loader(8))
    return run


class TakesTime(Learns):
    """Half a second a training batch, 20 seconds a validation."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 0.5
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 20.0
        super().validation_step(batch, batch_idx)


# ---- when it ends, and what it says


@pytest.mark.parametrize(("target", "steps"), [(1, 4), (4, 4), (5, 8), (9, 12), (99, 24)])
def test_the_run_ends_with_the_epoch_that_reaches_the_target(target, steps):
    module, stop = Learns(), at(target)
    fit(module, [stop])
    assert len(module.losses) == steps
    assert (stop.reached is not None) == (target < 99)


@pytest.mark.parametrize(
    ("metric", "mode", "target"), [("error", "min", 1 / 8), ("score", "max", 8.0), ("train_loss", "min", 99.0)]
)
def test_it_looks_at_any_metric_from_either_side(metric, mode, target):
    module, stop = Learns(), StopAtTarget(metric, target, mode)
    fit(module, [stop])
    assert len(module.losses) == (4 if metric == "train_loss" else 8)
    assert is_reached(stop.reached.value, target, mode)


@pytest.mark.parametrize(
    ("value", "mode", "reached"),
    [(0.9, "max", True), (0.91, "max", True), (0.89, "max", False), (0.9, "min", True), (0.89, "min", True), (0.91, "min", False),
     (math.nan, "max", False), (math.nan, "min", False), (math.inf, "max", True), (math.inf, "min", False)],
)  # fmt: skip
def test_the_target_itself_is_enough_and_nan_never_is(value, mode, reached):
    assert is_reached(value, 0.9, mode) is reached


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.7, 0.9, 1e-3, -0.9, 2.0])
def test_a_metric_at_the_target_is_there_in_its_own_precision(target, mode, kind):
    metric = torch.tensor(target, dtype=kind)
    assert is_reached(metric, target, mode)
    worse = torch.nextafter(metric, torch.tensor(-math.inf if mode == "max" else math.inf, dtype=kind))
    assert not is_reached(worse, target, mode)


def test_a_metric_of_whole_numbers_is_compared_as_they_are():
    assert not is_reached(torch.tensor(2), 2.5, "max")
    assert is_reached(torch.tensor(3), 2.5, "max")


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("target", [0.1, 0.7, 0.9])
def test_a_logged_metric_exactly_at_the_target_ends_the_run(target, mode):
    class Exact(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("score", target)

    module, stop = Exact(), StopAtTarget("score", target, mode)
    fit(module, [stop])
    assert len(module.losses) == 4
    assert stop.reached.value == pytest.approx(target)


def test_a_validation_in_mid_epoch_ends_it_there():
    module, stop = Learns(), at(6)
    fit(module, [stop], loader(64), val_check_interval=3)
    assert len(module.losses) == 6
    assert (stop.reached.epochs, stop.reached.steps, stop.reached.samples) == (1, 6, 48)


def test_epochs_without_a_validation_are_waited_for():
    module, stop = Learns(), at(1)
    fit(module, [stop], check_val_every_n_epoch=3)
    assert len(module.losses) == 12
    assert stop.reached.epochs == 3


def test_the_sanity_check_does_not_count():
    class AlwaysGood(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("score", 1.0)

    module, stop = AlwaysGood(), at(1)
    fit(module, [stop], num_sanity_val_steps=2)
    assert len(module.losses) == 4


def test_a_validation_outside_of_a_fit_does_not_count():
    stop = StopAtTarget("val_loss", 99.0, "min")
    trainer(callbacks=[stop]).validate(Classifier(), loader(), verbose=False)
    assert stop.reached is None


def test_it_reports_time_steps_and_samples(monkeypatch, caplog):
    logger, module, stop = (
        Memory(),
        TakesTime(Clock(monkeypatch, StopAtTarget.__module__)),
        at(8, finish="anneal", anneal=3),
    )
    with caplog.at_level(logging.INFO):
        fit(module, [stop], loader(30), logger=logger, log_every_n_steps=1)
    report = stop.reached
    assert (report.value, report.epochs, report.steps, report.samples) == (8.0, 2, 8, 60)
    assert report.seconds == pytest.approx(2 * (4 * 0.5 + 20.0))
    told = [record.getMessage() for record in caplog.records if "StopAtTarget" in record.getMessage()]
    assert told == ["StopAtTarget: score = 8 (target 8) after 44.0 s, 8 optimizer steps, 60 samples."]
    (logged,) = [metrics for metrics in logger.metrics if "target/steps" in metrics]
    assert logged == {
        "target/value": 8,
        "target/epochs": 2,
        "target/steps": 8,
        "target/samples": 60,
        "target/seconds": 44,
    }


def test_steps_are_optimizer_steps_and_samples_those_of_all_batches():
    module, stop = Learns(), at(6)
    fit(module, [stop], loader(48), accumulate_grad_batches=4)
    assert (stop.reached.steps, stop.reached.samples) == (2, 48)


class Several(Learns):
    """Trains on the first of several loaders."""

    def training_step(self, batch, batch_idx):
        first = batch
        while not isinstance(first[0] if isinstance(first, (list, tuple)) else None, torch.Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        return super().training_step(first, batch_idx)


def first_and_second():
    return loader(32, 8), loader(12, 4)  # 4 and 3 batches


@pytest.mark.parametrize(
    ("wrap", "mode", "steps", "samples"),
    [
        (lambda a, b: {"a": a, "b": b}, "max_size_cycle", 4, 32 + 16),
        (lambda a, b: {"a": a, "b": b}, "min_size", 3, 24 + 12),
        (lambda a, b: {"a": a, "b": b}, "max_size", 4, 32 + 12),
        (lambda a, b: [a, b], "max_size_cycle", 4, 32 + 16),
        (lambda a, b: (a, {"b": b}), "max_size_cycle", 4, 32 + 16),
    ],
)
def test_samples_are_those_of_all_loaders(wrap, mode, steps, samples):
    stop = at(1)
    fit(Several(), [stop], CombinedLoader(wrap(*first_and_second()), mode))
    assert (stop.reached.steps, stop.reached.samples) == (steps, samples)


def test_samples_that_cannot_be_counted_are_unknown():
    class Other:
        __slots__ = ("parts",)

    class Slotted(Learns):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.parts, batch_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                other = Other()
                other.parts = batch
                return other
            return batch

    stop = at(4)
    fit(Slotted(), [stop])
    assert stop.reached.samples is None


class Steps(Memory):
    """Keeps the step of each entry too."""

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics | {"at": step})


class LogsAll(Learns):
    """Logs in its steps and epochs whatever it optimizes."""

    def training_step(self, batch, batch_idx):
        self.log("of_step", 1.0)
        return super().training_step(batch, batch_idx)


class ManualLogs(TwoOptimizers, LogsAll):
    pass


@pytest.mark.parametrize("make", [LogsAll, partial(ManualLogs, every=1)])
@pytest.mark.parametrize(
    ("metric", "beside", "arguments"),
    [
        ("score", "score", {}),
        ("score", "score", {"val_check_interval": 2}),
        ("score", "score", {"accumulate_grad_batches": 2}),
        ("train_loss", "train_loss", {"limit_val_batches": 0}),
    ],
)
def test_the_report_is_logged_at_the_step_of_everything_else(make, metric, beside, arguments):
    if make is not LogsAll and "accumulate_grad_batches" in arguments:
        return  # manual optimization has none
    logger = Steps()
    stop = StopAtTarget(metric, 0.0, "max")
    fit(make(), [stop], logger=logger, log_every_n_steps=1, max_epochs=2, **arguments)
    (report,) = [metrics for metrics in logger.metrics if "target/steps" in metrics]
    assert report["at"] == next(metrics["at"] for metrics in logger.metrics if beside in metrics)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_step_that_the_grad_scaler_skips_is_none():
    class SometimesInfiniteAndLearns(SometimesInfinite, Learns):
        pass

    module, stop = SometimesInfiniteAndLearns(bad={1, 5}), at(8)
    fit(module, [stop], plugins=[scaled()])
    assert stop.reached.steps == 6


# ---- the last decay


def fall(steps):
    return list(1 - np.arange(steps) / steps)


def annealed(steps, own):
    before = (steps.done or steps.planned)[0]  # the first epoch reaches the target
    return [{"lr": own["lr"] * part} for part in [1] * before + fall(min(7, steps.total - steps.planned[0]))]


CURVES = {"annealed": Curve(partial(StopAtTarget, "train_loss", 99.0, "min", finish="anneal", anneal=7), annealed)}


@pytest.mark.parametrize(
    ("anneal", "steps"), [(1, 1), (3, 3), (6, 6), ("1 epochs", 4), ("2 steps", 2), (0.5, 4), ("25%", 2), (0.01, 1)]
)
def test_the_rate_falls_to_0_in_a_line_and_the_run_ends(anneal, steps):
    module, stop = Learns(), at(8, finish="anneal", anneal=anneal)
    fit(module, [stop])
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 8 + fall(steps)))
    assert stop.reached.steps == 8


def test_by_default_the_decay_is_a_tenth_of_the_steps_done():
    module = Learns()
    fit(module, [at(20, finish="anneal")], loader(160))
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 20 + fall(2)))


def test_the_decay_ends_with_the_run_at_the_latest():
    module = Learns()
    fit(module, [at(8, finish="anneal", anneal=100)], max_epochs=3)
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 8 + fall(4)))
    module = Learns()
    fit(module, [at(8, finish="anneal", anneal=100)], max_steps=10)
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 8 + fall(2)))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_the_decay_ends_with_the_run_also_when_steps_were_skipped():
    class SometimesInfiniteAndLearns(SometimesInfinite, Learns):
        pass

    module, stop = SometimesInfiniteAndLearns(bad={1, 2, 5}), at(8, finish="anneal", anneal=100)
    fit(module, [stop], max_epochs=3, plugins=[scaled()])
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 5 + fall(4)))


def test_reached_with_the_last_step_there_is_nothing_to_decay():
    module, stop = Learns(), at(8, finish="anneal", anneal=3)
    fit(module, [stop], max_epochs=2)
    assert rates(module) == [0.05] * 8
    assert stop.reached.steps == 8


def test_the_decay_begins_where_any_schedule_stands():
    module, stop = Learns(), at(8, finish="anneal", anneal=3)
    tricks = [stop, OneCycleMomentum(0.4), WarmupLRScaler(scale=2.0, warmup_steps=10)]
    fit(module, tricks)
    own = [OneCycle().at(t, 24, max_lr=0.4)[0] * (1 + min(t, 10) / 10) for t in range(9)]
    np.testing.assert_allclose(rates(module), own[:8] + [own[8] * part for part in fall(3)])
    np.testing.assert_allclose(
        [step[0]["momentum"] for step in module.values], [OneCycle().at(t, 24, 1.0)[1] for t in range(11)]
    )


def test_the_decay_begins_where_a_scheduler_of_torch_stands_which_goes_on_by_itself():
    module = scheduled(lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + t)), kind=Learns)
    run = fit(module, [at(8, finish="anneal", anneal=3)])
    np.testing.assert_allclose(
        rates(module), 0.05 * np.array([1 / (1 + t) for t in range(8)] + [part / 9 for part in fall(3)])
    )
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 12)


class Grows(TwoGroups, Learns):
    def on_train_batch_start(self, batch, batch_idx):
        if len(self.losses) == 9:
            self.extra = torch.nn.Parameter(torch.zeros(1))
            self.trainer.optimizers[0].add_param_group({"params": [self.extra], "lr": 0.7})


def test_each_group_decays_from_its_own_rate_also_one_that_appears_meanwhile():
    module = Grows()
    fit(module, [at(8, finish="anneal", anneal=4)])
    np.testing.assert_allclose(rates(module), 0.01 * np.array([1] * 8 + fall(4)))
    np.testing.assert_allclose([step[1]["lr"] for step in module.values], 0.3 * np.array([1] * 8 + fall(4)))
    np.testing.assert_allclose([step[2]["lr"] for step in module.values[9:]], 0.7 * np.array(fall(4)[1:]))


def test_the_decay_follows_a_changing_accumulation():
    module, stop = Learns(), at(4, finish="anneal", anneal=3)
    fit(module, [stop, GradientAccumulationScheduler({0: 1, 1: 2})])
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 4 + fall(3)))
    assert len(module.losses) == 4 + 2 * 3


def test_a_run_that_must_go_on_does_so_at_its_own_rate():
    module, stop = Learns(), at(4)
    fit(module, [stop], min_epochs=3)
    assert rates(module) == [0.05] * 12
    assert stop.reached.steps == 4


class Manual(TwoOptimizers, Learns):
    """Two optimizers, the second of which steps on every other batch, or never."""


def held(total, decay, lr=0.05):
    """Rates of a run that must go on to a total, and decays at its end."""
    return lr * np.array([1] * (total - decay) + fall(decay))


@pytest.mark.parametrize(
    ("minimum", "total"),
    [
        ({"min_epochs": 4}, 16),
        ({"min_epochs": 5, "min_steps": 3}, 20),
        ({"min_steps": 18}, 18),
        ({"min_steps": 16}, 16),
        ({"min_epochs": 2}, 11),  # which it has had
        ({"min_steps": 9}, 11),
        ({"min_epochs": 3, "max_steps": 10}, 10),
        ({"min_steps": 99, "max_epochs": 5}, 20),
    ],
)
def test_a_run_that_must_go_on_decays_when_it_may_end_and_no_step_is_wasted(minimum, total):
    module, stop = Learns(), at(8, finish="anneal", anneal=3)
    fit(module, [stop], **minimum)
    np.testing.assert_allclose(rates(module), held(total, min(3, total - 8)))
    assert stop.reached.steps == 8


def test_a_longer_decay_than_the_run_must_go_on_begins_at_once():
    module = Learns()
    fit(module, [at(8, finish="anneal", anneal=7)], min_epochs=3)
    np.testing.assert_allclose(rates(module), held(15, 7))


def test_with_other_epochs_before_it_decays_when_the_run_may_end():
    module = Learns()
    data = GradientAccumulationScheduler({0: 4, 1: 2, 3: 1})  # steps of 1, 2, 2, 4, 4, 4 of each epoch
    fit(module, [at(8, finish="anneal", anneal=3), data], min_epochs=4)
    np.testing.assert_allclose(rates(module), held(9, 3))


@pytest.mark.parametrize("stop", [9, 14, 15])
def test_a_run_that_waits_for_its_decay_goes_on_with_it_after_a_resume(stop):
    module, tricks = Learns(), [at(8, finish="anneal", anneal=3)]
    kind = {"max_epochs": 6, "min_epochs": 4}
    with pytest.raises(Interrupted):
        trainer(callbacks=[*tricks, InterruptAt(stop)], **kind).fit(module, ReplayLoader(), loader(8))
    trainer(callbacks=[at(8, finish="anneal", anneal=3)], **kind).fit(
        module, ReplayLoader(), loader(8), ckpt_path="at.ckpt", weights_only=True
    )
    np.testing.assert_allclose(rates(module), held(16, 3))


@pytest.mark.parametrize(
    ("make", "data", "minimum"),
    [
        (Learns, endless, {"min_epochs": 4, "max_epochs": 6}),
        (partial(Manual, every=100, lr=(0.05, 0.05)), loader, {"min_steps": 16}),
    ],
)  # fmt: skip
def test_where_nobody_knows_how_long_the_run_must_go_on_it_decays_after_that(make, data, minimum):
    module = make()
    fit(module, [at(8, finish="anneal", anneal=3)], data(), **minimum)
    np.testing.assert_allclose(module.rates[0] if isinstance(module, Manual) else rates(module), held(19, 3))


def test_the_rate_monitor_shows_the_decay():
    monitor = LearningRateMonitor("step")
    fit(Learns(), [at(8, finish="anneal", anneal=4), monitor], logger=Memory(), log_every_n_steps=1)
    np.testing.assert_allclose(monitor.lrs["lr-SGD"], 0.05 * np.array([1] * 8 + fall(4)))


def test_in_manual_optimization_each_optimizer_decays_by_its_own_steps():
    module, stop = Manual(every=2, lr=(0.1, 0.1)), at(8, finish="anneal", anneal=0.5)
    fit(module, [stop], max_epochs=9)
    assert stop.reached.steps == 8
    np.testing.assert_allclose(module.rates[0], 0.1 * np.array([1] * 8 + fall(4)))
    np.testing.assert_allclose(module.rates[1], 0.1 * np.array([1] * 4 + fall(2)))


def test_an_optimizer_that_never_steps_is_not_waited_for():
    module, stop = Manual(every=100, lr=(0.1, 0.1)), at(8, finish="anneal", anneal=3)
    fit(module, [stop], max_epochs=9)
    np.testing.assert_allclose(module.rates[0], 0.1 * np.array([1] * 8 + fall(3)))
    assert module.rates[1] == []


# ---- metrics that come late, or never


class LogsAtTheEnd(Classifier):
    """Logs in the hook that comes after all callbacks' turn."""

    def on_train_epoch_end(self):
        self.log("score", 1.0)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("validating", [True, False])
@pytest.mark.parametrize("make", [Classifier, LogsAtTheEnd])
def test_a_metric_that_nobody_logs_in_time_is_refused_after_the_first_epoch_by_name(make, validating, epochs):
    module = make()
    told = r"StopAtTarget\(monitor='score'\) finds that no such metric was logged in the first epoch, only \[.*'train_loss'.*Log it with `self.log\('score', ...\)` before the epoch's end"
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[at(1)], max_epochs=epochs).fit(module, loader(), loader(8) if validating else None)
    assert len(module.losses) == 4


def test_a_metric_of_a_validation_that_is_still_to_come_is_no_error():
    module = Learns()
    fit(module, [at(99)], check_val_every_n_epoch=4, max_epochs=3)
    assert len(module.losses) == 12


def test_a_run_resumed_at_an_epochs_end_has_not_missed_its_metric():
    module = Classifier()
    stop = StopAtTarget("train_loss", 0.0, "min")
    fit_interrupted(module, ReplayLoader(), 4, [stop], epoch_end=True)
    resume(module, ReplayLoader(), [StopAtTarget("train_loss", 0.0, "min")])
    assert len(module.losses) == 12


# ---- beside others


@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_beside_it_ends_a_run_that_does_not_get_better(order):
    class Stuck(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("score", 0.5)

    module, stop = Stuck(), at(0.9, finish="anneal")
    fit(module, [stop, EarlyStopping("score", mode="max", patience=2)][::order])
    assert len(module.losses) == 12
    assert stop.reached is None


@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_beside_it_lets_it_decay(order):
    module, stop = Learns(), at(8, finish="anneal", anneal=3)
    fit(module, [stop, EarlyStopping("score", mode="max", patience=2)][::order])
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 8 + fall(3)))


def test_two_targets_run_side_by_side():
    module, easy, hard = Learns(), at(4, finish="anneal", anneal=100), at(8)
    fit(module, [easy, hard])
    assert (easy.reached.steps, hard.reached.steps) == (4, 8)
    assert len(module.losses) == 8


def test_a_second_fit_starts_anew():
    stop = at(8, finish="anneal", anneal=3)
    for _ in range(2):
        module = Learns()
        fit(module, [stop])
        assert len(module.losses) == 11
        assert (stop.reached.steps, stop.reached.samples) == (8, 64)


# ---- resume


@pytest.mark.parametrize(
    ("finish", "stop", "epoch_end"),
    [
        ("now", 1, False),
        ("now", 4, True),
        *(("anneal", *point) for point in [(1, False), (4, True), (6, False), (8, True), (10, False)]),
    ],
)
def test_a_resumed_run_ends_as_the_whole_one_also_in_the_middle_of_its_decay(finish, stop, epoch_end):
    def tricks():
        return [StopAtTarget("train_loss", 99.0, "min", finish=finish, anneal=7), LRCurve("linear", total_steps=16)]

    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=tricks(), max_epochs=4).fit(whole, ReplayLoader())
    assert len(whole.losses) == (11 if finish == "anneal" else 4)
    fit_interrupted(parted, ReplayLoader(), stop, tricks(), epoch_end=epoch_end, max_epochs=4)
    resumed = tricks()
    resume(parted, ReplayLoader(), resumed, max_epochs=4)
    assert parted.values == whole.values
    assert_same_weights(weights(whole), weights(parted))
    assert (resumed[0].reached.steps, resumed[0].reached.samples, resumed[0].reached.epochs) == (4, 32, 1)


def test_the_break_between_resumed_runs_is_left_out_and_so_is_what_comes_after_a_run(monkeypatch):
    clock = Clock(monkeypatch, StopAtTarget.__module__)
    module, stop = TakesTime(clock), at(12)
    run = fit(module, [at(12)], ReplayLoader(), max_epochs=2)
    clock.now += 5000.0
    run.save_checkpoint("at.ckpt")
    clock.now += 5000.0
    resumed = trainer(callbacks=[stop], max_epochs=6)
    resumed.fit(module, ReplayLoader(), loader(8), ckpt_path="at.ckpt", weights_only=True)
    assert len(module.losses) == 12
    assert (stop.reached.steps, stop.reached.samples, stop.reached.epochs) == (12, 96, 3)
    assert stop.reached.seconds == pytest.approx(3 * (4 * 0.5 + 20))


def test_a_checkpoint_from_the_middle_of_a_run_has_its_time(monkeypatch):
    module = TakesTime(Clock(monkeypatch, StopAtTarget.__module__))
    fit_interrupted(module, loader(), 3, [at(99)])
    state = torch.load("at.ckpt", weights_only=True)["callbacks"][at(99).state_key]
    assert state["seconds"] == pytest.approx(1.5)
    assert (state["samples"], state["steps_done"], state["reached"]) == (24, [3], None)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("finish", ["now", "anneal"])
def test_in_two_processes_one_ranks_word_ends_both_at_the_same_step(finish):
    class OneIsThere(Regressor):
        def on_train_epoch_start(self):
            self.score = float(self.current_epoch + self.global_rank)

        def training_step(self, batch, batch_idx):
            self.log("score", self.score)
            return super().training_step(batch, batch_idx)

    class Report(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save([stop.reached.steps, stop.reached.samples, stop.reached.epochs], f"{trainer.global_rank}.pt")

    notes, stop = Notes(), at(2, finish=finish, anneal=3)
    two([stop, notes, Report()], max_epochs=6).fit(OneIsThere())
    first, second = notes.read()
    expected = [0.1] * 8 + ([0.1, 0.1 * 2 / 3, 0.1 / 3] if finish == "anneal" else [])
    for rank in (first, second):
        np.testing.assert_allclose([rate for (rate,) in rank["rates"]], expected)
    assert torch.load("0.pt") == torch.load("1.pt") == [8, 64, 2]


# ---- what it refuses


def test_a_decay_in_epochs_of_unknown_length_is_refused_at_fit_start():
    module, data = Learns(), endless()
    with pytest.raises(
        MisconfigurationException, match=r"StopAtTarget\(anneal='1 epochs'\) needs the length of an epoch"
    ):
        fit(module, [at(4, finish="anneal", anneal="1 epochs")], data)
    assert not module.losses


@pytest.mark.parametrize("arguments", [{}, {"max_epochs": -1}, {"max_epochs": None, "max_time": {"hours": 1}}])
def test_a_run_of_unknown_length_ends_and_decays_as_well(arguments):
    module, data = Learns(), endless()
    fit(module, [at(8, finish="anneal", anneal=0.5)], data, **arguments)
    np.testing.assert_allclose(rates(module), 0.05 * np.array([1] * 8 + fall(4)))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"monitor": ""}, "`monitor` to be the name of a metric, but got ''"),
        ({"monitor": 3}, "`monitor`"),
        ({"target": float("nan")}, "`target` to be a number"),
        ({"target": "high"}, "`target`"),
        ({"mode": "auto"}, "`mode` to be 'min' or 'max', but got 'auto'"),
        ({"finish": "later"}, "`finish` to be 'now' or 'anneal', but got 'later'"),
        ({"anneal": -1}, "`anneal` to be a whole number of optimizer steps"),
        ({"anneal": 1.5}, "`anneal`"),
        ({"anneal": "a while"}, "`anneal`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        StopAtTarget(**{"monitor": "score", "target": 0.9, "mode": "max", **arguments})


def test_it_pickles_with_its_report():
    stop = at(8)
    fit(Learns(), [stop])
    assert pickle.loads(pickle.dumps(stop)).reached == stop.reached
