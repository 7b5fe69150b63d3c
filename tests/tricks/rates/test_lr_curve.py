"""Each step of a real fit against torch's own schedulers."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from curves import Curve
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
)
from two_processes import Notes, Regressor, two

from lightning_speedups import LRCurve, OneCycleMomentum
from zoo import (
    Classifier,
    Clock,
    ReplayLoader,
    TwoGroups,
    TwoOptimizers,
    assert_same_weights,
    endless,
    fit_interrupted,
    loader,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [LRCurve("cosine", warmup=2)]}


def oracle(steps, make, lr=0.05):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of what torch deprecates
        scheduler, rates = make(optimizer), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return np.array(rates)


def read(module, key="lr", group=0):
    return [step[group][key] for step in module.values]


def check(module, expected, **options):
    np.testing.assert_allclose(read(module, **options), expected, rtol=1e-9, atol=1e-15)


def own_lr(optimizer):
    return optimizer.param_groups[0]["lr"]


SHAPES = {
    "cosine": ({}, lambda o, total: CosineAnnealingLR(o, total)),
    "cosine, end": ({"end_factor": 0.1}, lambda o, total: CosineAnnealingLR(o, total, 0.1 * own_lr(o))),
    "linear": ({}, lambda o, total: LinearLR(o, 1.0, 0.0, total)),
    "polynomial": ({"options": {"power": 3.0}}, lambda o, total: PolynomialLR(o, total, 3.0)),
    "exponential": ({}, lambda o, total: ExponentialLR(o, 0.01 ** (1 / total))),
    "exponential, end": ({"end_factor": 0.3}, lambda o, total: ExponentialLR(o, 0.3 ** (1 / total))),
    "step": (
        {"options": {"milestones": (1 / 3, 5 / 6), "gamma": 0.5}},
        lambda o, total: MultiStepLR(o, [total // 3, total * 5 // 6], 0.5),
    ),
    "cosine_restarts": ({"options": {"cycles": 3}}, lambda o, total: CosineAnnealingWarmRestarts(o, total // 3)),
    "cosine_restarts, growing": (
        {"end_factor": 0.1, "options": {"cycles": 2, "growth": 2}},
        lambda o, total: CosineAnnealingWarmRestarts(o, total // 3, 2, 0.1 * own_lr(o)),
    ),
}


def as_torch(name, arguments, make):
    def values(steps, own):
        return [{"lr": rate} for rate in oracle(steps.total, lambda optimizer: make(optimizer, steps.total), own["lr"])]

    return Curve(partial(LRCurve, name.split(",")[0], **arguments), values)


def warmed_up(optimizer, total):
    line, cosine = LinearLR(optimizer, 0.01, 1.0, 3), CosineAnnealingLR(optimizer, total - 3)
    return SequentialLR(optimizer, [line, cosine], [3])


def trapezoid(steps, own):
    up, down = 0.25 * steps.total, steps.planned[0]
    factors = [min(0.01 + 0.99 * t / up, 1.0, (steps.total - t) / down) for t in range(steps.total)]
    return [{"lr": own["lr"] * factor} for factor in factors]


def decay_in_two_lines(steps, own):
    bend = steps.total - 3
    factors = [1 - 0.5 * t / bend if t < bend else 0.5 * (steps.total - t) / 3 for t in range(steps.total)]
    return [{"weight_decay": own["weight_decay"] * factor} for factor in factors]


CURVES = {name: as_torch(name, *rest) for name, rest in SHAPES.items()} | {
    "cosine, warmed up": as_torch("cosine", {"warmup": 3}, warmed_up),
    "trapezoid": Curve(partial(LRCurve, "trapezoid", warmup=0.25, cooldown="1 epochs"), trapezoid),
    "weight decay": Curve(
        partial(LRCurve, "linear", key="weight_decay", cooldown=3, end_factor=0.5), decay_in_two_lines
    ),
    "momentum": Curve(
        partial(LRCurve, "linear", key="momentum"),
        lambda steps, own: [{"momentum": own["momentum"] * (1 - t / steps.total)} for t in range(steps.total)],
    ),
}


@pytest.mark.parametrize("warmup", [4, "4 steps", "1 epochs", 1 / 3])
@pytest.mark.parametrize("start", [0.01, 0.25])
def test_a_warm_up_is_torchs_sequence_of_a_line_and_the_shape(warmup, start):
    def make(optimizer):
        line, cosine = LinearLR(optimizer, start, 1.0, 4), CosineAnnealingLR(optimizer, 8)
        return SequentialLR(optimizer, [line, cosine], [4])

    module = Classifier()
    trainer(callbacks=[LRCurve("cosine", warmup=warmup, warmup_factor=start)]).fit(module, loader())
    check(module, oracle(12, make))


@pytest.mark.parametrize(
    ("arguments", "warmup", "cooldown", "end"),
    [
        ({"warmup": 3, "cooldown": 4}, 3, 4, 0.0),
        ({"warmup": 0.25, "cooldown": "50%", "cooldown_factor": 0.5}, 3, 6, 0.5),
        ({"warmup": "0.5 epochs", "cooldown": "1 epoch"}, 2, 4, 0.0),
        ({}, 0.05 * 12, 0.2 * 12, 0.0),
        ({"warmup": 0, "cooldown": 0}, 0, 0, 0.0),
        ({"warmup": 5, "cooldown": 7}, 5, 7, 0.0),
    ],
)
def test_the_trapezoid_rises_stays_and_falls_in_lines(arguments, warmup, cooldown, end):
    module, steps = Classifier(), np.arange(12)
    trainer(callbacks=[LRCurve("trapezoid", **arguments)]).fit(module, loader())
    up = 0.01 + 0.99 * steps / warmup if warmup else np.ones(12)
    down = end + (1 - end) * (12 - steps) / cooldown if cooldown else np.ones(12)
    check(module, 0.05 * np.minimum(np.minimum(up, down), 1.0))


def test_a_trapezoid_in_steps_is_torchs_sequence():
    def make(optimizer):
        parts = [LinearLR(optimizer, 0.01, 1.0, 3), ConstantLR(optimizer, 1.0, 1), LinearLR(optimizer, 1.0, 0.0, 4)]
        return SequentialLR(optimizer, parts, [3, 8])

    module = Classifier()
    trainer(callbacks=[LRCurve("trapezoid", warmup=3, cooldown=4)]).fit(module, loader())
    check(module, oracle(12, make))


def test_slow_start_and_fast_decay_begins_at_its_own_start_after_a_warm_up():
    module = Classifier()
    curve = LRCurve("slow_start_fast_decay", warmup=2, end_factor=0.04, options={"start": 0.5, "rise": 0.4})
    trainer(callbacks=[curve]).fit(module, loader())
    progress = np.arange(10) / 10
    shape = np.where(progress < 0.4, 0.5 + 0.5 * (progress / 0.4) ** 2, 0.04 ** ((progress - 0.4) / 0.6))
    check(module, 0.05 * np.array([0.01, 0.255, *shape]))


def test_a_users_own_function_of_progress_is_followed():
    module = Classifier()
    trainer(callbacks=[LRCurve(lambda progress: 2.0 - progress**2, warmup=3, warmup_factor=0.5)]).fit(module, loader())
    check(module, 0.05 * np.array([0.5, 1.0, 1.5, *(2 - (np.arange(9) / 9) ** 2)]))


@pytest.mark.parametrize(
    ("data", "parts"), [(loader(56), (0.07, 0.93)), (loader(8), (0.3, 0.7)), (loader(88), (0.1, 0.9))]
)
def test_a_warm_up_and_a_cooldown_that_add_up_to_the_run_fit_at_any_length(data, parts):
    module = Classifier()
    warmup, cooldown = parts
    trainer(callbacks=[LRCurve("trapezoid", warmup=warmup, cooldown=cooldown)], max_epochs=1).fit(module, data)
    total = len(module.values)
    up, down = 0.01 + 0.99 * np.arange(total) / (warmup * total), (total - np.arange(total)) / (cooldown * total)
    np.testing.assert_allclose(read(module), 0.05 * np.minimum(up, down), rtol=1e-6)


def test_a_changing_accumulation_is_counted_right():
    module = Classifier()
    tricks = [
        GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}),
        LRCurve("linear", warmup="1 epochs", warmup_factor=0.2),
    ]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, 0.05 * np.array([0.2, 0.4, 0.6, 0.8, 1.0, 2 / 3, 1 / 3]))


# ---- what it drives


@pytest.mark.parametrize(("key", "base"), [("momentum", 0.9), ("weight_decay", 0.01), ("dampening", 0)])
def test_any_other_number_of_the_groups_may_follow_a_curve(key, base):
    module = Classifier()
    trainer(callbacks=[LRCurve("linear", key=key, end_factor=0.5)]).fit(module, loader())
    check(module, [base * (1 - 0.5 * t / 12) for t in range(12)], key=key)
    assert set(read(module)) == {0.05}


def test_momentum_is_the_first_beta_of_adam():
    module = Classifier(optimizer="adam")
    trainer(callbacks=[LRCurve("linear", key="momentum"), LRCurve("linear", key="eps")]).fit(module, loader())
    np.testing.assert_allclose(read(module, "betas"), [(0.9 * (1 - t / 12), 0.999) for t in range(12)])
    check(module, [1e-8 * (1 - t / 12) for t in range(12)], key="eps")


def test_several_values_may_have_a_curve_each():
    module = Classifier()
    tricks = [
        LRCurve(),
        LRCurve("linear", key="weight_decay"),
        LRCurve("trapezoid", key="momentum", cooldown=6, warmup=0),
    ]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, oracle(12, lambda optimizer: CosineAnnealingLR(optimizer, 12)))
    check(module, [0.01 * (1 - t / 12) for t in range(12)], key="weight_decay")
    check(module, [0.9 * min(1.0, (12 - t) / 6) for t in range(12)], key="momentum")


class Grows(TwoGroups):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.extra = torch.nn.Parameter(torch.zeros(1))
            self.trainer.optimizers[0].add_param_group({"params": [self.extra], "lr": 0.7})


def test_each_group_follows_from_its_own_value_also_one_that_appears_later():
    module = Grows()
    trainer(callbacks=[LRCurve("linear")]).fit(module, loader())
    fall = 1 - np.arange(12) / 12
    check(module, 0.01 * fall, group=0)
    check(module, 0.3 * fall, group=1)
    np.testing.assert_allclose([step[2]["lr"] for step in module.values[4:]], 0.7 * fall[4:])


class TensorRate(Classifier):
    def configure_optimizers(self):
        self.rate = torch.tensor(0.5)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, foreach=False)
        self.seen = []
        optimizer.register_step_pre_hook(lambda o, *_: self.seen.append(o.param_groups[0]["lr"].item()))
        return optimizer

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.head(self.backbone(inputs)), labels)


def test_a_rate_given_as_a_tensor_follows_the_curve_and_stays_the_users_own():
    module = TensorRate()
    trainer(callbacks=[LRCurve("linear")]).fit(module, loader())
    assert module.seen == pytest.approx([0.5 * (1 - t / 12) for t in range(12)])
    assert module.rate.item() == 0.5


def test_the_rate_finder_finds_the_value_that_the_curve_starts_from():
    module = Classifier()
    finder = LearningRateFinder(min_lr=1e-3, max_lr=0.1, num_training_steps=24, early_stop_threshold=None)
    trainer(callbacks=[LRCurve("linear"), finder], max_epochs=1).fit(module, loader(240))
    assert module.lr != 0.05
    np.testing.assert_allclose(read(module)[-30:], [module.lr * (1 - t / 30) for t in range(30)])


def test_the_rate_monitor_shows_the_true_values_also_in_manual_optimization():
    monitor = LearningRateMonitor("step")
    run = trainer(
        callbacks=[LRCurve("linear", total_steps=12), monitor], max_epochs=2, logger=True, log_every_n_steps=1
    )
    run.fit(TwoOptimizers(), loader(48))
    assert monitor.lrs["lr-SGD"] == pytest.approx([0.1 * (1 - t / 12) for t in range(12)])
    assert monitor.lrs["lr-SGD-1"] == pytest.approx([0.02 * (1 - t // 3 / 12) for t in range(12)])


# ---- resume


def resumed(curve, epochs, stop=6):
    """The rates of a run of 12 steps that is resumed with another length."""
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), stop, [curve()])
    module.values.clear()
    with pytest.warns(
        UserWarning, match=f"LRCurve: the checkpoint's run had 12 optimizer steps, this one has {4 * epochs};"
    ):
        resume(module, ReplayLoader(), [curve()], max_epochs=epochs)
    return np.array(read(module)) / 0.05


def test_resumed_with_another_length_it_is_stretched():
    steps = np.arange(6, 16)
    rates = resumed(lambda: LRCurve("cosine"), 4)
    np.testing.assert_allclose(rates, (1 + np.cos(math.pi * steps / 16)) / 2)


def test_resumed_with_another_length_it_may_go_on_from_where_it_stood():
    positions = 6 + np.arange(10) * 6 / 10
    rates = resumed(lambda: LRCurve("cosine", warmup=0.25, on_resume="extend"), 4)
    np.testing.assert_allclose(rates, (1 + np.cos(math.pi * (positions - 3) / 9)) / 2)


@pytest.mark.parametrize(("epochs", "rates"), [(5, [1.0] * 10 + [1.0, 0.75, 0.5, 0.25]), (2, [0.5, 0.25])])
def test_a_trapezoid_in_steps_stretched_on_its_plateau_stays_there_and_falls_at_the_new_end(epochs, rates):
    np.testing.assert_allclose(resumed(lambda: LRCurve("trapezoid", warmup=3, cooldown=4), epochs), rates)


def test_resumed_with_a_length_too_short_for_its_ends_these_share_it():
    rates = resumed(lambda: LRCurve("trapezoid", warmup=3, cooldown=7, warmup_factor=0.0), 2, stop=5)
    up = 8 * 3 / 10
    np.testing.assert_allclose(rates, [(8 - t) / (8 - up) for t in (5, 6, 7)])


def test_a_warm_up_in_epochs_of_an_extended_run_keeps_its_place():
    rates = resumed(lambda: LRCurve("trapezoid", warmup="1 epochs", cooldown="1 epochs", on_resume="extend"), 6, stop=6)
    positions = 6 + np.arange(18) * 6 / 18
    np.testing.assert_allclose(rates, np.minimum(1.0, (12 - positions) / 4))


# ---- a cooldown at any time


class CoolsDown(Callback):
    """Calls for a cooldown after a batch."""

    def __init__(self, curve, step, steps=4, **options):
        self.curve, self.step, self.steps, self.options = curve, step, steps, options

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.curve.cool_down(self.steps, **self.options)


class CoolsAfterBatch(CoolsDown):
    """Calls for it after a batch of the first epoch, where several optimizers step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == self.step:
            self.curve.cool_down(self.steps)


