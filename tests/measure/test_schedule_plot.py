"""The plot shows what a real fit then does."""

import inspect

import matplotlib.figure
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_speedups
from lightning_speedups import (
    CyclicMomentum,
    FreezeBackboneFinetune,
    FreezeProgressively,
    LRCurve,
    OneCycleMomentum,
    StopAtTarget,
    WarmupLRScaler,
    plot_schedule,
)
from lightning_speedups.measure.schedule_plot import schedule_values
from lightning_speedups.tricks.rates.base import ScheduleTrick
from zoo import Classifier, loader, trainer

LISTS = {
    "one-cycle": lambda: [OneCycleMomentum(0.4)],
    "cyclic": lambda: [CyclicMomentum(0.1, 0.4, mode="triangular2")],
    "curves": lambda: [LRCurve("cosine", "1 epochs", 2, end_factor=0.1), LRCurve("linear", key="weight_decay")],
    "momentum": lambda: [LRCurve("linear", key="momentum")],
    "scaled": lambda: [WarmupLRScaler(base_batch_size=4, warmup_epochs=1.5), LRCurve("linear")],
    "scaled only": lambda: [WarmupLRScaler(base_batch_size=4, warmup_epochs=1.5)],
    "others": lambda: [OneCycleMomentum(0.4), FreezeBackboneFinetune(unfreeze_at_epoch=0, backbone_lr_ratio=1.0)],
}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", LISTS)
def test_each_value_is_that_of_a_real_fit(name, kind):
    module = Classifier(optimizer=kind)
    optimizer = module.configure_optimizers()
    _, planned = schedule_values(LISTS[name](), 12, steps_per_epoch=4, batch_size=8, optimizer=optimizer)
    module.values.clear()
    trainer(callbacks=LISTS[name]()).fit(module, loader())
    assert len(module.values) == 12
    for key, lines in planned.items():
        if key == "scale":
            continue
        (numbers,) = lines.values()
        real = [
            step[0]["betas"][0] if key == "momentum" and "betas" in step[0] else step[0][key] for step in module.values
        ]
        np.testing.assert_allclose(numbers, real, rtol=1e-12, err_msg=key)
    assert "lr" in planned
    assert any(len(set(numbers)) > 1 for lines in planned.values() for numbers in lines.values())


def two_groups(module, rate):
    heads = [
        {"params": module.backbone.parameters(), "lr": rate(0.1)},
        {"params": module.head.parameters(), "lr": rate(0.3)},
    ]
    return torch.optim.SGD(heads, lr=0.1, momentum=0.9, weight_decay=0.01)


RATES = {"a number": float, "a tensor": lambda rate: torch.tensor(rate, dtype=torch.float64)}
GROUPS = LISTS | {
    "peaks": lambda: [OneCycleMomentum([0.2, 0.5])],
    "peaks, three phases": lambda: [OneCycleMomentum([0.2, 0.5], three_phase=True), WarmupLRScaler(scale=3.0, warmup_epochs=0.5)],
    "bounds": lambda: [CyclicMomentum([0.1, 0.2], [0.6, 0.3], "0.5 epochs", 0.2, mode="exp_range", gamma=0.95)],
    "restarts": lambda: [LRCurve("cosine_restarts", warmup=2)],
}  # fmt: skip


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("name", GROUPS)
def test_each_value_of_each_group_is_that_of_a_real_fit(name, kind):
    if name == "others":
        return  # those split groups

    class Two(Classifier):
        def configure_optimizers(self):
            optimizer = two_groups(self, RATES[kind])
            optimizer.register_step_pre_hook(self._note)
            return optimizer

        def _note(self, optimizer, *_):
            self.values.append([{key: float(group[key]) for key in OWN} for group in optimizer.param_groups])

    module = Two()
    optimizer = two_groups(module, RATES[kind])
    rates = [group["lr"] for group in optimizer.param_groups]
    _, planned = schedule_values(GROUPS[name](), 12, steps_per_epoch=4, batch_size=8, optimizer=optimizer)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [float(rate) for rate in rates] == [0.1, 0.3]  # the user's own tensors are not written to
    trainer(callbacks=GROUPS[name]()).fit(module, loader())
    for key in planned.keys() - {"scale"}:
        for group in (0, 1):
            real = [step[group][key] for step in module.values]
            np.testing.assert_allclose(planned[key][f"SGD, group {group}"], real, rtol=1e-12, err_msg=key)


