"""Each step of a real fit against torch's own CyclicLR."""

import math
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import CyclicLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_speedups import CyclicMomentum, LRCurve, OneCycleMomentum, WarmupLRScaler
from small import (
    Classifier,
    Joins,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    images,
    loader,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [CyclicMomentum(0.02, 0.2, step_size_up=2, step_size_down=3)]}


def oracle(steps, up, down=None, low=0.02, high=0.2, **shape):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    scheduler = CyclicLR(optimizer, low, high, up, down, **shape)
    values = []
    for _ in range(steps):
        values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    return values


def read(module, key="momentum", group=0):
    return [(step[group]["lr"], step[group][key][0] if key == "betas" else step[group][key]) for step in module.values]


def check(module, expected, **options):
    np.testing.assert_allclose(read(module, **options), expected, rtol=1e-9)


MODES = [{"mode": "triangular"}, {"mode": "triangular2"}, {"mode": "exp_range", "gamma": 0.93}]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("up", "down"), [(2, 3), (3, None), (1, 1), (5, 2)])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_each_step_equals_torch_also_with_a_short_last_window(mode, up, down, accumulate):
    module = Classifier()
    cyclic = CyclicMomentum(0.02, 0.2, up, down, **mode)
    trainer(callbacks=[cyclic], accumulate_grad_batches=accumulate).fit(module, loader(48))
    check(module, oracle(3 * math.ceil(6 / accumulate), up, down, **mode))


def test_momentum_has_the_bounds_it_is_given():
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 4, base_momentum=0.5, max_momentum=0.97)]).fit(module, loader())
    check(module, oracle(12, 4, base_momentum=0.5, max_momentum=0.97))


def test_adam_cycles_its_first_beta_and_keeps_the_second():
    module = Classifier(optimizer="adam")
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3)]).fit(module, loader())
    check(module, oracle(12, 2, 3), key="betas")
    assert {step[0]["betas"][1] for step in module.values} == {0.999}


def test_momentum_can_be_left_alone():
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3, cycle_momentum=False)]).fit(module, loader())
    check(module, [(lr, 0.9) for lr, _ in oracle(12, 2, 3)])


@pytest.mark.parametrize(
    ("sizes", "up", "down"),
    [
        ((0.25,), 3, 3),
        (("25%", 0.5), 3, 6),
        (("1 epochs", "0.5 epochs"), 4, 2),
        (("2 steps", "1 epoch"), 2, 4),
        ((2, "25 %"), 2, 3),
        ((0.5, 1), 6, 1),
    ],
)
def test_a_step_size_may_be_a_part_of_the_run_or_of_an_epoch(sizes, up, down):
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, *sizes)]).fit(module, loader())
    check(module, oracle(12, up, down))


def test_without_step_sizes_the_run_makes_four_cycles():
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2)], max_epochs=4).fit(module, loader())
    check(module, oracle(16, 2))


def test_step_sizes_in_fractions_follow_a_changing_accumulation():
    module = Classifier()
    tricks = [GradientAccumulationScheduler({0: 1, 2: 2}), CyclicMomentum(0.02, 0.2, 0.2)]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, oracle(10, 2))  # 4 + 4 + 2 steps


def test_step_sizes_in_epochs_follow_a_changing_accumulation():
    module = Classifier()
    tricks = [GradientAccumulationScheduler({0: 2, 1: 1}), CyclicMomentum(0.02, 0.2, "2 epochs", 1)]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, oracle(10, 2 + 4, 1))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_step_that_the_grad_scaler_skips_moves_nothing():
    module, cyclic = Classifier(), CyclicMomentum(0.02, 0.2, 2, 3)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer(callbacks=[cyclic], plugins=[scaled]).fit(module, loader())
    assert cyclic.steps_done == [9]
    check(module, oracle(9, 2, 3))


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_resumed_at_any_step_goes_on_exactly(stop):
    def cyclic():
        return CyclicMomentum(0.02, 0.2, 0.25, 2, mode="exp_range", gamma=0.95)

    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=[cyclic()]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [cyclic()])
    resume(parted, ReplayLoader(), [cyclic()])
    check(parted, oracle(12, 3, 2, mode="exp_range", gamma=0.95))
    assert_same_weights(weights(whole), weights(parted))


def test_resumed_with_another_length_cycles_in_fractions_are_stretched():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 6, [CyclicMomentum(0.02, 0.2, 0.25)])
    module.values.clear()
    with pytest.warns(
        UserWarning, match="CyclicMomentum: the checkpoint's run had 12 optimizer steps, this one has 16"
    ):
        resume(module, ReplayLoader(), [CyclicMomentum(0.02, 0.2, 0.25)], max_epochs=4)
    check(module, oracle(16, 4)[6:])