def plateau(**options):
    return LRCurve("trapezoid", **({"warmup": 2, "cooldown": 0} | options))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_cooldown_begins_where_the_curve_stands_and_ends_the_run(at, order):
    module, curve = Classifier(), plateau()
    trainer(callbacks=[curve, CoolsDown(curve, at)][::order]).fit(module, loader())
    before = [0.01, 0.505] + [1.0] * 10
    check(module, 0.05 * np.array([*before[:at], *(before[at] * (1 - t / 4) for t in range(4))]))


def test_a_cooldown_goes_to_its_own_end_and_need_not_end_the_run():
    module, curve = Classifier(), plateau(cooldown_factor=0.2)
    trainer(callbacks=[curve, CoolsDown(curve, 5, stop=False)]).fit(module, loader())
    check(module, 0.05 * np.array([0.01, 0.505, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]))


def test_a_second_cooldown_begins_within_the_first():
    module, curve = Classifier(), plateau()
    tricks = [curve, CoolsDown(curve, 4), CoolsDown(curve, 6, steps=5)]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, 0.05 * np.array([0.01, 0.505, 1, 1, 1.0, 0.75, 0.5, 0.4, 0.3, 0.2, 0.1]))


def test_a_cooldown_may_begin_before_the_first_step():
    class AtOnce(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 0:
                curve.cool_down(4)

    module, curve = AtOnce(), plateau(warmup=0)
    trainer(callbacks=[curve]).fit(module, loader())
    check(module, 0.05 * np.array([1.0, 0.75, 0.5, 0.25]))


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 10])  # the cooldown begins after 4 steps and ends with 10
def test_a_cooldown_resumed_before_in_and_after_it_ends_as_the_whole_run(stop):
    def tricks():
        curve = plateau()
        return [curve, CoolsDown(curve, 4, steps=6)]

    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=tricks()).fit(whole, ReplayLoader())
    assert len(whole.values) == 10
    if stop < 10:
        fit_interrupted(parted, ReplayLoader(), stop, tricks(), epoch_end=stop == 8)
    else:
        fit_interrupted(parted, ReplayLoader(), 10, tricks())
    resume(parted, ReplayLoader(), tricks())
    assert parted.values == whole.values
    assert_same_weights(weights(whole), weights(parted))


