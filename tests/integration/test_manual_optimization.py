"""Schedules in manual optimization, against loops written by hand with torch's own schedulers, stepped once a batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CyclicLR, LinearLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from two_processes import farthest, two

from lightning_speedups import CyclicMomentum, LRCurve, OneCycleMomentum, SmoothingSchedule, WarmupLRScaler
from lightning_speedups.tricks.labels.label_smoothing_loss import LabelSmoothingLoss
from zoo import (
    Memory,
    OrderOfEpoch,
    ReplayLoader,
    TwoOptimizers,
    assert_same_weights,
    endless,
    fit_interrupted,
    loader,
    resume,
    trainer,
    weights,
)

BATCHES, RATES = 6, (0.004, 0.001)


def points(count=8 * BATCHES):
    return TensorDataset(torch.randn(count, 2, generator=torch.Generator().manual_seed(2)))


class Points(ReplayLoader):
    def __init__(self):
        DataLoader.__init__(self, points(), batch_size=8, sampler=OrderOfEpoch(8 * BATCHES))
        self.position = 0


class GAN(LightningModule):
    """Lightning's usual one; each part steps in those batches, and so often in each of them, as `plan` says.

    Notes the rate and the first beta of each step, and in which batch it was.
    """

    def __init__(self, plan=lambda batch: (1, 1)):
        super().__init__()
        torch.manual_seed(4)
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
        self.plan, self.notes, self.batch = plan, ([], []), 0

    def parts(self):
        return self.generator, self.discriminator

    def configure_optimizers(self):
        made = [Adam(part.parameters(), lr, (0.9, 0.99)) for part, lr in zip(self.parts(), RATES, strict=True)]
        for optimizer, notes in zip(made, self.notes, strict=True):
            optimizer.register_step_pre_hook(lambda one, *_, notes=notes: notes.append(self.note(one)))
        return made

    def note(self, optimizer):
        (group,) = optimizer.param_groups
        return self.batch, group["lr"], group["betas"][0]

    def noise(self, x):
        return x.flip(0)

    def loss(self, of_generator, x):
        fooled = self.discriminator(self.generator(self.noise(x)))
        if of_generator:
            return F.softplus(-fooled).mean()
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(fooled).mean()

    def training_step(self, batch, batch_idx):
        self.batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        for i, times in reversed(list(enumerate(self.plan(self.batch)))):
            optimizer = self.optimizers()[i]
            for _ in range(times):
                self.toggle_optimizer(optimizer)
                self.manual_backward(self.loss(i == 0, batch[0]))
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)


def by_hand(schedules, plan, batches, epochs_of=BATCHES):
    """The same with torch's schedulers; both step once after each batch."""
    module = GAN(plan)
    optimizers = module.configure_optimizers()
    lines = [make(optimizer) for make, optimizer in zip(schedules, optimizers, strict=True)]
    sampler, at = OrderOfEpoch(8 * BATCHES), 0
    for epoch in range(math.ceil(batches / epochs_of)):
        sampler.set_epoch(epoch)
        for rows in torch.tensor(list(sampler)).split(8)[: batches - at]:
            module.batch = at
            for i, times in reversed(list(enumerate(plan(at)))):
                for _ in range(times):
                    module.zero_grad()
                    module.loss(i == 0, points().tensors[0][rows]).backward()
                    optimizers[i].step()
            at += 1
            if at < batches:
                for line in lines:
                    line.step()
    return module


PLANS = {
    "in turn": lambda batch: (1, 1),
    "five to one": lambda batch: (1, 5),
    "every second": lambda batch: (batch % 2, 1),
    "accumulated": lambda batch: (batch % 3 == 2, batch % 3 == 2),
    "first one then the other": lambda batch: (batch >= 6, batch < 9),
}
cycle = {"max_lr": 0.05, "base_momentum": 0.85, "max_momentum": 0.95}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_one_cycle_is_torchs_stepped_once_a_batch_whatever_the_batch_does(plan):
    module = GAN(plan)
    trainer(callbacks=[OneCycleMomentum(**cycle)], max_epochs=2).fit(module, Points())
    hand = by_hand([lambda optimizer: OneCycleLR(optimizer, total_steps=12, **cycle)] * 2, plan, 12)
    for notes, expected in zip(module.notes, hand.notes, strict=True):
        assert len(notes) == len(expected) > 0
        torch.testing.assert_close(torch.tensor(notes), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    for name, value in weights(hand).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-4, atol=1e-6)