def test_resumed_with_another_length_cycles_in_fractions_may_be_extended():
    def cyclic():
        return CyclicMomentum(0.02, 0.2, 0.25, mode="triangular2", on_resume="extend")

    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 6, [cyclic()])
    module.values.clear()
    with pytest.warns(UserWarning, match="the curve goes on from where it stood"):
        resume(module, ReplayLoader(), [cyclic()], max_epochs=6)  # 18 steps for the 6 that were left
    check(module, oracle(72, 18, mode="triangular2")[36:72:2][:18])


def test_resumed_with_another_length_cycles_in_steps_go_on_and_nothing_is_said():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 6, [CyclicMomentum(0.02, 0.2, 2, 3)])
    resume(module, ReplayLoader(), [CyclicMomentum(0.02, 0.2, 2, 3)], max_epochs=5)
    check(module, oracle(20, 2, 3))


class TwoGroups(Classifier):
    def configure_optimizers(self):
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


def test_each_group_can_have_its_own_rates():
    module = TwoGroups()
    trainer(callbacks=[CyclicMomentum([0.01, 0.3], (0.1, 0.2), 2, 3)]).fit(module, loader())
    check(module, oracle(12, 2, 3, low=0.01, high=0.1), group=0)
    check(module, oracle(12, 2, 3, low=0.3, high=0.2), group=1)


@pytest.mark.parametrize("rates", [(0.02, 0.2), ([0.02], [0.2])])
def test_a_group_that_appears_later_keeps_its_ratio_and_gets_the_momentum(rates):
    module = Joins()
    trainer(callbacks=[CyclicMomentum(*rates, 2, 3)]).fit(module, loader())
    expected = oracle(12, 2, 3)
    check(module, expected)
    later = [(step[1]["lr"], step[1]["momentum"]) for step in module.values[4:]]
    np.testing.assert_allclose(later, [(lr / 4, momentum) for lr, momentum in expected[4:]], rtol=1e-9)


class Manual(Classifier):
    """Two optimizers; the second steps on every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.rates = ([], [])
        made = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9) for part in (self.head, self.backbone)]
        for optimizer, rates in zip(made, self.rates, strict=True):
            optimizer.register_step_pre_hook(
                lambda o, *_, rates=rates: rates.append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))
            )
        return made

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()


def test_manual_optimization_cycles_each_optimizer_by_its_own_steps_and_needs_no_length():
    module = Manual()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3)]).fit(module, loader())
    np.testing.assert_allclose(module.rates[0], oracle(12, 2, 3), rtol=1e-9)
    np.testing.assert_allclose(module.rates[1], oracle(6, 2, 3), rtol=1e-9)


def test_two_optimizers_may_cycle_in_different_ways():
    module = Manual()
    tricks = [CyclicMomentum(0.02, 0.2, 2, 3, optimizer=0), CyclicMomentum(0.1, 0.3, 1, 1, optimizer=1)]
    trainer(callbacks=tricks).fit(module, loader())
    np.testing.assert_allclose(module.rates[0], oracle(12, 2, 3), rtol=1e-9)
    np.testing.assert_allclose(module.rates[1], oracle(6, 1, 1, low=0.1, high=0.3), rtol=1e-9)


def test_one_optimizer_may_cycle_alone():
    module = Manual()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3, optimizer=1)]).fit(module, loader())
    assert module.rates[0] == [(0.7, 0.9)] * 12
    np.testing.assert_allclose(module.rates[1], oracle(6, 2, 3), rtol=1e-9)


def test_a_warm_up_lies_on_top():
    module = Classifier()
    trainer(callbacks=[WarmupLRScaler(scale=2.0, warmup_steps=4), CyclicMomentum(0.02, 0.2, 2, 3)]).fit(
        module, loader()
    )
    check(module, [(lr * (1 + min(t, 4) / 4), momentum) for t, (lr, momentum) in enumerate(oracle(12, 2, 3))])


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(*images(32), strict=True)


def endless():
    return DataLoader(Endless(), batch_size=8)


class Ends(Callback):
    """Ends a run after 8 steps."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 8


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": None, "max_time": {"hours": 1}}])
def test_step_sizes_in_steps_need_no_length_of_the_run(arguments):
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3), Ends()], **arguments).fit(module, endless())
    check(module, oracle(8, 2, 3))