def test_a_cooldown_of_several_optimizers_waits_for_those_that_step():
    module, curve = TwoOptimizers(), plateau(total_steps=30, warmup=0)

    trainer(callbacks=[curve, CoolsAfterBatch(curve, 4, 3)], max_epochs=9).fit(module, loader(48))
    np.testing.assert_allclose(module.rates[0][:9], np.array([1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]) * 0.1, atol=1e-12)
    np.testing.assert_allclose(module.rates[1], np.array([1, 1, 2 / 3, 1 / 3]) * 0.02)
    assert len(module.rates[0]) == 12


@pytest.mark.parametrize("which", [None, 0])
def test_a_cooldown_does_not_wait_for_an_optimizer_that_never_steps(which):
    module, curve = TwoOptimizers(every=100), plateau(total_steps=30, warmup=0, optimizer=which)

    trainer(callbacks=[curve, CoolsAfterBatch(curve, 2, 2)]).fit(module, loader(48))
    np.testing.assert_allclose(module.rates[0], np.array([1, 1, 1, 1, 0.5]) * 0.1)


def test_a_cooldown_of_one_optimizer_waits_for_no_other():
    module, curve = TwoOptimizers(), plateau(total_steps=30, warmup=0, optimizer=0)

    trainer(callbacks=[curve, CoolsAfterBatch(curve, 2, 2)]).fit(module, loader(48))
    np.testing.assert_allclose(module.rates[0], np.array([1, 1, 1, 1, 0.5]) * 0.1)
    assert module.rates[1] == [0.02]


