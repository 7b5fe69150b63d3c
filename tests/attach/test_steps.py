"""A trick's values stand in the groups at the step, and the base values everywhere else; only real steps count."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import ADD_PARAM_GROUP, patched
from timm.optim import Lookahead
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from lightning_speedups.attach.steps import OptimizerTrick, ValueOrder, split_groups
from zoo import Wrapper, trainer

BASE = 0.5
APPROX = {"rel": 1e-9, "abs": 0.0}


def factor(step):
    return 1.0 / (step + 2)


class Times(OptimizerTrick):
    order = ValueOrder.FACTOR

    def __init__(self, factor=factor, state_key="Times"):
        super().__init__()
        self.factor, self.key = factor, state_key

    @property
    def state_key(self):
        return self.key  # Lightning wants two of a kind to differ in it

    def group_values(self, optimizer, group, step, values):
        return {"lr": values["lr"] * self.factor(step)}


class Exactly(OptimizerTrick):
    """Sets the rate and the momentum, whatever stood there."""

    order = ValueOrder.ABSOLUTE

    def group_values(self, optimizer, group, step, values):
        return {"lr": 10.0 + step + 100 * optimizer, "momentum": 0.5}


class Probe(LightningModule):
    """Each weight has the gradient 1, so that plain SGD moves it by exactly the rate of the step."""

    def __init__(self, configure=None, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), start, dtype=torch.float64))
        self.configure = configure or (lambda module: SGD(module.parameters(), lr=BASE))
        self.shown, self.stepped, self.moved = [], [], []

    def configure_optimizers(self):
        made = self.configure(self)
        optimizers = made["optimizer"] if isinstance(made, dict) else made
        for optimizer in optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]:
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_pre_hook(self._before)
                optimizer.register_step_post_hook(self._after)
        return made

    def _before(self, optimizer, *_):
        self.stepped.append(float(optimizer.param_groups[0]["lr"]))
        self._at = self.weight.detach().clone()

    def _after(self, optimizer, *_):
        self.moved.append(float((self._at - self.weight.detach())[0]))

    def rate(self, optimizer=0):
        return float(self.trainer.strategy.optimizers[optimizer].param_groups[0]["lr"])

    def training_step(self, batch, batch_idx):
        self.shown.append(self.rate())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("constant", 1.0)


def data(count=8):
    return DataLoader(range(count), batch_size=1)


def with_scheduler(make, interval="step", **options):
    def configure(module):
        optimizer = SGD(module.parameters(), lr=BASE)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(optimizer), "interval": interval, **options},
        }

    return configure


# Closed forms: what the user's scheduler alone gives at its t-th count.
SCHEDULES = {
    "StepLR": (lambda o: StepLR(o, step_size=2, gamma=0.5), lambda t: BASE * 0.5 ** (t // 2), {}),
    "LambdaLR": (lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), lambda t: BASE / (1 + t), {}),
    "CosineAnnealingLR": (
        lambda o: CosineAnnealingLR(o, T_max=9, eta_min=0.1),
        lambda t: 0.1 + (BASE - 0.1) * (1 + math.cos(math.pi * t / 9)) / 2,
        {},
    ),
    # The metric never gets better: the first look takes it as the best, each later one halves the rate.
    "ReduceLROnPlateau": (
        lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
        lambda t: BASE * 0.5 ** max(0, t - 1),
        {"monitor": "constant"},
    ),
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_value_of_each_step_is_the_schedule_times_the_factor(name, interval, accumulate):
    make, schedule, options = SCHEDULES[name]
    steps_an_epoch, epochs = 2, 3
    module = Probe(with_scheduler(make, interval, **options))
    one = trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[Times()],
        val_check_interval=1 if name == "ReduceLROnPlateau" else None,
    )
    one.fit(module, data(steps_an_epoch * accumulate), data(1))
    count = (lambda t: t) if interval == "step" else (lambda t: t // steps_an_epoch)
    expected = [schedule(count(t)) * factor(t) for t in range(steps_an_epoch * epochs)]
    assert module.stepped == pytest.approx(expected, **APPROX)
    assert module.moved == pytest.approx(expected, **APPROX)
    own = [schedule(count(t)) for t in range(steps_an_epoch * epochs)]
    assert module.shown == pytest.approx([value for value in own for _ in range(accumulate)], **APPROX)
    assert module.rate() == pytest.approx(schedule(count(steps_an_epoch * epochs)), **APPROX)


def saved_rates(folder):
    found = {}
    for path in Path(folder).glob("*.ckpt"):
        (state,) = torch.load(path, weights_only=True)["optimizer_states"]
        found[path.stem] = state["param_groups"][0]["lr"]
    return found


def test_model_checkpoint_after_each_step_keeps_the_base_value():
    keep = ModelCheckpoint("kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = Probe(with_scheduler(lambda o: StepLR(o, 2, 0.5)))
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[keep, Times()]).fit(module, data(4))
    assert saved_rates("kept") == {f"step={step}": pytest.approx(BASE * 0.5 ** (step // 2)) for step in (1, 2, 3, 4)}


SAVING_HOOKS = [
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_end",
    "on_train_epoch_end", "on_train_end",
]  # fmt: skip


class Saves(Callback):
    def __init__(self, hook):
        self.count = 0
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        self.count += 1
        trainer.save_checkpoint(f"saved/{self.count}.ckpt")


class SavesInTrainingStep(Probe):
    def training_step(self, batch, batch_idx):
        self.trainer.save_checkpoint(f"saved/{self.trainer.global_step}.ckpt")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", [*SAVING_HOOKS, "training_step"])
def test_a_checkpoint_from_any_hook_has_the_base_value_and_the_step_its_own(hook, first):
    module = (SavesInTrainingStep if hook == "training_step" else Probe)()
    saves = [] if hook == "training_step" else [Saves(hook)]
    one = trainer(max_epochs=2, callbacks=[*saves, Times()] if first else [Times(), *saves])
    one.fit(module, data(2), data(1))
    rates = saved_rates("saved")
    assert rates
    assert set(rates.values()) == {BASE}
    expected = [BASE * factor(t) for t in range(4)]
    assert module.stepped == pytest.approx(expected, **APPROX)
    assert module.moved == pytest.approx(expected, **APPROX)


class Overflows(Probe):
    """The gradient is infinite on chosen batches."""

    def __init__(self, bad, configure=None):
        super().__init__(configure)
        self.weight = nn.Parameter(torch.zeros(2))
        self.bad, self.batches = set(bad), 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        self.shown.append(self.rate())
        return self.weight.sum() * (float("inf") if self.batches - 1 in self.bad else 1.0)


def scaled():
    # A power of two, and no growth: scaling then leaves no trace in the numbers.
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    return MixedPrecision("16-mixed", "cpu", scaler)


OPTIMIZERS = {
    "SGD": lambda m: SGD(m.parameters(), lr=BASE),
    "fused SGD": lambda m: SGD(m.parameters(), lr=BASE, fused=True),
    "fused Adam": lambda m: Adam(m.parameters(), lr=BASE, fused=True),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_is_none(optimizer):
    trick, module = Times(), Overflows({0, 2, 3}, OPTIMIZERS[optimizer])
    one = trainer(max_epochs=1, plugins=[scaled()], callbacks=[trick])
    one.fit(module, data(6))
    assert trick.steps_done == [3]
    done = [0, 0, 1, 1, 1, 2] if "fused" in optimizer else [0, 1, 2]  # fused ones are called to skip themselves
    assert module.stepped == pytest.approx([BASE * factor(t) for t in done])
    assert one.global_step == 6  # Lightning counts them
    if "Adam" not in optimizer:
        assert -module.weight[0].item() == pytest.approx(sum(BASE * factor(t) for t in range(3)))


def test_skipped_steps_under_accumulation_are_none():
    trick, module = Times(), Overflows({1})
    trainer(max_epochs=1, accumulate_grad_batches=2, plugins=[scaled()], callbacks=[trick]).fit(module, data(6))
    assert trick.steps_done == [2]
    assert -module.weight[0].item() == pytest.approx(sum(BASE * factor(t) for t in range(2)))


class TwoOptimizers(Probe):
    """One optimizer steps on every batch, the other on every third; a scheduler goes on with every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.rates, self.beside = ([], []), []

    def configure_optimizers(self):
        first, second = SGD([self.weight], lr=BASE), SGD([self.other], lr=2 * BASE)
        first.register_step_pre_hook(lambda o, *_: self.rates[0].append(o.param_groups[0]["lr"]))
        first.register_step_pre_hook(lambda *_: self.beside.append(second.param_groups[0]["lr"]))
        second.register_step_pre_hook(lambda o, *_: self.rates[1].append(o.param_groups[0]["lr"]))
        return [first, second], [StepLR(first, 2, 0.5), StepLR(second, 1, 0.5)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        one, two = self.lr_schedulers()
        self.manual_backward(self.weight.sum() + self.other.sum())
        first.step()
        first.zero_grad()
        one.step()
        if batch_idx % 3 == 2:
            second.step()
            second.zero_grad()
        two.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
def test_manual_optimization_counts_each_optimizer_and_compounds_nothing():
    trick, module = Times(), TwoOptimizers()
    one = trainer(max_epochs=1, callbacks=[trick])
    one.fit(module, data(7))
    assert trick.steps_done == [7, 2]
    assert module.rates[0] == pytest.approx([BASE * 0.5 ** (t // 2) * factor(t) for t in range(7)], **APPROX)
    # The second one's scheduler had moved on 2 and 5 times when its steps came.
    assert module.rates[1] == pytest.approx([2 * BASE * 0.5**2 * factor(0), 2 * BASE * 0.5**5 * factor(1)], **APPROX)
    # While the one steps, the other has its base value.
    assert module.beside == pytest.approx([2 * BASE * 0.5**t for t in range(7)], **APPROX)
    assert module.rate(0) == pytest.approx(BASE * 0.5**3)
    assert module.rate(1) == pytest.approx(2 * BASE * 0.5**7)


class StepsTheBareOptimizer(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        first, _ = self.optimizers(use_pl_optimizer=False)
        one, _ = self.lr_schedulers()
        self.manual_backward(self.weight.sum())
        before = self.weight.detach().clone()
        first.step()
        self.moved.append(float((before - self.weight.detach())[0]))
        first.zero_grad()
        one.step()


def test_manual_optimization_with_the_bare_torch_optimizer_gets_the_values_too():
    trick, module = Times(), StepsTheBareOptimizer()
    trainer(max_epochs=1, callbacks=[trick]).fit(module, data(5))
    assert trick.steps_done == [5, 0]
    assert module.moved == pytest.approx([BASE * 0.5 ** (t // 2) * factor(t) for t in range(5)], **APPROX)
    assert module.rate() == BASE * 0.5**2


def test_a_rate_given_as_a_tensor_stays_a_tensor():
    rate = torch.tensor(0.25, dtype=torch.float64)
    module = Probe(lambda m: Adam(m.parameters(), lr=rate, foreach=False, capturable=False))
    one = trainer(max_epochs=1, callbacks=[Times()])
    one.fit(module, data(4))
    expected = [0.25 * factor(t) for t in range(4)]
    assert module.stepped == pytest.approx(expected, **APPROX)
    assert module.shown == [0.25] * 4
    assert module.moved == pytest.approx(expected, rel=1e-6)  # Adam with a constant gradient moves by its rate
    assert one.strategy.optimizers[0].param_groups[0]["lr"] is rate
    assert float(rate) == 0.25


def test_a_float32_tensor_rate_comes_back_exactly_after_many_steps():
    rate = torch.tensor(0.1)
    module = Probe(lambda m: Adam(m.parameters(), lr=rate, foreach=False))
    trainer(max_epochs=1, callbacks=[Times(lambda step: 1 / 3)]).fit(module, data(20))
    assert torch.equal(rate, torch.tensor(0.1))


class WritesRate(Probe):
    """Sets the rate itself, in one of its hooks, on the third batch."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def write(self, where):
        if where == self.where and self.trainer.fit_loop.epoch_loop.batch_idx == 2:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 7.0

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.write_at_start = True
        self.write("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.write("training_step")
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.write("on_before_optimizer_step")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.write("on_train_batch_end")


@pytest.mark.parametrize(
    "where", ["on_train_batch_start", "training_step", "on_before_optimizer_step", "on_train_batch_end"]
)
def test_someone_elses_rate_stays(where):
    module = WritesRate(where)
    trainer(max_epochs=1, callbacks=[Times()]).fit(module, data(6))
    assert module.stepped[:2] == pytest.approx([BASE * factor(t) for t in range(2)], **APPROX)
    assert module.moved[2] == pytest.approx((BASE if where == "on_train_batch_end" else 7.0) * factor(2), **APPROX)
    assert module.stepped[3:] == pytest.approx([7.0 * factor(t) for t in range(3, 6)], **APPROX)
    assert module.rate() == 7.0


class WritesAtEpochStart(Probe):
    """A schedule of the user's own, in the hook that comes after the callbacks'."""

    def on_train_epoch_start(self):
        self.trainer.optimizers[0].param_groups[0]["lr"] = 10.0**-self.current_epoch


class Memory(Logger):
    """Remembers what was logged."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    name = version = "memory"

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_rate_written_at_the_epochs_start_is_the_base_of_its_first_batch_already():
    logger, module = Memory(), WritesAtEpochStart()
    one = trainer(
        max_epochs=2, accumulate_grad_batches=2, logger=logger, log_every_n_steps=1,
        callbacks=[Times(), LearningRateMonitor("step")],
    )  # fmt: skip
    one.fit(module, data(4))
    expected = [1.0 * factor(0), 1.0 * factor(1), 0.1 * factor(2), 0.1 * factor(3)]
    assert module.stepped == pytest.approx(expected, **APPROX)
    assert module.shown == pytest.approx([1.0] * 4 + [0.1] * 4, **APPROX)
    logged = [metrics["lr-SGD"] for _, metrics in logger.metrics if "lr-SGD" in metrics]
    assert logged == pytest.approx([value for value in expected for _ in range(2)], **APPROX)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("interval", ["step", "epoch", None])
def test_the_rate_monitor_logs_the_true_value_wherever_it_is_listed(interval, position):
    logger, monitor, trick = Memory(), LearningRateMonitor(interval), Times()
    module = Probe(with_scheduler(lambda o: StepLR(o, 1, 0.5), "epoch" if interval != "step" else "step"))
    one = trainer(
        max_epochs=3, logger=logger, log_every_n_steps=1,
        callbacks=[monitor, trick] if position == "before" else [trick, monitor],
    )  # fmt: skip
    one.fit(module, data(2))
    logged = [metrics["lr-SGD"] for _, metrics in logger.metrics if "lr-SGD" in metrics]
    every = [BASE * 0.5 ** (t if interval == "step" else t // 2) * factor(t) for t in range(6)]
    assert logged == pytest.approx(every if interval == "step" else every[::2], **APPROX)
    assert module.stepped == pytest.approx(every, **APPROX)


@pytest.mark.parametrize("absolute_first", [True, False])
def test_absolute_values_come_before_factors_however_they_are_listed(absolute_first):
    tricks = [Exactly(), Times()] if absolute_first else [Times(), Exactly()]
    module = Probe(lambda m: SGD(m.parameters(), lr=BASE, momentum=0.9))
    one = trainer(max_epochs=1, callbacks=tricks)
    one.fit(module, data(3))
    assert module.stepped == pytest.approx([(10 + t) * factor(t) for t in range(3)], **APPROX)
    # Momentum .5 on a constant gradient.
    assert module.moved == pytest.approx([rate * (2 - 0.5**t) for t, rate in enumerate(module.stepped)], **APPROX)
    group = one.strategy.optimizers[0].param_groups[0]
    assert (group["lr"], group["momentum"]) == (BASE, 0.9)


def test_two_factors_multiply():
    module = Probe()
    trainer(max_epochs=1, callbacks=[Times(), Times(lambda step: 3.0, "other")]).fit(module, data(3))
    assert module.stepped == pytest.approx([3 * BASE * factor(t) for t in range(3)], **APPROX)


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches -= 1
        if not self.batches:
            trainer.save_checkpoint("mid.ckpt")
            raise Stop


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_after", [2, 4, 6, 8])
def test_a_run_resumed_in_mid_epoch_goes_on_at_the_same_step(stop_after, accumulate):
    def run(callbacks, **options):
        module = Probe(with_scheduler(lambda o: StepLR(o, 3, 0.5)))
        one = trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=callbacks)
        try:
            one.fit(module, data(6), weights_only=True if options else None, **options)
        except Stop:
            assert patched(one) == set()
        return module

    whole = run([Times()])
    run([Times(), StopAfter(stop_after)])
    rest = run([Times()], ckpt_path="mid.ckpt")
    assert len(rest.stepped) == (12 - stop_after) // accumulate
    assert rest.stepped == whole.stepped[stop_after // accumulate :]
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")
def test_skipped_steps_stay_uncounted_over_a_resume():
    trick = Times()
    first = trainer(max_epochs=1, plugins=[scaled()], callbacks=[trick])
    first.fit(Overflows({1, 2}), data(5))
    first.save_checkpoint("last.ckpt")
    saved = torch.load("last.ckpt", weights_only=True)
    assert saved["callbacks"][trick.state_key] == {"steps_done": [3]}
    again, module = Times(), Overflows(set())
    trainer(max_epochs=2, plugins=[scaled()], callbacks=[again]).fit(module, data(5), ckpt_path="last.ckpt")
    assert module.stepped == pytest.approx([BASE * factor(t) for t in range(3, 8)])
    assert again.steps_done == [8]


def test_a_checkpoint_made_without_the_trick_counts_as_lightning_did():
    first = trainer(max_epochs=1)
    first.fit(Probe(), data(3))
    first.save_checkpoint("plain.ckpt")
    trick, module = Times(), Probe()
    trainer(max_epochs=2, callbacks=[trick]).fit(module, data(3), ckpt_path="plain.ckpt")
    assert module.stepped == pytest.approx([BASE * factor(t) for t in range(3, 6)], **APPROX)
    assert trick.steps_done == [6]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_checkpoint_made_with_the_trick_loads_without_it_at_the_base_value():
    first = trainer(max_epochs=1, callbacks=[Times()])
    first.fit(Probe(), data(3))
    first.save_checkpoint("with.ckpt")
    module = Probe()
    trainer(max_epochs=2).fit(module, data(3), ckpt_path="with.ckpt")
    assert module.stepped == [BASE] * 3


def test_a_second_fit_starts_anew_with_a_new_trainer():
    trick = Times()
    for _ in range(2):
        module, one = Probe(), trainer(max_epochs=1, callbacks=[trick])
        one.fit(module, data(3))
        assert module.stepped == pytest.approx([BASE * factor(t) for t in range(3)], **APPROX)
        assert trick.steps_done == [3]
        assert patched(one) == set()


def test_a_fit_after_a_resumed_one_starts_anew():
    trick = Times()
    first = trainer(max_epochs=1, callbacks=[trick])
    first.fit(Probe(), data(3))
    first.save_checkpoint("last.ckpt")
    trainer(max_epochs=2, callbacks=[trick]).fit(Probe(), data(3), ckpt_path="last.ckpt")
    assert trick.steps_done == [6]
    module = Probe()
    trainer(max_epochs=1, callbacks=[trick]).fit(module, data(3))
    assert module.stepped == pytest.approx([BASE * factor(t) for t in range(3)], **APPROX)


def test_a_second_fit_with_the_same_trainer_goes_on():
    trick, module = Times(), Probe()
    one = trainer(max_epochs=1, callbacks=[trick])
    one.fit(module, data(3))
    one.fit_loop.max_epochs = 2
    one.fit(module, data(3))
    assert module.stepped == pytest.approx([BASE * factor(t) for t in range(6)], **APPROX)
    assert patched(one) == set()


class SkipsTheRest(Probe):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


def test_an_epoch_cut_short_hides_the_factor_from_epoch_schedulers():
    module = SkipsTheRest(with_scheduler(lambda o: StepLR(o, 1, 0.5), "epoch"))
    one = trainer(max_epochs=3, callbacks=[Times()])
    one.fit(module, data(5))
    # Lightning steps the epoch's schedulers only at its end; wherever it does, they see their own values.
    scheduler = one.lr_scheduler_configs[0].scheduler
    assert module.rate() == pytest.approx(BASE * 0.5**scheduler.last_epoch, **APPROX)
    assert len(module.stepped) == 6
    ratios = [rate / factor(t) / BASE for t, rate in enumerate(module.stepped)]
    assert all(math.log2(ratio) == pytest.approx(round(math.log2(ratio)), abs=1e-9) for ratio in ratios)


class ReadsInValidation(Probe):
    def __init__(self):
        super().__init__()
        self.validated = []

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.rate())


def test_validation_sees_the_base_value():
    module = ReadsInValidation()
    trainer(max_epochs=1, val_check_interval=1, callbacks=[Times()]).fit(module, data(3), data(1))
    assert module.validated == [BASE] * 3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says so once in a process
def test_a_training_step_that_returns_nothing_leaves_the_base_value():
    class Nothing(Probe):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Nothing()
    trainer(max_epochs=1, callbacks=[Times()]).fit(module, data(4))
    assert module.rate() == BASE


class WarmsUpItself(Probe):
    """The recipe of Lightning's documentation: the user's own optimizer_step writes the rate."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = BASE * (self.trainer.global_step + 1)


def test_a_users_own_optimizer_step_writes_the_base_value():
    module = WarmsUpItself()
    trainer(max_epochs=1, callbacks=[Times()]).fit(module, data(4))
    assert module.stepped == pytest.approx([BASE * max(t, 1) * factor(t) for t in range(4)], **APPROX)


class Interrupt(Callback):
    def __init__(self, hook):
        setattr(self, hook, self.interrupt)

    def interrupt(self, *args, **kwargs):
        raise Stop


PATCH_HOOKS = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
               "on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
               "on_train_epoch_end", "on_train_end"]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", PATCH_HOOKS)
def test_an_exception_leaves_no_patch_no_hook_and_the_base_value(hook, first):
    trick, module = Times(), Probe()
    stop = Interrupt(hook)
    one = trainer(max_epochs=1, callbacks=[stop, trick] if first else [trick, stop])
    optimizers = []
    module.configure = lambda m: optimizers.append(SGD(m.parameters(), lr=BASE)) or optimizers[-1]
    with pytest.raises(Stop):
        one.fit(module, data(2), data(1))
    assert patched(one) == set()
    for optimizer in optimizers:
        assert optimizer.param_groups[0]["lr"] == BASE
        assert len(optimizer._optimizer_step_post_hooks) == 1  # the probe's own
    again = Probe()
    trainer(max_epochs=1, callbacks=[trick]).fit(again, data(2))
    assert again.stepped == pytest.approx([BASE * factor(t) for t in range(2)], **APPROX)


def test_undoing_without_a_fit_and_twice_is_harmless():
    trick, one, module = Times(), trainer(max_epochs=1), Probe()
    trick.undo(one, module)
    one.fit(module, data(1))
    trick.undo(one, module)
    trick.undo(one, module)
    assert patched(one) == set()


def test_one_of_two_tricks_that_leaves_early_leaves_the_other_at_work():
    class Leaves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                leaving.undo(trainer, pl_module)

    leaving, staying, module = Times(lambda step: 100.0, "leaving"), Times(), Probe()
    one = trainer(max_epochs=1, callbacks=[leaving, staying, Leaves()])
    one.fit(module, data(4))
    assert module.stepped == pytest.approx([BASE * factor(t) * (100 if t < 2 else 1) for t in range(4)], **APPROX)
    assert patched(one) == set()


IN_THE_CLOSURE = ["training_step", "backward", "on_before_zero_grad", "on_before_optimizer_step", "clipping"]


class DecaysItself(Probe):
    """A decay written by hand, in place, in one of the module's hooks."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def decay(self, where):
        if where == self.where:
            group = self.trainer.optimizers[0].param_groups[0]
            group["lr"] = group["lr"] * 0.5

    def on_train_epoch_start(self):
        self.decay("on_train_epoch_start")

    def on_train_batch_start(self, batch, batch_idx):
        self.decay("on_train_batch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.decay("on_train_batch_end")

    def on_train_epoch_end(self):
        self.decay("on_train_epoch_end")

    def training_step(self, batch, batch_idx):
        self.decay("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer):
        self.decay("on_before_zero_grad")

    def backward(self, loss):
        super().backward(loss)
        self.decay("backward")

    def on_before_optimizer_step(self, optimizer):
        self.decay("on_before_optimizer_step")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.decay("clipping")


@pytest.mark.parametrize("make", ["floats", "one tensor for all groups", "a scaler"])
@pytest.mark.parametrize(
    ("where", "halvings"),
    [
        ("on_train_epoch_start", lambda t: t // 3 + 1),
        ("on_train_batch_start", lambda t: t + 1),
        ("on_train_batch_end", lambda t: t),
        ("on_train_epoch_end", lambda t: t // 3),
        *((hook, lambda t: t + 1) for hook in IN_THE_CLOSURE),
    ],
)
def test_a_decay_written_by_hand_does_not_compound(where, halvings, make):
    module, rate = DecaysItself(where), BASE if make == "floats" else torch.tensor(BASE, dtype=torch.float64)
    if make == "a scaler":
        module.weight, rate = nn.Parameter(torch.zeros(2)), BASE
    module.configure = lambda m: SGD([{"params": [m.weight]}, {"params": [m.second]}], lr=rate)
    module.second = nn.Parameter(torch.zeros(1))  # in a group that shares the rate, and is at rest
    one = trainer(max_epochs=2, callbacks=[Times()], plugins=[scaled()] if make == "a scaler" else [])
    one.fit(module, data(3))
    rates = [BASE * 0.5 ** halvings(t) * factor(t) for t in range(6)]
    assert module.moved == pytest.approx(rates, rel=1e-4 if make == "a scaler" else 1e-9)  # in float32 there
    assert math.log2(BASE / module.rate()) == pytest.approx(halvings(6 if where.endswith("_end") else 5), abs=1e-9)


class ReadsRates(Callback):
    """A callback of someone else's that builds on the rates, as Lightning's own finetuning does at an epoch's start."""

    def __init__(self):
        self.read = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.read.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.read.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_build_on_the_rate_see_the_base_value(first):
    reads = ReadsRates()
    one = trainer(max_epochs=2, callbacks=[reads, Times()] if first else [Times(), reads])
    one.fit(Probe(), data(2))
    assert reads.read == [BASE] * 6


@pytest.mark.filterwarnings("ignore:SWA is currently only supported")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_anneals_from_the_base_value(first):
    def averaging():
        return StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=2, annealing_strategy="linear")

    tricks = [averaging(), Times()] if first else [Times(), averaging()]
    module, plain = Probe(), Probe()
    trainer(max_epochs=4, callbacks=tricks).fit(module, data(1))
    trainer(max_epochs=4, callbacks=[averaging()]).fit(plain, data(1))
    assert plain.stepped[-1] != BASE
    assert module.stepped == pytest.approx([rate * factor(t) for t, rate in enumerate(plain.stepped)], **APPROX)


@pytest.mark.parametrize("first", [True, False])
def test_the_rate_finder_runs_without_the_factor_and_the_fit_starts_from_its_finding(first):
    finder = LearningRateFinder(min_lr=1e-3, max_lr=0.1, num_training_steps=20, early_stop_threshold=None)
    trick = Times()
    module = FindsRate()
    trainer(max_epochs=1, callbacks=[finder, trick] if first else [trick, finder]).fit(module, data(24))
    found = module.lr_found()
    trial = module.stepped[:20]
    assert trial == pytest.approx(sorted(trial))
    assert trial[-1] == pytest.approx(0.1, rel=0.5)
    assert module.stepped[20:] == pytest.approx([found * factor(t) for t in range(24)], **APPROX)
    assert trick.steps_done == [24]


class FindsRate(Probe):
    def __init__(self):
        super().__init__(lambda module: SGD(module.parameters(), lr=module.learning_rate))
        self.learning_rate = BASE

    def lr_found(self):
        assert self.learning_rate != BASE
        return self.learning_rate


@pytest.mark.filterwarnings("ignore:`.fit\\(ckpt_path=None\\)` was called without a model")
@pytest.mark.filterwarnings("ignore:.fit\\(ckpt_path=.last.\\) is set, but there is no last checkpoint")
def test_a_checkpoint_made_on_an_exception_has_the_base_value_and_the_count():
    class Fails(Probe):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise Stop
            return super().training_step(batch, batch_idx)

    trick = Times()
    saver = OnExceptionCheckpoint("saved")
    with pytest.raises(Stop):
        trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saver, trick]).fit(Fails(), data(6))
    (path,) = Path("saved").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == BASE
    assert saved["callbacks"][trick.state_key] == {"steps_done": [3]}


def test_a_fit_of_no_epochs_does_nothing():
    one, module = trainer(max_epochs=0, callbacks=[Times()]), Probe()
    one.fit(module, data(1))
    assert module.stepped == []
    assert patched(one) == set()


class WithoutOptimizers(Probe):
    """Manual optimization that Lightning knows nothing of."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        self.weight.data -= 1.0


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_optimizers_trains_as_it_did():
    one, module = trainer(max_epochs=1, callbacks=[Times()]), WithoutOptimizers()
    with pytest.warns(UserWarning, match="Times saw no step of an optimizer in a whole epoch, and so stood still"):
        one.fit(module, data(3))
    assert module.weight[0].item() == -3.0
    assert patched(one) == set()


def test_an_optimizer_that_reads_its_rate_before_the_closure_gets_the_steps_own():
    module = Probe(lambda m: LBFGS(m.parameters(), lr=BASE, max_iter=1))
    trainer(max_epochs=1, callbacks=[Times()]).fit(module, data(3))
    # Its first direction is the gradient by min(1, 1 / |gradient|) = 1/2; then the curvature is 0, and it goes on.
    assert module.moved[0] == pytest.approx(BASE * factor(0) / 2)


def test_an_optimizer_that_evaluates_several_times_a_step_counts_one():
    trick = Times()
    module = Probe(lambda m: LBFGS(m.parameters(), lr=BASE, max_iter=2, line_search_fn=None))
    trainer(max_epochs=1, callbacks=[trick]).fit(module, data(3))
    assert trick.steps_done == [3]
    assert module.stepped == pytest.approx([BASE * factor(t) for t in range(3)], **APPROX)


def test_validating_testing_and_predicting_patch_nothing():
    class Looks(Callback):
        def on_validation_start(self, trainer, pl_module):
            assert patched(trainer) == set()

    one = trainer(callbacks=[Times(), Looks()])
    one.validate(Probe(), data(1), verbose=False)
    assert patched(one) == set()


# ---- groups of their own


class Splits(Times):
    """Half the rate for everything in `second`."""

    def settle_groups(self, pl_module):
        own = {id(p) for p in pl_module.second.parameters()}
        return lambda parameter: "second" if id(parameter) in own else None

    def group_values(self, optimizer, group, step, values):
        return {}


class TwoLayers(LightningModule):
    def __init__(self, configure):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.configure = configure

    def training_step(self, batch, batch_idx):
        return self.second(self.first(torch.ones(1, 2))).sum()

    def configure_optimizers(self):
        return self.configure(self)

    def names(self, group):
        names = {id(p): name for name, p in self.named_parameters()}
        return [names[id(p)] for p in group["params"]]


FIRST, SECOND = ["first.weight", "first.bias"], ["second.weight", "second.bias"]

GROUPS = {
    "parameters()": (lambda m: SGD(m.parameters(), lr=0.1), [(FIRST, 0.1), (SECOND, 0.1)]),
    "a generator": (lambda m: SGD((p for p in m.parameters()), lr=0.1), [(FIRST, 0.1), (SECOND, 0.1)]),
    "named_parameters()": (lambda m: SGD(m.named_parameters(), lr=0.1), [(FIRST, 0.1), (SECOND, 0.1)]),
    "one of each in a group": (
        lambda m: Adam(
            [
                {"params": [m.first.weight, m.second.weight], "weight_decay": 0.5},
                {"params": [m.second.bias, m.first.bias], "lr": 0.7},
            ],
            lr=0.1,
        ),
        # The given groups keep their places, as schedulers with one value a group want them; the new ones come last.
        [(["first.weight"], 0.1), (["first.bias"], 0.7), (["second.weight"], 0.1), (["second.bias"], 0.7)],
    ),
    "already apart": (
        lambda m: SGD([{"params": m.second.parameters(), "lr": 0.3}, {"params": m.first.parameters()}], lr=0.1),
        [(SECOND, 0.3), (FIRST, 0.1)],
    ),
    "a bare parameter": (
        lambda m: SGD([{"params": m.second.bias}, {"params": m.first.parameters(), "lr": 0.2}], lr=0.1),
        [(["second.bias"], 0.1), (FIRST, 0.2)],
    ),
}


@pytest.mark.parametrize("way", GROUPS)
def test_groups_are_split_however_the_optimizer_gets_them(way):
    configure, expected = GROUPS[way]
    module = TwoLayers(configure)
    one = trainer(max_epochs=1, callbacks=[Splits()])
    one.fit(module, data(1))
    (optimizer,) = one.strategy.optimizers
    assert [(module.names(group), group["lr"]) for group in optimizer.param_groups] == expected
    if way == "one of each in a group":
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0, 0.5, 0]
    if way == "named_parameters()":
        assert [group["param_names"] for group in optimizer.param_groups] == [FIRST, SECOND]
    assert Optimizer.add_param_group is ADD_PARAM_GROUP


@pytest.mark.parametrize("kind", ["LambdaLR", "StepLR"])
def test_a_scheduler_from_configure_optimizers_sees_the_split_groups(kind):
    def configure(module):
        optimizer = SGD(module.parameters(), lr=0.1)
        made = LambdaLR(optimizer, lambda t: 0.5**t) if kind == "LambdaLR" else StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": made, "interval": "step"}]

    one = trainer(max_epochs=1, callbacks=[Splits()])
    one.fit(TwoLayers(configure), data(3))
    scheduler = one.lr_scheduler_configs[0].scheduler
    assert scheduler.base_lrs == [0.1, 0.1]
    assert [group["lr"] for group in one.strategy.optimizers[0].param_groups] == pytest.approx([0.1 * 0.5**3] * 2)


def test_two_tricks_split_into_all_combinations():
    class SplitsBiases(Splits):
        def settle_groups(self, pl_module):
            return lambda parameter: "biases" if parameter.ndim == 1 else None

    module = TwoLayers(lambda m: SGD(m.parameters(), lr=0.1))
    one = trainer(max_epochs=1, callbacks=[Splits(), SplitsBiases(state_key="other")])
    one.fit(module, data(1))
    groups = [module.names(group) for group in one.strategy.optimizers[0].param_groups]
    assert sorted(groups) == [["first.bias"], ["first.weight"], ["second.bias"], ["second.weight"]]


def test_an_optimizer_built_after_the_fit_is_not_split():
    module = TwoLayers(lambda m: SGD(m.parameters(), lr=0.1))
    trainer(max_epochs=1, callbacks=[Splits()]).fit(module, data(1))
    assert len(SGD(module.parameters(), lr=0.1).param_groups) == 1


def test_an_exception_in_configure_optimizers_leaves_optimizers_as_they_were():
    def fails(module):
        raise Stop

    one = trainer(max_epochs=1, callbacks=[Splits()])
    with pytest.raises(Stop):
        one.fit(TwoLayers(fails), data(1))
    assert Optimizer.add_param_group is ADD_PARAM_GROUP
    assert patched(one) == set()


def test_split_groups_names_stay_fit_for_the_rate_monitor():
    logger = Memory()
    module = TwoLayers(lambda m: SGD([{"params": list(m.parameters()), "name": "all"}], lr=0.1))
    one = trainer(max_epochs=1, logger=logger, log_every_n_steps=1, callbacks=[Splits(), LearningRateMonitor("step")])
    one.fit(module, data(1))
    logged = [metrics for _, metrics in logger.metrics if any(key.startswith("lr-") for key in metrics)]
    assert logged
    assert len([key for key in logged[0] if key.startswith("lr-")]) == 2


def test_split_groups_keep_torchs_own_checks():
    module = TwoLayers(None)
    with split_groups(lambda p: "vectors" if p.ndim == 1 else None):
        with pytest.raises(TypeError, match="ordered"):
            SGD([{"params": set(module.parameters())}], lr=0.1)
        with pytest.raises(ValueError, match="appear in more than one"):
            SGD([{"params": list(module.parameters())}, {"params": [module.first.bias]}], lr=0.1)
        with pytest.raises(TypeError, match="can only optimize Tensors"):
            SGD([{"params": [1.0]}], lr=0.1)
    assert Optimizer.add_param_group is ADD_PARAM_GROUP


# ---- steps that torch's hooks do not see, and optimizers that change places


class SharpnessAware(Wrapper):
    """Evaluates twice and steps its base once, from the gradient of the second place."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p in parameters:
                p.sub_(p.grad, alpha=0.05)
        self.base.step()
        return loss


class Moves(Callback):
    """How far the probe's weight moves from one batch to the next."""

    def on_train_start(self, trainer, pl_module):
        self.at, self.moves = pl_module.weight[0].item(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.moves.append(self.at - pl_module.weight[0].item())
        self.at = pl_module.weight[0].item()


def unhooked(wrap):
    """Configure a wrapped SGD on whose steps nobody hangs."""
    return lambda module: {"optimizer": wrap(SGD(module.parameters(), lr=BASE))}


class Quiet(Probe):
    def configure_optimizers(self):
        return self.configure(self)


WRAPPERS = {"a wrapper": Wrapper, "SAM": SharpnessAware, "Lookahead": lambda base: Lookahead(base, k=1000)}


@pytest.mark.parametrize(("name", "accumulate"), [("a wrapper", 1), ("a wrapper", 2), ("Lookahead", 2), ("SAM", 1)])
def test_steps_of_optimizers_without_hooks_count(name, accumulate):
    trick, moves, module = Times(), Moves(), Quiet(unhooked(WRAPPERS[name]))
    one = trainer(max_epochs=2, callbacks=[trick, moves], accumulate_grad_batches=accumulate)
    one.fit(module, data(2 * accumulate))
    assert [move for move in moves.moves if move] == pytest.approx([BASE * factor(t) for t in range(4)], **APPROX)
    assert trick.steps_done == [4]
    assert patched(one) == set()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_with_lookahead_resumes_exactly():
    def run(callbacks, **options):
        moves, module = Moves(), Quiet(unhooked(WRAPPERS["Lookahead"]))
        with contextlib.suppress(Stop):
            trainer(max_epochs=2, callbacks=[Times(), *callbacks, moves]).fit(module, data(4), **options)
        return moves.moves

    whole = run([])
    run([StopAfter(3)])
    assert run([], ckpt_path="mid.ckpt", weights_only=False) == pytest.approx(whole[3:], **APPROX)


class Swaps(Callback):
    """Puts other optimizers into the Trainer at the start of the second epoch."""

    def __init__(self, make):
        self.make = make

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.make(trainer, pl_module)


def assign(trainer, module):
    trainer.optimizers = [SGD(module.parameters(), lr=2 * BASE)]


SWAPS = {
    "assigned": assign,
    "assigned to the strategy": lambda trainer, module: setattr(
        trainer.strategy, "optimizers", [SGD(module.parameters(), lr=2 * BASE)]
    ),
    "configured again": lambda trainer, module: trainer.strategy.setup_optimizers(trainer),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("way", SWAPS)
def test_another_optimizer_goes_on_where_the_last_one_stood(way, first):
    trick, moves, swaps, module = Times(), Moves(), Swaps(SWAPS[way]), Quiet()
    one = trainer(max_epochs=2, callbacks=[swaps, trick, moves] if first else [trick, swaps, moves])
    one.fit(module, data(3))
    base = [BASE] * 3 + [BASE if way == "configured again" else 2 * BASE] * 3
    assert moves.moves == pytest.approx([rate * factor(t) for t, rate in enumerate(base)], **APPROX)
    assert trick.steps_done == [6]
    assert patched(one) == set()


def test_another_optimizer_gets_the_groups_that_a_trick_needs():
    module = TwoLayers(lambda m: SGD(m.parameters(), lr=0.1))
    swaps = Swaps(
        lambda trainer, module: setattr(
            trainer,
            "optimizers",
            [SGD([{"params": [module.second.bias, *module.first.parameters()]}, {"params": [module.second.weight]}])],
        )
    )
    one = trainer(max_epochs=2, callbacks=[Splits(), swaps])
    one.fit(module, data(1))
    names = [module.names(group) for group in one.optimizers[0].param_groups]
    assert names == [FIRST, ["second.weight"], ["second.bias"]]


def test_more_or_fewer_optimizers_in_mid_run_are_refused():
    two = Swaps(lambda t, m: setattr(t, "optimizers", [SGD([m.weight], lr=BASE), SGD([m.weight], lr=BASE)]))
    with pytest.raises(MisconfigurationException, match="Times: the Trainer's 1 optimizers became 2 in mid-run"):
        trainer(max_epochs=2, callbacks=[Times(), two]).fit(Quiet(), data(1))


class CyclesItself(Probe):
    """Writes the rate in a hook of the optimizer, where it holds that of the step."""

    def _after(self, optimizer, *_):
        optimizer.param_groups[0]["lr"] *= 0.5


def test_a_rate_written_while_the_optimizer_works_is_told():
    with pytest.warns(UserWarning, match="Times: the optimizer itself, or one of its hooks, wrote `lr`"):
        trainer(max_epochs=1, callbacks=[Times()]).fit(CyclesItself(), data(2))


class TwoGroups(Probe):
    """Two parameters in groups of their own, with one tensor as the rate of both."""

    def __init__(self, rate):
        super().__init__(lambda m: SGD([{"params": [m.weight]}, {"params": [m.other]}], lr=rate))
        self.other = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return self.weight.sum() + self.other.sum()


class ByGroup(Times):
    """Another factor for each group."""

    def group_values(self, optimizer, group, step, values):
        return {"lr": values["lr"] * self.factor(step) * (group + 1)}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # the monitor's own, of rates that are tensors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tensor_as_the_rate_of_several_groups_gives_each_its_own(dtype):
    rate, logger = torch.tensor(0.3, dtype=dtype), Memory()
    module, given = TwoGroups(rate), rate.clone()
    monitor = LearningRateMonitor("step")
    one = trainer(max_epochs=1, callbacks=[ByGroup(), monitor], logger=logger, log_every_n_steps=1)
    one.fit(module, data(5))
    close = {"rel": 1e-6 if dtype == torch.float32 else 1e-12}
    assert module.moved == pytest.approx([0.3 * factor(t) for t in range(5)], **close)
    assert -module.other.item() == pytest.approx(2 * sum(0.3 * factor(t) for t in range(5)), **close)
    for g in (0, 1):
        assert one.strategy.optimizers[0].param_groups[g]["lr"] is rate
        logged = [
            float(metrics[f"lr-SGD/pg{g + 1}"]) for _, metrics in logger.metrics if f"lr-SGD/pg{g + 1}" in metrics
        ]
        assert logged == pytest.approx([0.3 * factor(t) * (g + 1) for t in range(5)], **close)
    assert torch.equal(rate, given)


def without_rate(kind):
    def configure(module):
        optimizer = Adam(module.parameters(), lr=BASE)
        if kind == "None":
            optimizer.param_groups[0]["lr"] = None
        else:
            del optimizer.param_groups[0]["lr"]
        return optimizer

    return configure


@pytest.mark.parametrize("kind", ["None", "missing"])
def test_an_optimizer_without_a_rate_is_refused_at_the_start(kind):
    with pytest.raises(MisconfigurationException, match=r"drives `lr`.* Give the optimizer a learning rate"):
        trainer(max_epochs=1, callbacks=[Times()]).fit(Probe(without_rate(kind)), data(1))


class StepsElsewhere(TwoOptimizers):
    """Manual optimization with optimizers that have methods of their own in place of `step`."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.weight.sum())
        self.optimizers()[0].optimizer.update()


class Updates(SGD):
    def update(self):
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_without_a_step_is_told_once(epochs):
    module = StepsElsewhere()
    module.configure_optimizers = lambda: [Updates([module.weight], lr=BASE), Updates([module.other], lr=BASE)]
    with pytest.warns(UserWarning, match="Times, Times saw no step") as told:
        trainer(max_epochs=epochs, callbacks=[Times(), Times(state_key="other")]).fit(module, data(2))
    assert sum("saw no step" in str(one.message) for one in told) == 1


class StepsCompiled(TwoOptimizers):
    """Manual optimization with a compiled step, as torch's guide to schedules of compiled optimizers has it."""

    def __init__(self, rate):
        super().__init__()
        self.given = rate

    def configure_optimizers(self):
        optimizer = SGD([self.weight], lr=self.given)
        self.compiled = torch.compile(lambda: optimizer.step(), backend="eager")
        return optimizer

    def training_step(self, batch, batch_idx):
        self.weight.grad = None
        self.manual_backward(self.weight.sum())
        self.compiled()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("rate", [BASE, torch.tensor(BASE, dtype=torch.float64)])
def test_a_compiled_step_gets_each_steps_own_value(rate):
    torch.compiler.reset()
    trick, moves = Times(), Moves()
    trainer(max_epochs=1, callbacks=[trick, moves]).fit(StepsCompiled(rate), data(4))
    assert moves.moves == pytest.approx([BASE * factor(t) for t in range(4)], **APPROX)
    assert trick.steps_done == [4]
    assert float(rate) == BASE


class CallsItself(SGD):
    def step(self, closure=None, inner=False):
        if inner:
            return super().step()
        closure()
        return self.step(inner=True)


class AtRest(Times):
    """Sets nothing, as a trick whose time has not come."""

    def group_values(self, optimizer, group, step, values):
        return {}


@pytest.mark.parametrize("kind", [Times, AtRest])
def test_an_optimizer_that_calls_its_own_step_counts_one(kind):
    trick, moves = kind(), Moves()
    module = Quiet(lambda module: {"optimizer": CallsItself(module.parameters(), lr=BASE)})
    trainer(max_epochs=1, callbacks=[trick, moves]).fit(module, data(4))
    assert trick.steps_done == [4]
    assert moves.moves == pytest.approx([BASE * (factor(t) if kind is Times else 1) for t in range(4)], **APPROX)


class StepsInAClosure(TwoOptimizers):
    """Steps one optimizer in the closure of the other; an exception in it, caught, is no step."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()

        def inner():
            second.zero_grad()
            self.manual_backward(self.other.sum())
            if batch_idx == 1:
                raise ValueError
            self.inside.append((rate(first), rate(second)))

        def outer():
            first.zero_grad()
            self.manual_backward(self.weight.sum())
            with contextlib.suppress(ValueError):
                second.step(closure=inner)

        first.step(closure=outer)

    inside: list


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def test_steps_in_each_others_closures_get_their_own_values():
    module, trick, moves = StepsInAClosure(), Times(), Moves()
    module.inside = []
    trainer(max_epochs=1, callbacks=[trick, moves]).fit(module, data(3))
    base = [rate(optimizer) for optimizer in module.optimizers()]
    assert module.inside == [tuple(base)] * 2
    assert trick.steps_done == [3, 2]
    assert moves.moves == pytest.approx([base[0] * factor(t) for t in range(3)], **APPROX)
    assert -module.other[0].item() == pytest.approx(sum(base[1] * factor(t) for t in range(2)), **APPROX)
