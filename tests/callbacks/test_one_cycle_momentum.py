"""Each step of a real fit against torch's own OneCycleLR."""

import math
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import OneCycleLR

from lightning_speedups import LRRangeTest, OneCycleMomentum
from lightning_speedups.core.schedules import one_cycle
from zoo import (
    Classifier,
    Joins,
    ReplayLoader,
    SometimesInfinite,
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


def read(module, key="momentum", group=0):
    return [(step[group]["lr"], step[group][key][0] if key == "betas" else step[group][key]) for step in module.values]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "shape", [{}, {"three_phase": True}, {"anneal": "linear", "div_factor": 10.0, "pct_start": 0.2}]
)
def test_each_step_equals_torch_also_with_a_short_last_window(shape, accumulate):
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4, **shape)], accumulate_grad_batches=accumulate).fit(module, loader(48))
    total = 3 * math.ceil(6 / accumulate)
    shape = {"anneal_strategy": shape.get("anneal", "cos")} | {k: v for k, v in shape.items() if k != "anneal"}
    np.testing.assert_allclose(read(module), oracle(total, **shape), rtol=1e-9)


def test_adam_cycles_its_first_beta_and_keeps_the_second():
    module = Classifier(optimizer="adam")
    trainer(callbacks=[OneCycleMomentum(0.4)]).fit(module, loader())
    np.testing.assert_allclose(read(module, "betas"), oracle(12), rtol=1e-9)
    assert {step[0]["betas"][1] for step in module.values} == {0.999}


def fp16():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_step_that_the_grad_scaler_skips_moves_nothing():
    module = SometimesInfinite(bad={0, 5, 6})
    callback = OneCycleMomentum(0.4, total_steps=12)
    trainer(callbacks=[callback], plugins=[fp16()]).fit(module, loader())
    assert callback.steps_done == [9]
    np.testing.assert_allclose(read(module), oracle(12)[:9], rtol=1e-9)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_resumed_at_any_step_goes_on_exactly(stop):
    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=[OneCycleMomentum(0.4)]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [OneCycleMomentum(0.4)])
    resume(parted, ReplayLoader(), [OneCycleMomentum(0.4)])
    np.testing.assert_allclose(read(parted), oracle(12), rtol=1e-9)
    assert_same_weights(weights(whole), weights(parted))


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


def test_a_changing_accumulation_is_counted_right():
    module = Classifier()
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), OneCycleMomentum(0.4)]
    trainer(callbacks=callbacks).fit(module, loader())
    np.testing.assert_allclose(read(module), oracle(4 + 2 + 1), rtol=1e-9)


def test_max_steps_ends_the_cycle():
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4)], max_epochs=-1, max_steps=7).fit(module, loader())
    np.testing.assert_allclose(read(module), oracle(7), rtol=1e-9)


class TwoGroups(Classifier):
    def configure_optimizers(self):
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


def test_each_group_can_have_its_own_peak():
    module = TwoGroups()
    trainer(callbacks=[OneCycleMomentum([0.1, 0.4])]).fit(module, loader())
    np.testing.assert_allclose(read(module, group=0), oracle(12, max_lr=0.1), rtol=1e-9)
    np.testing.assert_allclose(read(module, group=1), oracle(12, max_lr=0.4), rtol=1e-9)


def test_momentum_can_be_left_alone():
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4, cycle_momentum=False)]).fit(module, loader())
    assert {momentum for _, momentum in read(module)} == {0.9}
    np.testing.assert_allclose([lr for lr, _ in read(module)], [lr for lr, _ in oracle(12)], rtol=1e-9)


def test_checkpoints_hold_the_users_own_rate():
    run = trainer(callbacks=[OneCycleMomentum(0.4)], max_epochs=1)
    run.fit(Classifier(lr=0.123), loader())
    run.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.123
    assert saved["callbacks"]["OneCycleMomentum"]["steps_done"] == [4]


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class NoMomentum(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


class Manual(Classifier):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "callbacks", "arguments", "told"),
    [
        (Scheduled, [OneCycleMomentum(0.4)], {}, "the scheduler StepLR from configure_optimizers"),
        (
            Classifier,
            [OneCycleMomentum(0.4), StochasticWeightAveraging(0.1)],
            {},
            "the callback StochasticWeightAveraging",
        ),
        (Classifier, [OneCycleMomentum([0.4, 0.1])], {}, "has 2 values, but SGD has 1 parameter groups"),
        (NoMomentum, [OneCycleMomentum(0.4)], {}, "but Adagrad has none, only .* Use `cycle_momentum=False`"),
        (Classifier, [OneCycleMomentum(0.4)], {"max_epochs": -1}, "Give `total_steps=`"),
        (Manual, [OneCycleMomentum(0.4)], {}, "Give `total_steps=`"),
    ],
)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_what_cannot_work_is_refused_at_fit_start_by_name(module, callbacks, arguments, told):
    module = module()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=callbacks, **arguments).fit(module, loader())
    assert not module.losses