def test_a_cooldown_without_a_run_or_of_no_length_is_refused():
    curve = plateau()
    with pytest.raises(MisconfigurationException, match=r"LRCurve\.cool_down is for a run that is going on"):
        curve.cool_down(5)
    trainer(callbacks=[curve], max_epochs=1).fit(Classifier(), loader())
    with pytest.raises(MisconfigurationException, match="Call it from a hook"):
        curve.cool_down(5)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="`steps` to be a whole number of 1 or more"):
            curve.cool_down(steps)


def test_a_fit_after_one_that_cooled_down_starts_anew():
    curve = plateau()
    trainer(callbacks=[curve, CoolsDown(curve, 4)]).fit(Classifier(), loader())
    module = Classifier()
    trainer(callbacks=[curve]).fit(module, loader())
    check(module, 0.05 * np.array([0.01, 0.505] + [1.0] * 10))


# ---- over time


TIMER = "lightning.pytorch.callbacks.timer"


class Timed(Classifier):
    """Ten seconds a batch."""

    def __init__(self, clock, seconds=10.0):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def training_step(self, batch, batch_idx):
        self.clock.now += self.seconds
        return super().training_step(batch, batch_idx)


TIMES = [
    {"max_time": {"seconds": 100}},
    {"max_time": "00:00:01:40", "max_epochs": -1},
    {"callbacks": [Timer(duration={"seconds": 100})], "max_epochs": 20},
]


