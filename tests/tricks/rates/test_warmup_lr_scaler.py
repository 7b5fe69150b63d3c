"""The factor at each step of a real fit, alone and on top of schedulers, in closed form."""

import logging
import math

import numpy as np
import pytest
import torch
from curves import Curve
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_speedups import OneCycleMomentum, WarmupLRScaler
from lightning_speedups.core.schedules import OneCycle
from lightning_speedups.tricks.rates.warmup_lr_scaler import scaling_factor
from zoo import (
    STOPS,
    Classifier,
    ReplayLoader,
    SometimesInfinite,
    TwoGroups,
    TwoOptimizers,
    assert_same_weights,
    endless,
    fit_interrupted,
    images,
    loader,
    resume,
    scaled,
    scheduled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [WarmupLRScaler(base_batch_size=4, warmup_epochs=0.5)]}


def rates(module, group=0):
    return [step[group]["lr"] for step in module.values]


def factors(steps, warmup, start, full):
    return [start + (full - start) * min(t / warmup, 1) for t in range(steps)]


def scaled_up(steps, own):
    warmup = round(steps.planned[0] + 0.5 * steps.planned[1])
    return [{"lr": own["lr"] * factor} for factor in factors(steps.total, warmup, 1.0, 6.0)]


CURVES = {"scaled up": Curve(lambda: WarmupLRScaler(scale=6.0, warmup_epochs=1.5), scaled_up)}


@pytest.mark.parametrize(("accumulate", "steps", "warmup"), [(1, 18, 9), (4, 6, 3)])
def test_the_rate_ramps_from_the_unscaled_to_the_scaled_one_per_optimizer_step(accumulate, steps, warmup):
    module = Classifier(lr=0.1)
    callback = WarmupLRScaler(base_batch_size=2, warmup_epochs=1.5)
    trainer(callbacks=[callback], accumulate_grad_batches=accumulate).fit(module, loader(48))
    scale = 8 * accumulate / 2
    np.testing.assert_allclose(rates(module), 0.1 * np.array(factors(steps, warmup, 1.0, scale)), rtol=1e-9)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_on_top_of_step_lr(accumulate):
    module = scheduled(lambda optimizer: StepLR(optimizer, 2, gamma=0.5), lr=0.1)
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_steps=4)], accumulate_grad_batches=accumulate).fit(
        module, loader(48)
    )
    steps = 3 * math.ceil(6 / accumulate)
    own = np.array([0.1 * 0.5 ** (t // 2) for t in range(steps)])
    np.testing.assert_allclose(rates(module), own * factors(steps, 4, 1.0, 6.0), rtol=1e-9)


def test_on_top_of_lambda_lr_by_epoch():
    module = scheduled(lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)), "epoch", lr=0.1)
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_steps=7)]).fit(module, loader())
    own = np.array([0.1 / (1 + t // 4) for t in range(12)])
    np.testing.assert_allclose(rates(module), own * factors(12, 7, 1.0, 6.0), rtol=1e-9)


def test_on_top_of_reduce_lr_on_plateau():
    module = scheduled(
        lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0, mode="max"), "epoch", lr=0.1
    )
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", 1.0)  # never better than the first time
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_steps=7)], max_epochs=4).fit(module, loader(), loader())
    own = np.repeat([0.1, 0.1, 0.05, 0.025], 4)
    np.testing.assert_allclose(rates(module), own * factors(16, 7, 1.0, 6.0), rtol=1e-9)


