"""The module's own schedulers, found and laid to rest; what each schedule makes of it stands in test_every_schedule."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from rivals import RIVALS, ByHand, ByHandAtTheStep, Rival
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from two_processes import Regressor, two

from lightning_speedups import FreezeBackboneFinetune, LRCurve, OneCycleMomentum, SubsetTraining, WarmupLRScaler
from lightning_speedups.attach.schedulers import noting_schedulers
from lightning_speedups.attach.stations import Station
from zoo import (
    Classifier,
    Interrupted,
    Memory,
    SometimesInfinite,
    TwoOptimizers,
    assert_same_weights,
    loader,
    scaled,
    trainer,
    weights,
)

KINDS = (LRScheduler, CyclicLR, OneCycleLR, ReduceLROnPlateau)


def rates(module):
    return [[group["lr"] for group in step] for step in module.values]


def fitted(module, *tricks, **arguments):
    torch.manual_seed(0)
    module.load_state_dict(Classifier().state_dict())
    run = trainer(callbacks=list(tricks), **arguments)
    run.fit(module, loader())
    return run


def held(module):
    """What a module's schedulers hold, and how often Lightning steps them."""
    configs = module.trainer.lr_scheduler_configs
    return [(dict(vars(config.scheduler)), config.interval, config.frequency) for config in configs]


# ---- what is noted


def test_what_stood_in_the_groups_before_the_first_scheduler_is_noted_for_each_optimizer():
    before = {kind: kind.__init__ for kind in KINDS}
    with noting_schedulers() as (made, values):
        one = SGD([torch.zeros(1)], lr=torch.tensor(0.1), momentum=0.3)
        one.param_groups[0]["lr"].fill_(0.2)
        cycle = OneCycleLR(one, 0.7, total_steps=9)
        decay = ExponentialLR(one, 0.5)
        other = torch.optim.Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(2)], "lr": 3.0}], lr=4.0)
        plateau = ReduceLROnPlateau(optimizer=other)
        with pytest.raises(TypeError, match="not an Optimizer"):
            StepLR(None, 1)
    assert values[one] == [{"lr": torch.tensor(0.2), "momentum": 0.3}]
    assert values[other] == [{"lr": 4.0, "betas": (0.9, 0.999)}, {"lr": 3.0, "betas": (0.9, 0.999)}]
    assert list(dict.fromkeys(made))[:3] == [cycle, decay, plateau]
    assert {kind: kind.__init__ for kind in KINDS} == before


def test_what_is_noted_ends_with_an_exception():
    before = {kind: kind.__init__ for kind in KINDS}
    with pytest.raises(Interrupted), noting_schedulers():
        raise Interrupted
    assert {kind: kind.__init__ for kind in KINDS} == before


# ---- everything is put back


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rival", RIVALS)
def test_schedulers_wake_after_the_fit_as_they_were_made(rival, fails):
    module, trick = Rival(rival), LRCurve("linear", replace=True)
    made = []
    module.on_fit_start = lambda: made.extend(held(module))
    module.on_train_batch_end = lambda outputs, batch, index: fail() if fails and index == 2 else None

    def fail():
        raise Interrupted

    if fails:
        with pytest.raises(Interrupted):
            fitted(module, trick)
    else:
        fitted(module, trick)
    after = held(module)
    for (resting, interval, _), (awake, now, frequency) in zip(made, after, strict=True):
        assert any(isinstance(value, Station) for value in resting.values())
        assert awake == {key: value for key, value in resting.items() if not isinstance(value, Station)}
        assert (now, frequency) == (interval, 1)
    assert not [key for key, value in vars(module.trainer.strategy).items() if isinstance(value, Station)]
    assert pickle.loads(pickle.dumps(trick)).at_rest.stations == []


def test_a_second_fit_of_the_same_trick_is_like_the_first():
    trick, first, second = LRCurve("linear", replace=True), Rival("OneCycleLR"), Rival("StepLR")
    fitted(first, trick)
    fitted(second, trick)
    assert rates(first) == rates(second)


