"""Each step of a real fit against torch's own CyclicLR."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from curves import Curve, Steps
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import CyclicLR

from lightning_speedups import CyclicMomentum, LRCurve, OneCycleMomentum
from zoo import (
    Classifier,
    Joins,
    Manual,
    ReplayLoader,
    TwoGroups,
    TwoOptimizers,
    endless,
    fit_interrupted,
    loader,
    resume,
    trainer,
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


def curve(up, down, **options):
    def values(steps, own):
        sizes = [size * steps.total if isinstance(size, float) else size for size in (up, down)]
        return [{"lr": lr, "momentum": momentum} for lr, momentum in oracle(steps.total, *sizes, **options)]

    return Curve(partial(CyclicMomentum, 0.02, 0.2, up, down, **options), values)


CURVES = {
    "triangular": curve(2, 3, mode="triangular"),
    "triangular2": curve(2, 3, mode="triangular2"),
    "exp_range, in part a fraction": curve(0.25, 2, mode="exp_range", gamma=0.95),
    "bounds of the momentum": curve(4, None, base_momentum=0.5, max_momentum=0.97),
    "momentum left alone": Curve(
        partial(CyclicMomentum, 0.02, 0.2, 2, 3, cycle_momentum=False),
        lambda steps, own: [{"lr": lr} for lr, _ in oracle(steps.total, 2, 3)],
    ),
}


def read(module, group=0):
    return [(step[group]["lr"], step[group]["momentum"]) for step in module.values]


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


def test_each_group_can_have_its_own_rates():
    module = TwoGroups()
    trainer(callbacks=[CyclicMomentum([0.01, 0.3], (0.1, 0.2), 2, 3)]).fit(module, loader())
    check(module, oracle(12, 2, 3, low=0.01, high=0.1), group=0)
    check(module, oracle(12, 2, 3, low=0.3, high=0.2), group=1)


def test_beside_rates_for_each_group_a_later_one_keeps_its_ratio_and_gets_the_momentum():
    module = Joins()
    trainer(callbacks=[CyclicMomentum([0.02], [0.2], 2, 3)]).fit(module, loader())
    expected = oracle(12, 2, 3)
    check(module, expected)
    later = [(step[1]["lr"], step[1]["momentum"]) for step in module.values[4:]]
    np.testing.assert_allclose(later, [(lr / 4, momentum) for lr, momentum in expected[4:]], rtol=1e-9)


def test_manual_optimization_cycles_each_optimizer_by_its_own_steps_and_needs_no_length():
    module = TwoOptimizers(every=2)
    trainer(callbacks=[CyclicMomentum(0.02, 0.2, 2, 3)]).fit(module, loader())
    for notes in module.notes:
        CURVES["triangular"].check(notes, Steps([len(notes)]), {"lr": 0.0, "momentum": 0.0})


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
        (Manual, endless, [CyclicMomentum(0.02, 0.2, 2, 0.5)], {}, "Give `total_steps=`"),
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
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        CyclicMomentum(**{"base_lr": 0.1, "max_lr": 0.2, **arguments})