OWN = ("lr", "momentum", "weight_decay")


def test_without_an_optimizer_there_are_as_many_groups_as_rates():
    tricks = [OneCycleMomentum([0.2, 0.5], optimizer=0), CyclicMomentum([0.1, 0.2, 0.3], 0.9, optimizer=1)]
    _, planned = schedule_values(tricks, 10)
    assert {label: max(numbers) for label, numbers in planned["lr"].items()} == pytest.approx(
        {"SGD 0, group 0": 0.2, "SGD 0, group 1": 0.5, **{f"SGD 1, group {i}": max(planned["lr"][f"SGD 1, group {i}"]) for i in (0, 1, 2)}}
    )  # fmt: skip
    assert [planned["lr"][f"SGD 1, group {i}"][0] for i in (0, 1, 2)] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("trick", "optimizer", "told"),
    [
        (OneCycleMomentum([0.1, 0.2, 0.3]), lambda p: torch.optim.SGD(p, 0.1, 0.9), "has 3 values, but SGD has 1 parameter group"),
        (OneCycleMomentum(0.1), torch.optim.Adagrad, "drives `momentum`, but Adagrad has none.*cycle_momentum=False"),
        (CyclicMomentum(0.1, 0.2), torch.optim.Adagrad, "drives `momentum`, but Adagrad has none"),
        (LRCurve(key="beta"), torch.optim.SGD, "drives `beta`, but SGD has none"),
        (LRCurve(optimizer=1), torch.optim.SGD, r"LRCurve\(optimizer=1\) counts from 0, but this run has 1 optimizer"),
    ],
)  # fmt: skip
def test_optimizers_that_a_run_refuses_are_refused_here(trick, optimizer, told):
    with pytest.raises(ValueError, match=told):
        schedule_values(trick, 10, optimizer=optimizer([torch.zeros(1)]))


def test_every_schedule_of_the_package_is_compared_above():
    compared = {type(callback) for make in LISTS.values() for callback in make()}
    public = {getattr(lightning_speedups, name) for name in lightning_speedups.__all__}
    assert {one for one in public if inspect.isclass(one) and issubclass(one, ScheduleTrick)} <= compared


def test_the_scale_is_what_multiplies():
    steps, planned = schedule_values([WarmupLRScaler(scale=3.0, warmup_steps=4), LRCurve("linear")], 8)
    assert steps == list(range(8))
    np.testing.assert_allclose(planned["scale"]["SGD"], [1, 1.5, 2, 2.5, 3, 3, 3, 3])
    np.testing.assert_allclose(
        planned["lr"]["SGD"], [s * (1 - t / 8) for t, s in enumerate(planned["scale"]["SGD"])], rtol=1e-12
    )
    assert "scale" not in schedule_values(LRCurve("linear"), 8)[1]
    assert set(schedule_values(WarmupLRScaler(scale=3.0, warmup_steps=0), 8)[1]["scale"]["SGD"]) == {3.0}


def test_a_long_run_is_sampled_from_end_to_end():
    steps, planned = schedule_values(LRCurve("linear"), 10**6, points=11)
    assert (steps[0], steps[-1], len(steps)) == (0, 10**6 - 1, 11)
    np.testing.assert_allclose(planned["lr"]["SGD"], [1 - t / 10**6 for t in steps])
    assert schedule_values(LRCurve("linear"), 1)[0] == [0]