def test_after_the_fit_the_module_may_step_its_schedulers_on():
    module = Rival("StepLR")
    run = fitted(module, LRCurve("linear", replace=True))
    run.optimizers[0].step()
    run.lr_scheduler_configs[0].scheduler.step()
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.006)


# ---- what they are asked in the meantime


def test_checkpoints_hold_their_states_as_they_were_made_and_the_module_still_finds_them():
    module = Rival("SequentialLR")
    module.on_train_end = lambda: module.trainer.save_checkpoint("end.ckpt")
    fitted(module, LRCurve("linear", replace=True))
    saved = torch.load("end.ckpt", weights_only=True)
    assert saved["lr_schedulers"] == [module.lr_schedulers().state_dict()]
    assert saved["lr_schedulers"][0]["last_epoch"] == 0
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.06


def test_the_rate_monitor_goes_on_under_the_same_names():
    logger, module = Memory(), Rival("OneCycleLR")
    fitted(module, LearningRateMonitor(), OneCycleMomentum(0.3, replace=True), logger=logger, log_every_n_steps=1)
    assert logger["lr-SGD"] == [rate for (rate,) in rates(module)]


# ---- only those that drive the same


class Adversaries(TwoOptimizers):
    """Each optimizer has a scheduler, which the module steps in each batch."""

    def configure_optimizers(self):
        made = super().configure_optimizers()
        return made, [ExponentialLR(one, 0.5) for one in made]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for scheduler in self.lr_schedulers():
            scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("driven", [0, 1])
def test_the_scheduler_of_another_optimizer_goes_on(driven):
    module, alone = Adversaries(), TwoOptimizers()
    steps = (12, 4)[driven]
    fitted(module, LRCurve("linear", total_steps=steps, optimizer=driven, replace=True))
    fitted(alone, LRCurve("linear", total_steps=steps, optimizer=driven))
    assert module.rates[driven] == alone.rates[driven]
    own, other = module.own_rates[1 - driven], module.rates[1 - driven]
    assert other == pytest.approx([own * 0.5**batch for batch in (range(12) if driven else (2, 6, 10))])


def test_a_curve_of_another_value_leaves_the_schedulers_of_the_rate_alone():
    module, alone = Rival("OneCycleLR"), Rival("OneCycleLR")
    arguments = {"max_steps": 4}  # as many as the scheduler has
    fitted(module, LRCurve("linear", key="weight_decay", replace=True), **arguments)
    fitted(alone, **arguments)
    assert rates(module) == rates(alone)
    assert [step[0]["weight_decay"] for step in module.values] == pytest.approx([0.01 * (1 - n / 4) for n in range(4)])


# ---- whatever the optimizer is


@pytest.mark.parametrize("rival", ["OneCycleLR", "CyclicLR", "LambdaLR from 0"])
def test_adams_betas_and_rates_in_tensors_are_those_it_was_given(rival):
    class Tensors(Rival):
        def configure_optimizers(self):
            optimizer = Classifier.configure_optimizers(self)
            optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
            return RIVALS[self.rival](optimizer) if self.rival else optimizer

    module, alone = Tensors(rival, optimizer="adam"), Tensors(None, optimizer="adam")
    fitted(module, LRCurve("linear", replace=True))
    fitted(alone, LRCurve("linear"))
    assert [float(rate) for (rate,) in rates(module)] == [float(rate) for (rate,) in rates(alone)]
    assert {step[0]["betas"] for step in module.values} == {(0.9, 0.999)}
    assert_same_weights(weights(module), weights(alone))