def test_on_top_of_one_cycle():
    module = Classifier()
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_steps=7), OneCycleMomentum(0.4)]).fit(module, loader())
    own = np.array([OneCycle().at(t, 12, max_lr=0.4)[0] for t in range(12)])
    np.testing.assert_allclose(rates(module), own * factors(12, 7, 1.0, 6.0), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_step_that_the_grad_scaler_skips_does_not_move_the_ramp_on_top_of_a_scheduler():
    module = scheduled(lambda optimizer: StepLR(optimizer, 100), kind=SometimesInfinite, bad={1, 5, 9})
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_steps=7)], plugins=[scaled()]).fit(module, loader())
    np.testing.assert_allclose(rates(module), 0.05 * np.array(factors(9, 7, 1.0, 6.0)), rtol=1e-9)


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_goes_on_exactly_and_its_checkpoint_holds_the_schedulers_rate(stop):
    whole, parted = (scheduled(lambda optimizer: StepLR(optimizer, 3, gamma=0.5), lr=0.1) for _ in range(2))
    parted.load_state_dict(whole.state_dict())
    tricks = [WarmupLRScaler(scale=6.0, warmup_epochs=2.0)]
    trainer(callbacks=[WarmupLRScaler(scale=6.0, warmup_epochs=2.0)]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, tricks)
    saved = torch.load("at.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert saved == pytest.approx(0.1 * 0.5 ** (stop // 3), rel=1e-12)
    resume(parted, ReplayLoader(), tricks)
    assert rates(parted) == rates(whole)
    assert_same_weights(weights(whole), weights(parted))


@pytest.mark.parametrize("base", [8, 16])
def test_with_a_base_it_starts_at_the_unscaled_rate_also_where_it_scales_down(base):
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(base_batch_size=base, warmup_steps=4)]).fit(module, loader())
    np.testing.assert_allclose(rates(module), 0.1 * np.array(factors(12, 4, 1.0, 8 / base)), rtol=1e-9)


def test_no_ramp_needs_no_length():
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(scale=2.0, warmup_epochs=0)], max_epochs=1).fit(module, LOADERS["iterable"]())
    assert set(rates(module)) == {0.2}


def test_ratios_between_groups_are_kept():
    module = TwoGroups()
    trainer(callbacks=[WarmupLRScaler(scale=5.0, warmup_steps=3)]).fit(module, loader())
    np.testing.assert_allclose(rates(module, 0), 0.01 * np.array(factors(12, 3, 1.0, 5.0)), rtol=1e-9)
    np.testing.assert_allclose(rates(module, 1), 0.3 * np.array(factors(12, 3, 1.0, 5.0)), rtol=1e-9)


def test_without_a_base_it_only_warms_up_from_a_hundredth():
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(warmup_epochs=1)]).fit(module, loader())
    np.testing.assert_allclose(rates(module), 0.1 * np.array(factors(12, 4, 0.01, 1.0)), rtol=1e-9)


def test_the_start_can_be_given_and_the_ramp_left_out():
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(scale=2.0, warmup_steps=4, start_factor=0.5)]).fit(module, loader())
    np.testing.assert_allclose(rates(module), 0.1 * np.array(factors(12, 4, 0.5, 2.0)), rtol=1e-9)
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(scale=2.0, warmup_epochs=0)]).fit(module, loader())
    np.testing.assert_allclose(rates(module), [0.2] * 12, rtol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "rule", "factor"),
    [("SGD", "auto", 9.0), ("Adam", "auto", 3.0), ("AdamW", "auto", 3.0), ("Lamb", "auto", 3.0), ("Adafactor", "auto", 3.0),
     ("Lion", "auto", 9.0), ("SGD", "sqrt", 3.0), ("AdamW", "linear", 9.0)],
)  # fmt: skip
def test_the_rule_follows_the_optimizer(optimizer, rule, factor):
    assert scaling_factor(9.0, rule, optimizer) == factor


@pytest.mark.parametrize("order", [1, -1])
def test_the_factor_follows_an_accumulation_that_changes_between_epochs(order):
    module = Classifier(lr=0.1)
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), WarmupLRScaler(base_batch_size=8, warmup_epochs=0)]
    trainer(callbacks=callbacks[::order]).fit(module, loader())
    np.testing.assert_allclose(rates(module), [0.1] * 4 + [0.2] * 2 + [0.4], rtol=1e-9)