def test_manual_optimization_works_with_a_given_length():
    module = Manual()
    trainer(callbacks=[OneCycleMomentum(0.4, total_steps=12)]).fit(module, loader())
    np.testing.assert_allclose(read(module), oracle(12), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_lr": 0.0}, "`max_lr` to be a number above 0, but got 0.0"),
        ({"max_lr": float("nan")}, "`max_lr`"),
        ({"max_lr": []}, "`max_lr`"),
        ({"max_lr": [0.1, -1.0]}, "`max_lr`"),
        ({"total_steps": 0}, "`total_steps` to be a whole number of 1 or more, or None, but got 0"),
        ({"pct_start": 1.0}, "`pct_start`"),
        ({"pct_start": 0.6, "three_phase": True}, r"`pct_start` to be a number in \(0, 0.5\], but got 0.6"),
        ({"anneal": "cosine"}, "`anneal` to be 'cos' or 'linear', but got 'cosine'"),
        ({"div_factor": 0.0}, "`div_factor`"),
        ({"final_div_factor": float("nan")}, "`final_div_factor`"),
        ({"base_momentum": 1.0}, "`base_momentum`"),
        ({"max_momentum": -0.1}, "`max_momentum`"),
        ({"optimizer": -1}, "`optimizer` to be a whole number of 0 or more, or None, but got -1"),
        ({"on_resume": "stop"}, "`on_resume` to be 'stretch' or 'extend', but got 'stop'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        OneCycleMomentum(**{"max_lr": 0.1, **arguments})


class Adversaries(Manual):
    """Two optimizers, the second of which steps on every third batch only."""

    def configure_optimizers(self):
        self.rates = ([], [])
        made = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.6) for part in (self.head, self.backbone)]
        for optimizer, rates in zip(made, self.rates, strict=True):
            optimizer.register_step_pre_hook(
                lambda o, *_, rates=rates: rates.append((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]))
            )
        return made

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(Classifier.training_step(self, batch, batch_idx))
        first.step()
        first.zero_grad()
        if batch_idx % 3 == 2:
            second.step()
            second.zero_grad()


def test_each_optimizer_may_have_a_cycle_of_its_own():
    module = Adversaries()
    tricks = [OneCycleMomentum(0.4, total_steps=12, optimizer=0), OneCycleMomentum(0.1, total_steps=4, optimizer=1)]
    trainer(callbacks=tricks, max_epochs=2).fit(module, loader(48))
    np.testing.assert_allclose(module.rates[0], oracle(12), rtol=1e-9)
    np.testing.assert_allclose(module.rates[1], oracle(4, max_lr=0.1), rtol=1e-9)


def test_an_optimizer_may_be_left_alone():
    module = Adversaries()
    trainer(callbacks=[OneCycleMomentum(0.4, total_steps=4, optimizer=1)], max_epochs=2).fit(module, loader(48))
    assert module.rates[0] == [(0.7, 0.6)] * 12
    np.testing.assert_allclose(module.rates[1], oracle(4), rtol=1e-9)


def test_an_optimizer_that_is_not_there_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"OneCycleMomentum\(optimizer=1\) counts from 0, but .* 1 optim"
    ):
        trainer(callbacks=[OneCycleMomentum(0.4, optimizer=1)]).fit(Classifier(), loader())


@pytest.mark.parametrize(("epochs", "total"), [(4, 16), (2, 8)])
def test_extended_it_goes_on_from_where_it_stood_and_ends_at_the_new_total(epochs, total):
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 5, [OneCycleMomentum(0.4)])
    module.values.clear()
    with pytest.warns(UserWarning, match=f"had 12 optimizer steps, this one has {total}; the curve goes on from where"):
        resume(module, ReplayLoader(), [OneCycleMomentum(0.4, on_resume="extend")], max_epochs=epochs)
    positions = [5 + t * (11 - 5) / (total - 1 - 5) for t in range(total - 5)]
    np.testing.assert_allclose(read(module), [one_cycle(p, 12, max_lr=0.4) for p in positions], rtol=1e-9)
    assert read(module)[0] == pytest.approx(oracle(12)[5])
    assert read(module)[-1] == pytest.approx(oracle(12)[-1])


@pytest.mark.parametrize("max_lr", [0.4, [0.4]])
def test_a_group_that_appears_later_keeps_its_ratio_and_gets_the_momentum(max_lr):
    module = Joins()
    trainer(callbacks=[OneCycleMomentum(max_lr)]).fit(module, loader())
    expected = oracle(12)
    np.testing.assert_allclose(read(module), expected, rtol=1e-9)
    later = [(step[1]["lr"], step[1]["momentum"]) for step in module.values[4:]]
    np.testing.assert_allclose(later, [(lr / 4, momentum) for lr, momentum in expected[4:]], rtol=1e-9)


def test_a_run_of_one_step_stands_at_the_end_of_the_cycle():
    module = Classifier()
    trainer(callbacks=[OneCycleMomentum(0.4)], max_steps=1).fit(module, loader())
    np.testing.assert_allclose(read(module), [one_cycle(0, 1, max_lr=0.4)], rtol=1e-9)


def test_it_pickles_with_its_count():
    callback = OneCycleMomentum(0.4)
    trainer(callbacks=[callback]).fit(Classifier(), loader())
    assert pickle.loads(pickle.dumps(callback)).steps_done == [12]


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
    monkeypatch.setattr("lightning_speedups.callbacks.one_cycle_momentum.run_range_test", None)
    resume(parted, ReplayLoader(), [auto()])
    assert_same_weights(weights(whole), weights(parted))


def test_auto_searches_anew_in_another_fit():
    callback = auto()
    trainer(callbacks=[callback]).fit(Classifier(), loader())
    first = callback.found_lr
    trainer(callbacks=[callback]).fit(Classifier(optimizer="adam"), loader())
    assert callback.found_lr != first


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
