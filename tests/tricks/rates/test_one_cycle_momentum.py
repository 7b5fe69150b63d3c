"""Each step of a real fit against torch's own OneCycleLR."""

from functools import partial

import numpy as np
import pytest
import torch
from curves import Curve
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import LRRangeTest, OneCycleMomentum
from lightning_speedups.core.schedules import OneCycle
from lightning_speedups.measure.schedule_plot import schedule_values
from zoo import (
    Classifier,
    Joins,
    Manual,
    ReplayLoader,
    TwoGroups,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [OneCycleMomentum(max_lr=0.2)]}


def oracle(total, max_lr=0.4, **shape):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=max_lr, total_steps=total, **shape)
    values = []
    for step in range(total):
        values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return values


def curve(**shape):
    torchs = {"anneal_strategy": shape.get("anneal", "cos")} | {k: v for k, v in shape.items() if k != "anneal"}

    def values(steps, own):
        return [{"lr": lr, "momentum": momentum} for lr, momentum in oracle(steps.total, **torchs)]

    return Curve(partial(OneCycleMomentum, 0.4, **shape), values)


CURVES = {
    "cosine": curve(),
    "three phases": curve(three_phase=True),
    "linear": curve(anneal="linear", div_factor=10.0, pct_start=0.2),
    "momentum left alone": Curve(
        partial(OneCycleMomentum, 0.4, cycle_momentum=False),
        lambda steps, own: [{"lr": lr} for lr, _ in oracle(steps.total)],
    ),
}


def read(module, group=0):
    return [(step[group]["lr"], step[group]["momentum"]) for step in module.values]


def test_resumed_with_another_length_it_stretches_and_names_both_totals():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 6, [OneCycleMomentum(0.4)], max_epochs=2)
    module.values.clear()
    with pytest.warns(UserWarning, match="had 8 optimizer steps, this one has 16"):
        resume(module, ReplayLoader(), [OneCycleMomentum(0.4)], max_epochs=4)
    np.testing.assert_allclose(read(module), oracle(16)[6:], rtol=1e-9)


def test_past_the_end_it_stays_there():
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4, total_steps=5)]).fit(module, loader())
    np.testing.assert_allclose(read(module), oracle(5) + [oracle(5)[-1]] * 7, rtol=1e-9)


def test_each_group_can_have_its_own_peak():
    module = TwoGroups(lr=(1.0, 1.0))
    trainer(callbacks=[OneCycleMomentum([0.1, 0.4])]).fit(module, loader())
    np.testing.assert_allclose(read(module, group=0), oracle(12, max_lr=0.1), rtol=1e-9)
    np.testing.assert_allclose(read(module, group=1), oracle(12, max_lr=0.4), rtol=1e-9)


def test_groups_that_are_there_from_the_start_are_drawn_as_they_will_be():
    _, planned = schedule_values(OneCycleMomentum(0.4), 12, optimizer=TwoGroups().configure_optimizers())
    expected = [lr for lr, _ in oracle(12)]
    for numbers in planned["lr"].values():
        np.testing.assert_allclose(numbers, expected, rtol=1e-9)
    assert len(planned["lr"]) == 2


class NoMomentum(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


@pytest.mark.parametrize(
    ("module", "callback", "told"),
    [
        (Classifier, OneCycleMomentum([0.4, 0.1]), "has 2 values, but SGD has 1 parameter group"),
        (NoMomentum, OneCycleMomentum(0.4), "but Adagrad has none, only .* Use `cycle_momentum=False`"),
    ],
)
def test_what_cannot_work_is_refused_at_fit_start_by_name(module, callback, told):
    module = module()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[callback]).fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_lr": 0.0}, "`max_lr` to be a number above 0, but got 0.0"),
        ({"max_lr": float("nan")}, "`max_lr`"),
        ({"max_lr": []}, "`max_lr`"),
        ({"max_lr": [0.1, -1.0]}, "`max_lr`"),
        ({"pct_start": 1.0}, "`pct_start`"),
        ({"pct_start": 0.6, "three_phase": True}, r"`pct_start` to be a number in \(0, 0.5\], but got 0.6"),
        ({"anneal": "cosine"}, "`anneal` to be 'cos' or 'linear', but got 'cosine'"),
        ({"div_factor": 0.0}, "`div_factor`"),
        ({"final_div_factor": float("nan")}, "`final_div_factor`"),
        ({"base_momentum": 1.0}, "`base_momentum`"),
        ({"max_momentum": -0.1}, "`max_momentum`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        OneCycleMomentum(**{"max_lr": 0.1, **arguments})


@pytest.mark.parametrize(("epochs", "total"), [(4, 16), (2, 8)])
def test_extended_it_goes_on_from_where_it_stood_and_ends_at_the_new_total(epochs, total):
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 5, [OneCycleMomentum(0.4)])
    module.values.clear()
    with pytest.warns(UserWarning, match=f"had 12 optimizer steps, this one has {total}; the curve goes on from where"):
        resume(module, ReplayLoader(), [OneCycleMomentum(0.4, on_resume="extend")], max_epochs=epochs)
    positions = [5 + t * (11 - 5) / (total - 1 - 5) for t in range(total - 5)]
    np.testing.assert_allclose(read(module), [OneCycle().at(p, 12, max_lr=0.4) for p in positions], rtol=1e-9)
    assert read(module)[0] == pytest.approx(oracle(12)[5])
    assert read(module)[-1] == pytest.approx(oracle(12)[-1])