def test_each_optimizer_may_have_its_own_peak_and_a_linear_curve_starts_from_its_own_rate():
    peaks = (0.05, 0.02)
    tricks = [OneCycleMomentum(peak, optimizer=i) for i, peak in enumerate(peaks)]
    made = [lambda one, peak=peak: OneCycleLR(one, peak, 12) for peak in peaks]
    decays = [lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=12)] * 2
    for callbacks, schedules in ((tricks, made), ([LRCurve("linear")], decays)):
        module = GAN()
        trainer(callbacks=callbacks, max_epochs=2).fit(module, Points())
        hand = by_hand(schedules, module.plan, 12)
        for notes, expected in zip(module.notes, hand.notes, strict=True):
            torch.testing.assert_close(torch.tensor(notes), torch.tensor(expected), rtol=1e-6, atol=1e-9)


class WithItsOwn(GAN):
    """Steps schedulers of its own by hand."""

    def configure_optimizers(self):
        made = super().configure_optimizers()
        return made, [LinearLR(optimizer, 0.5, 1.0, total_iters=12) for optimizer in made]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for scheduler in self.lr_schedulers():
            scheduler.step()


def test_its_own_schedulers_may_rest_or_be_scaled():
    module, hand = WithItsOwn(), GAN()
    trainer(callbacks=[OneCycleMomentum(**cycle, replace=True)], max_epochs=2).fit(module, Points())
    trainer(callbacks=[OneCycleMomentum(**cycle)], max_epochs=2).fit(hand, Points())
    assert module.notes == hand.notes
    module = WithItsOwn(PLANS["five to one"])
    trainer(callbacks=[WarmupLRScaler(scale=3.0, warmup_epochs=1.0)], max_epochs=2).fit(module, Points())
    for notes, lr in zip(module.notes, RATES, strict=True):
        factors = [(0.5 + 0.5 * batch / 12) * (1 + 2 * min(1.0, batch / 6)) for batch, *_ in notes]
        assert [rate / lr for _, rate, _ in notes] == pytest.approx(factors)
    with pytest.raises(MisconfigurationException, match=r"so does the scheduler LinearLR .*`replace=True`"):
        trainer(callbacks=[LRCurve()], max_epochs=2).fit(WithItsOwn(), Points())