@pytest.mark.parametrize(
    ("batches", "epochs", "expected"),
    [
        ((2, 4, 6), 1, [1, 1.5, 2, 2, 2, 2]),
        ((2, 4, 6), 1.5, [1, 1 + 1 / 3, 1.5, 1.75, 2, 2]),  # 3 steps as it seems, 4 when the second epoch is there
        ((6, 4, 2), 1.5, [*(1 + t / 9 for t in range(6)), 1 + 6 / 8, 1 + 7 / 8, 2, 2]),
    ],
)
def test_the_ramp_follows_epochs_that_are_longer_or_shorter_and_never_turns_back(batches, epochs, expected):
    class Reloads(Classifier):
        def train_dataloader(self):
            return ReplayLoader(batches[self.trainer.current_epoch])

    module = Reloads()
    trick = WarmupLRScaler(scale=2.0, warmup_epochs=epochs)
    trainer(callbacks=[trick], reload_dataloaders_every_n_epochs=1).fit(module)
    np.testing.assert_allclose(rates(module)[: len(expected)], 0.05 * np.array(expected))
    assert set(rates(module)[len(expected) :]) == {0.1}


def test_several_optimizers_are_scaled_and_counted_by_themselves():
    module = TwoOptimizers(every=2, lr=(0.1, 0.01), kinds=(SGD, Adam))
    callback = WarmupLRScaler(base_batch_size=2, warmup_steps=5)
    trainer(callbacks=[callback]).fit(module, loader())
    assert callback.steps_done == [12, 6]
    np.testing.assert_allclose(module.rates[0], 0.1 * np.array(factors(12, 5, 1.0, 4.0)), rtol=1e-9)
    np.testing.assert_allclose(module.rates[1], 0.01 * np.array(factors(6, 5, 1.0, 2.0)), rtol=1e-9)


def test_it_says_in_one_line_what_it_did(caplog):
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[WarmupLRScaler(base_batch_size=2, warmup_epochs=1)], accumulate_grad_batches=2).fit(
            Classifier(), loader()
        )
    told = [record.getMessage() for record in caplog.records if "WarmupLRScaler" in record.getMessage()]
    assert told == [
        "WarmupLRScaler: learning rate × 1 → × 8 (effective batch 16, base 2) over the first 2 optimizer steps."
    ]


def test_a_ramp_longer_than_the_run_is_warned_of():
    with pytest.warns(UserWarning, match="the ramp takes 20 optimizer steps, but the run has 12"):
        trainer(callbacks=[WarmupLRScaler(base_batch_size=4)]).fit(Classifier(), loader())


LOADERS = {
    "batch_size": lambda: loader(),
    "batch_sampler": lambda: DataLoader(
        TensorDataset(*images(32)), batch_sampler=BatchSampler(SequentialSampler(range(32)), 8, False)
    ),
    "batches as samples": lambda: DataLoader(
        TensorDataset(*images(32)), sampler=BatchSampler(SequentialSampler(range(32)), 8, False), batch_size=None
    ),
    "iterable": endless,
    "own": lambda: ReplayLoader(),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_batch_size_is_read_from_the_loader(kind):
    module = Classifier(lr=0.1)
    trainer(callbacks=[WarmupLRScaler(base_batch_size=2, warmup_steps=0)], max_epochs=1).fit(module, LOADERS[kind]())
    np.testing.assert_allclose(rates(module), [0.4] * len(rates(module)), rtol=1e-9)


class NoBatchSize(list):
    """A loader that is a mere list of batches."""


@pytest.mark.parametrize(
    ("data", "arguments", "told"),
    [
        (lambda: NoBatchSize([images(8)]), {"base_batch_size": 8, "warmup_steps": 1}, "Give `scale=`"),
        (
            lambda: CombinedLoader({"a": loader(), "b": loader()}),
            {"base_batch_size": 8, "warmup_steps": 1},
            "Give `scale=`",
        ),
        (endless, {"scale": 2.0}, "Give `warmup_steps`"),
    ],
)
def test_what_it_needs_and_cannot_know_is_asked_for_at_fit_start(data, arguments, told):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[WarmupLRScaler(**arguments)]).fit(module, data())
    assert not module.losses


@pytest.mark.parametrize(
    "arguments",
    [{"base_batch_size": 0}, {"rule": "cubic"}, {"warmup_epochs": -1.0}, {"warmup_epochs": float("nan")}, {"warmup_steps": -1},
     {"start_factor": 0.0}, {"scale": 0.0}, {"scale": float("inf")}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"Expected `{name}` to be .* but got {value!r}"):
        WarmupLRScaler(**arguments)