def test_of_a_scheduler_that_was_made_earlier_the_rate_counts_that_it_noted():
    class Early(Classifier):
        def configure_model(self):
            if not hasattr(self, "own"):
                self.own = Classifier.configure_optimizers(self)
                self.decay = LambdaLR(self.own, lambda step: 0.0 if step == 0 else 1.0)

        def configure_optimizers(self):
            return [self.own], [self.decay]

    module, alone = Early(), Classifier()
    fitted(module, LRCurve("linear", replace=True))
    fitted(alone, LRCurve("linear"))
    assert rates(module) == rates(alone)


def test_groups_that_are_split_and_factors_of_other_tricks_are_those_without_a_scheduler():
    tricks = lambda **options: [  # noqa: E731
        FreezeBackboneFinetune("backbone", unfreeze_at_epoch=1, lr_decay=0.5),
        WarmupLRScaler(scale=2.0, warmup_steps=4),
        LRCurve("linear", **options),
    ]
    module, reverse, alone = Rival("OneCycleLR"), Rival("OneCycleLR"), Rival(None)
    fitted(module, *tricks(replace=True))
    fitted(reverse, *reversed(tricks(replace=True)))
    fitted(alone, *tricks())
    assert len(rates(alone)[-1]) > 1
    assert rates(module) == rates(reverse) == rates(alone)
    assert_same_weights(weights(module), weights(alone))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_steps_that_a_scaler_skips_are_those_without_a_scheduler():
    class Scheduled(SometimesInfinite):
        def configure_optimizers(self):
            return RIVALS["OneCycleLR"](super().configure_optimizers())

    module, alone = Scheduled({0, 5}), SometimesInfinite({0, 5})
    fitted(module, LRCurve("linear", replace=True), plugins=[scaled()])
    fitted(alone, LRCurve("linear"), plugins=[scaled()])
    assert rates(module) == rates(alone)
    assert_same_weights(weights(module), weights(alone))


def test_shorter_epochs_are_no_matter_of_schedulers_at_rest():
    class Decays(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            steps = self.trainer.estimated_stepping_batches
            decay = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
            return [optimizer], [{"scheduler": decay, "interval": "step"}]

    subset = SubsetTraining(0.5, method="random", stop_at=1.0)
    with pytest.warns(UserWarning, match="does not come to its end"):
        fitted(Decays(), subset)
    fitted(Decays(), subset, LRCurve("linear", replace=True))


# ---- the range test


@pytest.mark.parametrize("kind", [lambda: Rival("OneCycleLR"), lambda: Rival("StepLR"), ByHandAtTheStep, ByHand])
def test_a_range_test_sees_the_module_without_its_schedulers(kind):
    module = kind()
    alone = Rival(None) if isinstance(module, Rival) else Classifier()
    tricks = [OneCycleMomentum("auto", range_test={"steps": 30}, replace=True) for _ in range(2)]
    for one, trick in zip((module, alone), tricks, strict=True):
        one.load_state_dict(alone.state_dict())
        fitted(one, trick)
    assert tricks[0].found_lr == tricks[1].found_lr
    assert rates(module) == rates(alone)
    assert_same_weights(weights(module), weights(alone))


# ---- two processes


class Scheduled(Regressor):
    rival = None

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return RIVALS[self.rival](optimizer) if self.rival else optimizer


def test_ranks_end_as_without_a_scheduler():
    ends = []
    for rival, replace in (("OneCycleLR", True), (None, False)):
        module: LightningModule = Scheduled()
        module.rival = rival
        run = two([LRCurve("linear", replace=replace)], max_epochs=2)
        run.fit(module)
        ends.append(weights(module))
    assert_same_weights(*ends)


def test_a_part_of_a_chain_rests_with_it():
    class Keeps(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.part = ExponentialLR(optimizer, 0.5)
            return [optimizer], [ChainedScheduler([self.part])]

        def on_train_batch_end(self, *args):
            self.part.step()

    module, alone = Keeps(), Classifier()
    fitted(module, LRCurve("linear", replace=True))
    fitted(alone, LRCurve("linear"))
    assert rates(module) == rates(alone)