def test_each_group_and_optimizer_has_a_line_of_its_own():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    groups = torch.optim.SGD([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.4}], momentum=0.9)
    adam = torch.optim.Adam(weights[2:], lr=0.2)
    before = [dict(group) for group in groups.param_groups]
    _, planned = schedule_values(LRCurve("linear", optimizer=0), 4, optimizer=[groups, adam])
    assert {name: numbers[:2] for name, numbers in planned["lr"].items()} == {
        "SGD 0, group 0": [0.1, pytest.approx(0.075)],
        "SGD 0, group 1": [0.4, pytest.approx(0.3)],
        "Adam 1": [0.2, 0.2],
    }
    assert [dict(group) for group in groups.param_groups] == before
    assert set(schedule_values(LRCurve("linear", optimizer=1), 4)[1]["lr"]) == {"SGD 0", "SGD 1"}


def test_callbacks_are_left_as_they_are_also_after_a_fit():
    callback = LRCurve("cosine")
    run = trainer(callbacks=[callback])
    run.fit(Classifier(), loader())
    before = dict(vars(callback))
    assert schedule_values(callback, 30)[1]["lr"]["SGD"][15] == pytest.approx(0.5)  # of 30, not of the fit's 12
    assert vars(callback) == before


def test_a_curve_over_time_is_drawn_as_if_steps_took_the_same_time():
    over_time = schedule_values(LRCurve("cosine", warmup=0.1, over="time"), 20)
    assert over_time == schedule_values(LRCurve("cosine", warmup=0.1), 20)


@pytest.mark.parametrize(
    ("callbacks", "length", "told"),
    [
        ([], 10, "a schedule or a list with one"),
        ([ModelCheckpoint()], 10, "Schedules are OneCycleMomentum"),
        ([OneCycleMomentum(0.1), LRCurve("linear")], 10, "OneCycleMomentum and LRCurve set the same value"),
        (LRCurve("linear", warmup="1 epochs"), 10, "`steps_per_epoch="),
        (WarmupLRScaler(base_batch_size=4, warmup_steps=2), 10, "`batch_size="),
        (OneCycleMomentum("auto"), 10, "finds its rate when a run starts"),
        (LRCurve("linear"), 0, "`trainer_length`"),
        (LRCurve("linear"), 2.5, "`trainer_length`"),
    ],
)
def test_what_cannot_be_drawn_is_refused(callbacks, length, told):
    with pytest.raises(ValueError, match=told):
        plot_schedule(callbacks, length)


def test_the_figure_has_a_panel_for_each_value():
    figure = plot_schedule([OneCycleMomentum(0.4), WarmupLRScaler(warmup_steps=5), StopAtTarget("x", 1, "max")], 50)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["learning rate", "momentum", "scale of the rate"]
    _, planned = schedule_values([OneCycleMomentum(0.4), WarmupLRScaler(warmup_steps=5)], 50)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), planned["lr"]["SGD"])
    figure.savefig("schedule.png")


def test_it_draws_on_given_axes_and_leaves_pyplot_alone():
    figure = matplotlib.figure.Figure()
    both = figure.subplots(2)
    assert plot_schedule(OneCycleMomentum(0.4), 50, ax=both) is figure
    assert [len(axes.lines) for axes in both] == [1, 1]
    alone = matplotlib.figure.Figure().subplots()
    plot_schedule(OneCycleMomentum(0.4), 50, ax=alone)
    assert [alone.get_ylabel(), alone.get_xlabel(), len(alone.lines)] == ["learning rate", "optimizer step", 1]


def test_tricks_that_pace_the_layers_of_a_module_change_nothing_without_one():
    beside = [LRCurve("cosine"), FreezeBackboneFinetune(gradual=True, unfreeze_warmup=3), FreezeProgressively()]
    assert schedule_values(beside, 20)[1] == schedule_values([LRCurve("cosine")], 20)[1]