@pytest.mark.parametrize(
    ("module", "data", "tricks", "arguments", "told"),
    [
        (Classifier, endless, [CyclicMomentum(0.02, 0.2)], {}, "CyclicMomentum needs the length of the run, .* Give `total_steps=`"),
        (Manual, loader, [CyclicMomentum(0.02, 0.2, 2, 0.5)], {}, "Give `total_steps=`"),
        (Classifier, loader, [CyclicMomentum(0.02, 0.2)], {"max_epochs": -1}, "Give `total_steps=`"),
        (Classifier, endless, [CyclicMomentum(0.02, 0.2, "1 epochs")], {}, r"\(step_size_up='1 epochs'\) needs the length of an epoch, .* Give `step_size_up` in optimizer steps"),
        (Classifier, endless, [CyclicMomentum(0.02, 0.2, 3, "1 epochs")], {}, r"\(step_size_down='1 epochs'\) needs the length of an epoch"),
        (Classifier, loader, [CyclicMomentum(0.02, 0.2, "0.1 epochs")], {}, "step sizes of 0.1 epochs up and 0.1 epochs down are less than one optimizer step"),
        (Classifier, loader, [CyclicMomentum([0.02, 0.1], 0.2, 2)], {}, r"CyclicMomentum\(base_lr=\[0.02, 0.1\]\) has 2 values, but SGD has 1"),
        (TwoGroups, loader, [CyclicMomentum(0.02, [0.1, 0.2, 0.3], 2)], {}, r"CyclicMomentum\(max_lr=\[0.1, 0.2, 0.3\]\) has 3 values, but SGD has 2"),
        (Classifier, loader, [CyclicMomentum(0.02, 0.2, 2), OneCycleMomentum(0.4)], {}, "the callback OneCycleMomentum"),
        (Classifier, loader, [CyclicMomentum(0.02, 0.2, 2), LRCurve(key="momentum")], {}, "sets the learning rate .* the callback LRCurve"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_fit_start_by_name(module, data, tricks, arguments, told):
    module = module()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=tricks, **arguments).fit(module, data())
    assert not module.losses


class NoMomentum(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), 0.1)


def test_an_optimizer_without_momentum_is_refused_with_the_way_out_which_leads_out():
    with pytest.raises(MisconfigurationException, match=r"but Adagrad has none, only .* Use `cycle_momentum=False`"):
        trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2)]).fit(NoMomentum(), loader())
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, cycle_momentum=False)], max_epochs=1).fit(NoMomentum(), loader())


def test_beside_a_curve_for_momentum_it_leaves_that_to_it():
    module = Classifier()
    tricks = [CyclicMomentum(0.02, 0.2, 2, 3, cycle_momentum=False), LRCurve("linear", key="momentum")]
    trainer(callbacks=tricks).fit(module, loader())
    check(module, [(lr, 0.9 * (1 - t / 12)) for t, (lr, _) in enumerate(oracle(12, 2, 3))])


def test_a_total_of_its_own_settles_fractions():
    module = Classifier()
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 0.25, total_steps=8)], max_epochs=-1, max_steps=8).fit(
        module, endless()
    )
    check(module, oracle(8, 2))


def test_cycles_too_short_to_leave_the_base_are_warned_of():
    with pytest.warns(UserWarning, match=r"a cycle of 0.75 optimizer steps is too short to leave `base_lr`"):
        trainer(callbacks=[CyclicMomentum(0.02, 0.2)], max_epochs=1, max_steps=3).fit(Classifier(), loader())


def test_the_rate_monitor_shows_the_true_values():
    monitor = LearningRateMonitor("step", log_momentum=True)
    run = trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3), monitor], logger=True, log_every_n_steps=1)
    run.fit(Classifier(), loader())
    assert monitor.lrs["lr-SGD"] == pytest.approx([lr for lr, _ in oracle(12, 2, 3)])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_lr": 0.0}, "`base_lr` to be a number above 0, but got 0.0"),
        ({"base_lr": [0.1, -1.0]}, "`base_lr`"),
        ({"max_lr": float("nan")}, "`max_lr`"),
        ({"max_lr": "high"}, "`max_lr`"),
        ({"max_lr": []}, "`max_lr`"),
        ({"step_size_up": 0}, "`step_size_up` to be above 0, but got 0 steps"),
        ({"step_size_up": -1}, "`step_size_up`"),
        ({"step_size_up": 1.5}, "`step_size_up` to be a whole number of optimizer steps, a float in"),
        ({"step_size_down": 0.0}, "`step_size_down` to be above 0, but got 0.0 fraction"),
        ({"step_size_down": "two"}, "`step_size_down`"),
        ({"mode": "square"}, "`mode` to be 'triangular', 'triangular2' or 'exp_range', but got 'square'"),
        ({"gamma": 0.0}, r"`gamma` to be a number in \(0, 1\], but got 0.0"),
        ({"gamma": 1.1}, "`gamma`"),
        ({"base_momentum": 1.0}, r"`base_momentum` to be a number in \[0, 1\), but got 1.0"),
        ({"max_momentum": -0.1}, "`max_momentum`"),
        ({"total_steps": 0}, "`total_steps`"),
        ({"optimizer": -1}, "`optimizer`"),
        ({"on_resume": "stop"}, "`on_resume`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        CyclicMomentum(**{"base_lr": 0.1, "max_lr": 0.2, **arguments})


def test_it_pickles_with_its_count():
    cyclic = CyclicMomentum(0.02, 0.2)
    trainer(callbacks=[cyclic], max_epochs=4).fit(Classifier(), loader())
    assert pickle.loads(pickle.dumps(cyclic)).steps_done == [16]
