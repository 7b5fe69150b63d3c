"""Layers freeze one by one, to the bit and in the right step; rates, resume and optimizer state on the way there."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_speedups import FreezeBackboneFinetune, FreezeProgressively, OneCycleMomentum, WarmupLRScaler
from lightning_speedups.core.schedules import OneCycle
from lightning_speedups.tricks.transfer.freeze_progressively import annealed, freeze_times
from zoo import (
    CLASSES,
    STOPS,
    Classifier,
    Manual,
    Memory,
    ReplayLoader,
    SometimesInfinite,
    Timm,
    TwoOptimizers,
    assert_same_weights,
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
    return {"callbacks": [FreezeProgressively("backbone", start=0.4)]}


NORMS = {
    "batch": partial(nn.BatchNorm2d, 4),
    "group": partial(nn.GroupNorm, 2, 4),
    "layer": partial(nn.LayerNorm, [4, 8, 8]),
    "instance": partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True),
}


class Deep(Classifier):
    """Four layers and a head; notes in each batch how many are frozen, and every bit before it."""

    def __init__(self, norm="batch", **arguments):
        super().__init__(**arguments)
        torch.manual_seed(3)
        self.backbone = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4 if i else 2, 4, 3, padding=1), NORMS[norm](), nn.ReLU()) for i in range(4)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(4, CLASSES)
        self.frozen, self.bits = [], []

    def training_step(self, batch, batch_idx):
        self.train()  # which must not wake a norm
        layers = self.backbone[:4]
        self.bits.append([weights(layer) for layer in layers])
        active = [all(p.requires_grad for p in layer.parameters()) for layer in layers]
        state = self.trainer.optimizers[0].state
        assert not any(p in state for p in self.backbone.parameters() if not p.requires_grad)
        features, reached = batch[0], []
        for layer, is_active in zip(layers, active, strict=True):
            features = layer(features)
            reached.append(features.requires_grad)
            assert all(norm.training == is_active for norm in layer if isinstance(norm, nn.BatchNorm2d))
        assert reached == active == sorted(active)
        self.frozen.append(4 - sum(active))
        loss = F.cross_entropy(self.head(self.backbone[4](features)), batch[1])
        self.losses.append(loss.item())
        return loss


def fit(module, *callbacks, data=None, **arguments):
    done = trainer(callbacks=list(callbacks), **arguments)
    done.fit(module, ReplayLoader() if data is None else data)
    return done


def rates(module):
    """The head's rate in each step, then the layers'."""
    return np.array([[group["lr"] for group in step] for step in module.values])


def cosine(step, end):
    """As numpy has it."""
    return (np.cos(np.linspace(0, np.pi, end + 1)) / 2 + 0.5)[min(step, end)]


@given(st.integers(2, 20), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_times_are_evenly_spaced_before_they_are_raised_to_the_power(layers, start, part, power):
    until = start + (1 - start) * part
    expected = np.linspace(start ** (1 / power), until ** (1 / power), layers) ** power
    np.testing.assert_allclose(freeze_times(layers, start, until, power), expected, rtol=1e-9)


def test_cubed_times_are_freezeouts():
    expected = [0.8**3, 0.85**3, 0.9**3, 0.95**3, 1.0]  # from its default of 0.8, before cubing, in equal steps
    np.testing.assert_allclose(freeze_times(5, 0.8**3, 1.0, power=3), expected)
    assert freeze_times(1, 0.3, 1.0) == (0.3,)


@pytest.mark.parametrize("end", [1, 2, 7])
def test_the_factor_is_torchs_cosine(end):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, end)
    for step in range(end + 1):
        assert annealed(step, end) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert annealed(end + 5, end) == 0.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("norm", NORMS)
def test_layers_freeze_one_by_one_from_the_input_and_keep_every_bit(norm, optimizer):
    module = Deep(norm, optimizer=optimizer)
    fit(module, FreezeProgressively(start=0.25), max_epochs=4)
    # Of 16 steps: the first at 4, then every 4; the last at 16, so never.
    assert module.frozen == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    end = [weights(layer) for layer in module.backbone[:4]]
    for i, at in enumerate((4, 8, 12)):
        for step in range(at, 16):
            assert_same_weights(module.bits[step][i], end[i])
        for before, after in zip(module.bits[: at - 1], module.bits[1:at], strict=True):
            moving = {n for n in end[i] if not n.endswith(("0.bias", "tracked"))}  # norms take the biases away
            assert not any(torch.equal(before[i][n], after[i][n]) for n in moving)
    assert not torch.equal(module.bits[-1][3]["0.weight"], end[3]["0.weight"])


@pytest.mark.parametrize(
    ("arguments", "steps", "expected"),
    [
        ({"start": 0.5, "until": 0.5}, 8, [0] * 4 + [4] * 4),
        ({"start": 0.5, "until": 0.8}, 10, [0] * 5 + [1, 2, 3, 4, 4]),
        ({"start": 0.125, "power": 3.0}, 12, [0] * 2 + [1] * 2 + [2] * 3 + [3] * 5),  # at 1.5, 3.56, 6.95 and 12 steps
        ({"start": 0.5, "share": 0.5}, 8, [0] * 4 + [1] * 4),
        ({"start": 0.5, "share": 0.5, "until": 0.75}, 8, [0] * 4 + [1] * 2 + [2] * 2),
        ({"start": 0.5, "share": 0.01}, 8, [0] * 4 + [1] * 4),
        ({"start": 0.25, "total_steps": 16}, 8, [0] * 4 + [1] * 4),
        ({"start": 0.01, "until": 0.01}, 3, [0, 4, 4]),  # the first step trains all
        ({"backbone": lambda m: [m.backbone[0], m.backbone[1]], "until": 0.75}, 8, [0] * 4 + [1] * 2 + [2] * 2),
    ],
)
def test_when_layers_freeze(arguments, steps, expected):
    module = Deep()
    fit(module, FreezeProgressively(**arguments), max_steps=steps, max_epochs=-1)
    assert module.frozen == expected


def test_it_happens_within_an_epoch_also_with_accumulation():
    module = Deep()
    fit(module, FreezeProgressively(), data=ReplayLoader(12), max_epochs=1, accumulate_grad_batches=3)
    assert module.frozen == [0] * 6 + [1] * 3 + [3] * 3  # layers at 2, 2.67, 3.33 and 4 of 4 steps


def test_accumulation_that_changes_is_counted():
    module = Deep()
    scheduler = GradientAccumulationScheduler({0: 4, 1: 1})
    fit(module, FreezeProgressively(start=0.6, until=0.6), scheduler, max_epochs=2)
    assert module.frozen == [0] * 4 + [0] * 2 + [4] * 2  # one step, then four


@pytest.mark.parametrize(("anneal", "scale_lr"), [(True, False), (True, True), (False, False)])
def test_rates_come_down_along_their_own_cosines(anneal, scale_lr):
    module = Deep(lr=0.2)
    fit(module, FreezeProgressively(start=0.25, anneal=anneal, scale_lr=scale_lr), max_epochs=4)
    assert (rates(module)[:, 0] == 0.2).all()
    for layer, end in enumerate((4, 8, 12, 16)):
        curve = [(cosine(step, end) if anneal else 1.0) if step < end else 0.0 for step in range(16)]
        scale = 16 / end if scale_lr else 1.0
        np.testing.assert_allclose(rates(module)[:, 1 + layer], 0.2 * scale * np.array(curve), rtol=1e-12, atol=1e-16)


def test_scaled_all_layers_move_as_far_in_all():
    module = Deep(lr=0.1)
    fit(module, FreezeProgressively(scale_lr=True), data=ReplayLoader(100, 1), max_epochs=1)
    np.testing.assert_allclose(rates(module)[:, 1:].sum(0), 0.1 * 50, rtol=0.03)


def test_the_factor_stays_on_top_of_schedulers_and_of_the_other_tricks():
    factors = np.array([[1.0, *(cosine(step, end) for end in (3, 6, 9, 12))] for step in range(12)])
    module = scheduled(lambda optimizer: ExponentialLR(optimizer, 0.9), kind=Deep, lr=0.2)
    fit(module, FreezeProgressively(start=0.25))
    np.testing.assert_allclose(rates(module), 0.2 * 0.9 ** np.arange(12)[:, None] * factors, atol=1e-15)
    module = Deep()
    fit(module, FreezeProgressively(start=0.25), OneCycleMomentum(0.4), WarmupLRScaler(scale=2.0, warmup_steps=3))
    head = np.array([(1 + min(step, 3) / 3) * OneCycle().at(step, 12, max_lr=0.4)[0] for step in range(12)])
    np.testing.assert_allclose(rates(module), head[:, None] * factors, atol=1e-15)


def test_layers_that_never_freeze_stay_with_the_head_at_its_rate():
    module = Deep(lr=0.2)
    done = fit(module, FreezeProgressively(share=0.5))
    assert rates(module).shape == (12, 3)
    kept = {id(parameter) for parameter in done.optimizers[0].param_groups[0]["params"]}
    assert kept == {id(p) for part in (module.backbone[2:], module.head) for p in part.parameters()}


def test_monitors_see_the_rates_and_the_optimizer_keeps_its_own():
    module, memory = Deep(lr=0.2), Memory()
    monitor = LearningRateMonitor("step")
    done = fit(module, FreezeProgressively(start=0.25), monitor, logger=memory, log_every_n_steps=1)
    seen = [cosine(step, 3) for step in range(12)]
    np.testing.assert_allclose(memory["lr-SGD/pg2"], 0.2 * np.array(seen), atol=1e-15)
    assert {group["lr"] for group in done.optimizers[0].param_groups} == {0.2}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", STOPS)
def test_resumed_it_equals_the_whole_run(stop, optimizer):
    whole, parted = Deep(optimizer=optimizer), Deep(optimizer=optimizer)
    make = partial(FreezeProgressively, start=0.25, until=0.9, power=2.0)
    fit(whole, make())
    fit_interrupted(parted, ReplayLoader(), stop, [make()])
    resume(parted, ReplayLoader(), [make()])
    assert_same_weights(weights(whole), weights(parted))
    assert parted.frozen == whole.frozen


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_from_the_end_of_an_epoch_it_equals_the_whole_run(epoch):
    whole, parted = Deep(), Deep()
    make = partial(FreezeProgressively, start=0.33)
    fit(whole, make())
    fit_interrupted(parted, ReplayLoader(), 4 * epoch, [make()], epoch_end=True)
    resume(parted, ReplayLoader(), [make()])
    assert_same_weights(weights(whole), weights(parted))


def test_resumed_with_another_length_the_times_are_stretched_over_it():
    module = Deep()
    fit_interrupted(module, ReplayLoader(), 10, [FreezeProgressively(start=0.25)])
    assert module.frozen == [0] * 3 + [1] * 3 + [2] * 3 + [3]
    module = Deep()
    resume(module, ReplayLoader(), [FreezeProgressively(start=0.25)], max_epochs=6)
    assert module.frozen == [1] * 2 + [2] * 6 + [3] * 6  # after ten steps; at 6, 12 and 18 of 24


def test_it_tells_what_it_froze(caplog):
    fit(Deep(), FreezeProgressively(start=0.5, until=0.8, share=0.5))
    told = [record.getMessage() for record in caplog.records if "FreezeProgressively" in record.getMessage()]
    assert told == [
        "FreezeProgressively: after 6 optimizer steps 1 of 2 layers are frozen, up to '0': 84 parameters.",
        "FreezeProgressively: after 10 optimizer steps 2 of 2 layers are frozen, up to '1': 240 parameters.",
    ]


def test_steps_that_a_scaler_skips_do_not_count():
    class Skips(SometimesInfinite):
        def training_step(self, batch, batch_idx):
            self.seen_frozen = [*getattr(self, "seen_frozen", []), not self.backbone[0].weight.requires_grad]
            return super().training_step(batch, batch_idx)

    module = Skips(bad={1, 2})
    fit(module, FreezeProgressively(), plugins=[scaled(2.0)])
    assert module.seen_frozen == [False] * 8 + [True] * 4


def test_validation_stays_in_eval_mode_and_sees_a_frozen_layer_stand_still():
    class Validated(Deep):
        def __init__(self):
            super().__init__()
            self.features = []

        def validation_step(self, batch, batch_idx):
            assert not any(module.training for module in self.modules())
            self.features.append(self.backbone[0](batch[0]))

    module = Validated()
    # The first layer is frozen in the middle of the second epoch; validation comes twice an epoch. Folded, a layer
    # would give the same but for rounding.
    trainer(callbacks=[FreezeProgressively(fold=False)], val_check_interval=0.5).fit(module, ReplayLoader(), loader(8))
    still = [torch.equal(one, other) for one, other in pairwise(module.features)]
    assert still == [False, False, True, True, True]


def test_a_layer_that_the_user_froze_goes_with_the_others():
    module = Classifier()
    module.backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 3), nn.Flatten()
    )
    module.head = nn.Linear(6 * 4 * 4, CLASSES)
    module.backbone[0].requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    means = []
    module.backbone[0].register_forward_hook(lambda block, *_: means.append(block[1].running_mean.clone()))
    fit(module, FreezeProgressively(until=0.5))
    assert [torch.equal(one, other) for one, other in pairwise(means)] == [False] * 5 + [True] * 6


def notes_when_it_trains(module):
    """Note in each batch whether the first layer trains."""
    module.grads = []
    module.backbone.register_forward_pre_hook(lambda part, _: module.grads.append(part[0].weight.requires_grad))
    return module


def test_manual_optimization_works_and_goes_by_batches_unless_it_tells_the_number_of_steps():
    for told in ({}, {"total_steps": 12}):
        module = notes_when_it_trains(Manual(lr=0.1))
        fit(module, FreezeProgressively(**told))
        assert module.grads == [True] * 6 + [False] * 6
        expected = 0.1 * np.array([cosine(step, 6) for step in range(12)])
        np.testing.assert_allclose(rates(module)[:, 1], expected, atol=1e-15)
    module = notes_when_it_trains(TwoOptimizers(every=2))
    fit(module, FreezeProgressively())
    assert module.grads == [True] * 6 + [False] * 6
    module = notes_when_it_trains(TwoOptimizers(every=1))
    run = trainer(callbacks=[FreezeProgressively()], max_epochs=-1, max_steps=16)
    run.fit(module, loader())
    assert module.grads == [True] * 4 + [False] * 4


@pytest.mark.parametrize("stop", [4, 9, 12])
def test_a_resumed_run_in_manual_optimization_freezes_at_the_same_batches(stop):
    whole, first, rest = (notes_when_it_trains(TwoOptimizers(every=2)) for _ in range(3))
    fit(whole, FreezeProgressively())
    fit_interrupted(first, ReplayLoader(), stop, [FreezeProgressively()])
    resume(rest, ReplayLoader(), [FreezeProgressively()])
    assert first.grads + rest.grads == whole.grads == [True] * 6 + [False] * 6
    assert first.rates[1] + rest.rates[1] == whole.rates[1]


def test_a_layer_counts_the_steps_of_its_own_optimizer():
    module = notes_when_it_trains(TwoOptimizers(every=2))
    fit(module, FreezeProgressively(total_steps=4))
    assert module.grads == [True] * 4 + [False] * 8  # the backbone's has made half of its steps


@pytest.mark.filterwarnings("ignore:Your `IterableDataset`")
def test_a_run_without_a_length_is_refused_and_max_steps_gives_one():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*images(), strict=True)

    data = torch.utils.data.DataLoader(Stream(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"Give `total_steps=`, in optimizer steps, or `Trainer\(max_s"):
        fit(Deep(), FreezeProgressively(), data=data, max_epochs=-1)
    module = Deep()
    fit(module, FreezeProgressively(until=0.5), data=data, max_epochs=-1, max_steps=6)
    assert module.frozen == [0] * 3 + [4] * 3


def test_a_run_in_which_nothing_freezes_is_warned_of():
    with pytest.warns(UserWarning, match=r"FreezeProgressively\(start=1\) freezes no layer before the end .* 12 opt"):
        fit(Deep(), FreezeProgressively(start=1.0))


@pytest.mark.parametrize(
    ("name", "first"), [("resnet10t", {"conv1", "bn1"}), ("test_vit", {"cls_token", "pos_embed", "patch_embed"})]
)
def test_a_timm_model_freezes_from_its_stem_to_its_classifier(name, first):
    module = Timm(name)
    fit(module, FreezeProgressively(None, start=0.25, until=0.75), max_steps=8, max_epochs=-1)
    names = {name for name, _ in module.model.named_parameters()}
    none, stem, everything = (names - module.trained[step] for step in (1, 2, 6))
    assert none == set()
    assert {name.split(".")[0] for name in stem} == first
    assert everything == names - module.of_classifier


def test_it_refuses_what_freezes_the_same_layers_and_goes_with_what_does_not():
    pair = [FreezeProgressively(), FreezeBackboneFinetune()]
    for tricks in (pair, pair[::-1]):
        with pytest.raises(MisconfigurationException, match="both freeze the same layers") as caught:
            fit(Deep(), *tricks)
        assert all(type(trick).__name__ in str(caught.value) for trick in tricks)
    module = Deep()
    last = FreezeBackboneFinetune(lambda m: m.backbone[3], unfreeze_at_epoch=0, backbone_lr_ratio=0.5)
    fit(module, FreezeProgressively(lambda m: m.backbone[:3], until=0.75), last)
    assert module.frozen == [0] * 6 + [1] * 2 + [2] + [3] * 3  # at 6, 7.5 and 9


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("encoder", "Deep has no such submodule"),
        (
            lambda module: module,
            "would freeze every parameter: nothing is left to train. `backbone` must not contain the head",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_fit_start(backbone, told):
    module = Deep()
    with pytest.raises(MisconfigurationException, match=told):
        fit(module, FreezeProgressively(backbone, until=0.5))
    assert module.losses == []


def test_a_module_without_a_name_for_its_backbone_keeps_its_last_layers():
    module = Deep()
    fit(module, FreezeProgressively(lambda module: [*module.backbone[:4], module.head], share=0.8, until=0.5))
    assert module.frozen == [0] * 6 + [4] * 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": ""},
        {"start": 0.0},
        {"start": 1.1},
        {"until": 0.4},
        {"until": 1.5},
        {"share": -0.1},
        {"share": 1.5},
        {"power": 0.0},
        {"scale_lr": True, "anneal": False},
        {"total_steps": 0},
        {"total_steps": 1.5},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(arguments))}` to .*, but got"):
        FreezeProgressively(**arguments)