@pytest.mark.parametrize("arguments", TIMES)
def test_over_time_the_progress_is_the_elapsed_part_of_it(monkeypatch, arguments):
    module = Timed(Clock(monkeypatch, TIMER))
    curve = LRCurve("linear", warmup=0.2, warmup_factor=0.5, over="time")
    tricks = [curve, *arguments.get("callbacks", [])]
    trainer(**({"max_epochs": None} | arguments | {"callbacks": tricks})).fit(module, loader())
    check(module, 0.05 * np.array([0.5, 0.75, *(1 - np.arange(8) / 8)]))


def test_over_time_a_slower_batch_moves_it_further_and_past_its_end_it_stays(monkeypatch):
    module = Timed(Clock(monkeypatch, TIMER), seconds=40.0)
    trainer(callbacks=[LRCurve("linear", end_factor=0.1, over="time")], max_time={"seconds": 100}, min_epochs=2).fit(
        module, loader()
    )
    check(module, 0.05 * np.array([1.0, 0.64, 0.28] + [0.1] * 5))


@pytest.mark.parametrize("seconds", [120, 240])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_over_time_a_resumed_run_leaves_the_break_out_and_follows_a_new_limit(monkeypatch, stop, seconds):
    clock = Clock(monkeypatch, TIMER)
    module = Timed(clock)
    fit_interrupted(
        module, ReplayLoader(), stop, [LRCurve("linear", over="time")], max_time={"seconds": 120}, max_epochs=9
    )
    module.values.clear()
    clock.now += 5000.0
    resume(module, ReplayLoader(), [LRCurve("linear", over="time")], max_time={"seconds": seconds}, max_epochs=9)
    check(module, [0.05 * (1 - 10 * t / seconds) for t in range(stop, seconds // 10)])


def test_over_time_a_cooldown_counts_steps(monkeypatch):
    module, curve = Timed(Clock(monkeypatch, TIMER)), LRCurve("linear", over="time")
    trainer(callbacks=[curve, CoolsDown(curve, 5)], max_time={"seconds": 100}).fit(module, loader())
    check(module, 0.05 * np.array([1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.45, 0.3, 0.15]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_over_time_all_ranks_stand_at_the_same_place():
    notes = Notes()
    two([LRCurve("linear", over="time"), notes], max_epochs=1, max_time={"seconds": 300}).fit(Regressor())
    first, second = notes.read()
    assert first["rates"] == second["rates"]
    assert [rate for (rate,) in first["rates"]] == sorted((rate for (rate,) in first["rates"]), reverse=True)
    assert len(first["rates"]) == 4


# ---- what it refuses


@pytest.mark.parametrize(
    ("module", "data", "tricks", "arguments", "told"),
    [
        (Classifier, endless, [LRCurve()], {}, r"LRCurve needs the length of the run, .* Give `total_steps=`, .*`over='time'` with `Trainer\(max_time"),
        (Classifier, endless, [LRCurve(warmup="1 epochs", total_steps=12)], {}, r"LRCurve\(warmup='1 epochs'\) needs the length of an epoch"),
        (Classifier, loader, [LRCurve(over="time")], {}, r"LRCurve\(over='time'\) needs the length of the run\. Give `Trainer\(max_time=...\)`"),
        (Classifier, loader, [LRCurve(over="time"), Timer()], {}, r"needs the length of the run\. Give `Trainer\(max_time"),
        (Classifier, loader, [LRCurve("trapezoid", warmup=8, cooldown=5)], {}, "a warm-up of 8 and a cooldown of 5 optimizer steps do not fit in a run of 12"),
        (Classifier, loader, [LRCurve(warmup="3.5 epochs")], {}, "a warm-up of 14 and a cooldown of 0 optimizer steps do not fit"),
        (Classifier, loader, [LRCurve(key="speed")], {}, "LRCurve drives `speed`, but SGD has none, only .*'weight_decay'.* Name one of these"),
        (Classifier, loader, [LRCurve(), OneCycleMomentum(0.4)], {}, "the callback OneCycleMomentum"),
        (Classifier, loader, [LRCurve(key="momentum"), OneCycleMomentum(0.4)], {}, "sets the momentum of every step, and so does the callback OneCycle"),
        (TwoOptimizers, loader, [LRCurve(total_steps=9), LRCurve(total_steps=9, optimizer=1)], {}, "the callback LRCurve"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_fit_start_by_name(module, data, tricks, arguments, told):
    module = module()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=tricks, **arguments).fit(module, data())
    assert not module.losses


def test_beside_a_one_cycle_that_leaves_momentum_alone_a_curve_may_have_it():
    module = Classifier()
    tricks = [OneCycleMomentum(0.4, cycle_momentum=False), LRCurve("linear", key="momentum")]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, [0.9 * (1 - t / 12) for t in range(12)], key="momentum")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"shape": "sine"}, "`shape` to be a function or one of cosine, linear, .*, but got 'sine'"),
        ({"shape": ["cosine"]}, "`shape` to be a function or one of"),
        ({"shape": None}, "`shape` to be a function or one of"),
        ({"shape": lambda p: -p}, "`shape` .* to give finite factors of 0 or more, but at progress 0.01: .* but got -0.01"),
        ({"shape": lambda p: float("nan")}, "at progress 0.0: .* but got nan"),
        ({"shape": lambda p: 1 / p}, "at progress 0.0: .*division by zero"),
        ({"shape": lambda p: "fast"}, "at progress 0.0: .* but got 'fast'"),
        ({"shape": lambda p: 1.0, "end_factor": 0.1}, "no `options` or `end_factor` for your own `shape`, but got {'end': 0.1}"),
        ({"shape": lambda p: 1.0, "options": {"power": 2}}, "no `options` or `end_factor`"),
        ({"shape": "trapezoid", "end_factor": 0.1}, r"options of shape 'trapezoid' to be of \[\], but got \['end'\]"),
        ({"shape": "step", "end_factor": 0.1}, r"of \['milestones', 'gamma'\], but got \['end'\]"),
        ({"options": {"power": 2.0}}, r"options of shape 'cosine' to be of \['end'\], but got \['power'\]"),
        ({"options": [("power", 2.0)]}, "`options` to be a dict"),
        ({"shape": "step", "options": {"milestones": (30, 60)}}, r"`options\['milestones'\]` to be rising fractions of the shape, each in \[0, 1\], but got \(30, 60\)"),
        ({"shape": "step", "options": {"milestones": (0.75, 0.5)}}, "to be rising fractions"),
        ({"shape": "step", "options": {"milestones": 0.5}}, "to be rising fractions"),
        ({"shape": "step", "options": {"gamma": 0.0}}, r"`options\['gamma'\]` to be a number above 0, but got 0.0"),
        ({"shape": "polynomial", "options": {"power": 0}}, r"`options\['power'\]`"),
        ({"shape": "cosine_restarts", "options": {"cycles": 0}}, r"`options\['cycles'\]` to be a whole number of 1 or more, but got 0"),
        ({"shape": "cosine_restarts", "options": {"cycles": 2.5}}, r"`options\['cycles'\]`"),
        ({"shape": "cosine_restarts", "options": {"growth": -0.5}}, r"`options\['growth'\]`"),
        ({"shape": "cosine_restarts", "options": {"cycles": 2000, "growth": 2.0}}, "to give finite factors"),
        ({"shape": "slow_start_fast_decay", "options": {"rise": 1.0}}, r"`options\['rise'\]` to be a number in \[0, 1\), but got 1.0"),
        ({"shape": "slow_start_fast_decay", "options": {"rise": -0.5}}, r"`options\['rise'\]`"),
        ({"shape": "slow_start_fast_decay", "options": {"start": -0.5}}, "but at progress 0.0: .* but got -0.5"),
        ({"shape": "exponential", "end_factor": 0.0}, "'exponential' with {'end': 0.0} to give finite factors"),
        ({"end_factor": -0.1}, "`end_factor` to be a number of 0 or more, or None, but got -0.1"),
        ({"warmup": -1}, "`warmup` to be a whole number of optimizer steps"),
        ({"warmup": "3 minutes"}, "`warmup`"),
        ({"shape": "trapezoid", "cooldown": 1.5}, "`cooldown` to be a whole number of optimizer steps, a float in"),
        ({"cooldown": 0.1}, "no `cooldown` after a `shape` that ends at 0, where it has nowhere to fall"),
        ({"shape": "trapezoid", "warmup": 0.6, "cooldown": 0.5}, r"`warmup` and `cooldown` to be at most the whole run, but got \[0.6, 0.5\]"),
        ({"shape": "trapezoid", "warmup": 0.9}, r"at most the whole run, but got \[0.9, 0.2\]"),
        ({"warmup_factor": -0.1}, "`warmup_factor` to be a number of 0 or more, but got -0.1"),
        ({"cooldown_factor": float("inf")}, "`cooldown_factor`"),
        ({"key": ""}, "`key` to be the name of a number in the parameter groups, but got ''"),
        ({"key": "params"}, "`key`"),
        ({"key": "betas"}, "`key`"),
        ({"key": 3}, "`key`"),
        ({"over": "epochs"}, "`over` to be 'steps' or 'time', but got 'epochs'"),
        ({"over": "time", "warmup": 5}, "fractions of the run with `over='time'`"),
        ({"over": "time", "cooldown": "1 epochs"}, "fractions of the run with `over='time'`"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        LRCurve(**arguments)