def test_beside_a_rate_for_each_group_a_later_one_keeps_its_ratio_and_gets_the_momentum():
    module = Joins()
    trainer(callbacks=[OneCycleMomentum([0.4])]).fit(module, loader())
    expected = oracle(12)
    np.testing.assert_allclose(read(module), expected, rtol=1e-9)
    later = [(step[1]["lr"], step[1]["momentum"]) for step in module.values[4:]]
    np.testing.assert_allclose(later, [(lr / 4, momentum) for lr, momentum in expected[4:]], rtol=1e-9)


def test_a_run_of_one_step_stands_at_the_end_of_the_cycle():
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4)], max_steps=1).fit(module, loader())
    np.testing.assert_allclose(read(module), [OneCycle().at(0, 1, max_lr=0.4)], rtol=1e-9)


def auto(**settings):
    return OneCycleMomentum("auto", range_test={"min_lr": 1e-4, "steps": 40, **settings})


def test_auto_takes_the_rate_of_the_range_test_and_leaves_no_other_trace():
    module, twin = Classifier(), Classifier()
    twin.load_state_dict(module.state_dict())
    suggested = LRRangeTest(1e-4, steps=40).run(trainer(), module, loader()).suggestion
    callback = auto()
    trainer(callbacks=[callback]).fit(module, loader())
    assert callback.found_lr == suggested
    np.testing.assert_allclose(read(module), oracle(12, max_lr=suggested), rtol=1e-9)
    trainer(callbacks=[OneCycleMomentum(suggested)]).fit(twin, loader())
    assert_same_weights(weights(module), weights(twin))


def test_auto_picks_as_it_is_told():
    callback = auto(method="valley")
    module = Classifier()
    expected = LRRangeTest(1e-4, steps=40, method="valley").run(trainer(), module, loader()).suggestion
    trainer(callbacks=[callback]).fit(module, loader())
    assert callback.found_lr == expected


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_auto_does_not_search_again_on_resume(stop, monkeypatch):
    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=[auto()]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [auto()])
    monkeypatch.setattr("lightning_speedups.tricks.rates.one_cycle_momentum.run_range_test", None)
    resume(parted, ReplayLoader(), [auto()])
    assert_same_weights(weights(whole), weights(parted))


def test_auto_searches_anew_in_another_fit():
    callback = auto()
    trainer(callbacks=[callback]).fit(Classifier(), loader())
    first = callback.found_lr
    trainer(callbacks=[callback]).fit(Classifier(optimizer="adam", lr=0.001), loader())
    assert callback.found_lr <= 0.0115 < first  # ten times its own


class Unteachable(Classifier):
    """A loss of noise, whatever the rate."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0 + torch.rand(())


class Taught(LightningModule):
    """Deep enough that the rate of the lowest loss ruins it."""

    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.optimizer, self.losses = optimizer, []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize(("optimizer", "lowest_ruins"), [("SGD", True), ("AdamW", False)])
def test_auto_ends_better_than_the_modules_own_constant_rate_also_where_the_rate_of_the_lowest_loss_ruins(
    optimizer, lowest_ruins
):
    generator = torch.Generator().manual_seed(0)
    inputs, teacher = torch.randn(640, 20, generator=generator), torch.randn(20, 8, generator=generator)
    data = TensorDataset(inputs, (inputs @ teacher).argmax(1))

    def end(*callbacks):
        torch.manual_seed(1)
        module = Taught(optimizer)
        trainer(callbacks=[*callbacks], max_epochs=5).fit(module, DataLoader(data, batch_size=32, shuffle=True))
        return np.mean(module.losses[-10:])

    own = end()
    assert end(OneCycleMomentum("auto")) < own
    torch.manual_seed(1)
    result = LRRangeTest().run(trainer(), Taught(optimizer), DataLoader(data, batch_size=32, shuffle=True))
    lowest = result.rates[int(np.argmin(result.smoothed[:-5]))]
    assert not lowest_ruins or not end(OneCycleMomentum(lowest)) < 1.1 * own


@pytest.mark.parametrize(
    ("module", "arguments", "error", "told"),
    [
        (
            Manual,
            {"total_steps": 12},
            MisconfigurationException,
            "optimizes manually. Give the learning rate as a numb",
        ),
        (Classifier, {"range_test": {"min_lr": 1e5, "max_lr": 1e6}}, ValueError, "Lower `min_lr`"),
        (Unteachable, {}, ValueError, "the sweep of 100 steps shows no rate"),
    ],
)
def test_auto_that_cannot_find_a_rate_says_so_before_the_first_step(module, arguments, error, told):
    module = module()
    with pytest.raises(error, match=told):
        trainer(callbacks=[OneCycleMomentum("auto", **arguments)]).fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"steps": 3}, "`steps` to be a whole number of 10"), ({"foo": 1}, "foo"), (3, "LRRangeTest")],
)
def test_settings_of_the_range_test_are_checked_at_once(settings, told):
    with pytest.raises(ValueError, match=told):
        OneCycleMomentum("auto", range_test=settings)