def test_cycles_in_epochs_or_parts_of_the_run_go_by_batches_and_those_in_steps_by_steps():
    def torchs(up, **options):
        return [lambda one: CyclicLR(one, 0.01, 0.1, up, cycle_momentum=False, **options)] * 2

    for size, up in (("1 epoch", BATCHES), (0.25, 3)):
        module = GAN(PLANS["five to one"])
        trick = CyclicMomentum(0.01, 0.1, size, cycle_momentum=False)
        trainer(callbacks=[trick], max_epochs=2).fit(module, Points())
        hand = by_hand(torchs(up), module.plan, 12)
        for notes, expected in zip(module.notes, hand.notes, strict=True):
            torch.testing.assert_close(torch.tensor(notes), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    module = GAN(PLANS["five to one"])
    trainer(callbacks=[CyclicMomentum(0.01, 0.1, 30, cycle_momentum=False)], max_epochs=1).fit(module, Points())
    assert [rate for _, rate, _ in module.notes[1]] == pytest.approx([0.01 + 0.09 * t / 30 for t in range(30)])


def test_a_warm_up_in_epochs_goes_by_batches_and_one_in_steps_by_steps():
    for given, ramp in (({"warmup_epochs": 2.0}, 12), ({"warmup_steps": 10}, None)):
        module = GAN(PLANS["five to one"])
        trainer(callbacks=[WarmupLRScaler(scale=3.0, **given)], max_epochs=2).fit(module, Points())
        for notes, lr in zip(module.notes, RATES, strict=True):
            stands = [batch / ramp if ramp else min(1.0, t / 10) for t, (batch, *_) in enumerate(notes)]
            assert [rate for _, rate, _ in notes] == pytest.approx([lr * (1 + 2 * at) for at in stands])


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 9}])
@pytest.mark.parametrize("data", [Points, endless])
def test_max_steps_counts_all_optimizers_and_ends_the_curve_with_the_run(arguments, data):
    module = GAN()
    if data is not Points:
        module.loss = lambda of_generator, x: (
            module.generator(x.flatten(1)[:, :2]).sum() + sum(p.sum() for p in module.discriminator.parameters())
        )
    run = trainer(callbacks=[OneCycleMomentum(**cycle)], max_steps=20, **arguments)
    run.fit(module, data())
    assert run.global_step == 20
    hand = by_hand([lambda optimizer: OneCycleLR(optimizer, total_steps=10, **cycle)] * 2, module.plan, 10)
    for notes, expected in zip(module.notes, hand.notes, strict=True):
        torch.testing.assert_close(torch.tensor(notes), torch.tensor(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("plan", "batches"), [("five to one", 20), ("accumulated", 180), ("every second", 80)])
@pytest.mark.parametrize("max_epochs", [-1, 100])
def test_max_steps_of_an_irregular_module_ends_the_curve_with_the_run_too(plan, batches, max_epochs):
    module = GAN(PLANS[plan])
    run = trainer(callbacks=[LRCurve(lambda at: at)], max_steps=120, max_epochs=max_epochs)
    run.fit(module, Points())
    done = run.fit_loop.epoch_loop.batch_progress.total.processed
    assert done == batches
    for notes, lr in zip(module.notes, RATES, strict=True):
        for batch, rate, _ in notes:
            assert rate / lr == pytest.approx(batch / done, abs=0.07)


def test_epochs_that_come_first_end_the_curve_where_max_steps_would_let_it_go_on():
    module = GAN(PLANS["every second"])  # 18 steps; both in each batch would be 20 after 10 batches
    trainer(callbacks=[LRCurve(lambda at: at)], max_steps=20, max_epochs=2).fit(module, Points())
    for notes, lr in zip(module.notes, RATES, strict=True):
        assert [rate / lr for *_, rate, _ in notes] == pytest.approx([batch * 10 // 12 / 10 for batch, *_ in notes])


@pytest.mark.parametrize("arguments", [{"fast_dev_run": 3}, {"max_time": "00:01:00:00", "max_epochs": 1}])
def test_other_limits(arguments):
    module = GAN()
    trainer(callbacks=[OneCycleMomentum(**cycle)], **arguments).fit(module, Points())
    assert len(module.notes[0]) > 0
    if "max_time" in arguments:
        with pytest.raises(
            MisconfigurationException, match=r"OneCycleMomentum needs the length .* `max_epochs`\)\. Give"
        ):
            trainer(callbacks=[OneCycleMomentum(**cycle)], **arguments | {"max_epochs": None}).fit(GAN(), Points())


def tricks():
    return [OneCycleMomentum(**cycle), WarmupLRScaler(scale=2.0, warmup_epochs=1.5), LRCurve(key="eps")]


@pytest.mark.parametrize("plan", ["in turn", "five to one", "every second"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.6])
@pytest.mark.parametrize("arguments", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 18}])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(plan, part, arguments):
    whole, parted = GAN(PLANS[plan]), GAN(PLANS[plan])
    run = trainer(callbacks=tricks(), **arguments)
    run.fit(whole, Points())
    steps, batch = 0, 0
    while steps < part * run.global_step:  # a checkpoint is made after a whole batch
        steps, batch = steps + sum(parted.plan(batch)), batch + 1
    fit_interrupted(parted, Points(), steps, tricks(), **arguments)
    rest = GAN(PLANS[plan])
    resume(rest, Points(), tricks(), **arguments)
    for all_notes, first, then in zip(whole.notes, parted.notes, rest.notes, strict=True):
        assert first + then == all_notes
    assert_same_weights(weights(whole), weights(rest))


@pytest.mark.parametrize("how", ["stretch", "extend"])
def test_a_resumed_run_of_another_length(how):
    parted, rest = GAN(PLANS["five to one"]), GAN()
    fit_interrupted(parted, Points(), 36, [LRCurve("linear")], True, max_epochs=2)
    with pytest.warns(UserWarning, match="LRCurve: the checkpoint's run had 12 batches, this one has 18; the curve"):
        resume(rest, Points(), [LRCurve("linear", on_resume=how)], max_epochs=3)
    for notes, lr in zip(rest.notes, RATES, strict=True):
        left = [1 - t / 18 if how == "stretch" else (18 - t) / 12 * 0.5 for t in range(6, 18)]
        assert [rate / lr for _, rate, _ in notes] == pytest.approx(left)


def test_epochs_that_become_shorter_take_the_curve_to_its_end():
    class Shrinks(GAN):
        def train_dataloader(self):
            return DataLoader(points(48 if self.trainer.current_epoch == 0 else 32), 8)

    module = Shrinks(PLANS["five to one"])
    told = "LRCurve: the run was planned with 18 batches, but 6 are done before epoch 1 and some 8 are to come"
    with pytest.warns(UserWarning, match=told):
        trainer(callbacks=[LRCurve("linear")], max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    factors = [1 - t / 18 for t in range(6)] + [(1 - 6 / 18) * (1 - t / 8) for t in range(8)]
    assert [rate / RATES[0] for _, rate, _ in module.notes[0]] == pytest.approx(factors)


def test_a_monitor_sees_what_the_steps_have():
    logger, module = Memory(), GAN(PLANS["every second"])
    callbacks = [LearningRateMonitor("step"), LRCurve("cosine")]
    trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, max_epochs=2).fit(module, Points())
    assert logger["lr-Adam-1"] == [rate for _, rate, _ in module.notes[1]]


class Cools(Callback):
    def __init__(self, curve):
        self.curve = curve

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == 4:
            self.curve.cool_down(3)


@pytest.mark.parametrize("plan", ["five to one", "every second"])
def test_a_curve_can_be_cooled_down_in_so_many_batches(plan):
    module, curve = GAN(PLANS[plan]), LRCurve(lambda at: 1 - 0.5 * at)
    run = trainer(callbacks=[curve, Cools(curve)], max_epochs=2)
    run.fit(module, Points())
    assert run.fit_loop.epoch_loop.total_batch_idx == 6
    factors = [1 - 0.5 * t / 12 for t in range(4)] + [(1 - 2 / 12) * (1 - t / 3) for t in range(3)]
    for notes, lr in zip(module.notes, RATES, strict=True):
        assert [rate / lr for _, rate, _ in notes] == pytest.approx([factors[batch] for batch, *_ in notes])


def test_what_goes_by_batches_anyway_takes_max_steps_for_all_optimizers():
    seen = []

    class Smooths(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            seen.append(self.criterion.epsilon(torch.zeros(1, 4)))
            super().training_step(batch, batch_idx)

    module = Smooths(every=1)
    module.criterion = LabelSmoothingLoss(0.4)
    trainer(callbacks=[SmoothingSchedule()], max_epochs=-1, max_steps=16).fit(module, loader(48))
    assert [float(one) for one in seen] == pytest.approx([0.4 * (1 - t / 8) for t in range(8)])


class Ranked(GAN):
    def train_dataloader(self):
        return DataLoader(torch.utils.data.Subset(points(), range(self.trainer.global_rank, 48, 2)), 4)

    def on_train_end(self):
        torch.save((weights(self), self.notes), f"gan{self.trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_two_processes_stay_together():
    torch.manual_seed(1)
    options = {"find_unused_parameters": True}
    two(tricks(), options, max_epochs=2).fit(Ranked(PLANS["every second"]))
    (one, first), (other, second) = (torch.load(f"gan{rank}.pt", weights_only=True) for rank in range(2))
    assert farthest(one, other) == 0
    assert first == second
    assert [batch for batch, *_ in first[1]] == list(range(12))
