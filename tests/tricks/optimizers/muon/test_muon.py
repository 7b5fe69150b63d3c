"""Muon as an optimizer of modules: its groups, its state, its launches; in fits, resumed, scaled, driven by schedules."""

import copy
import math
from typing import ClassVar

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_speedups import FreezeBackboneFinetune, LRCurve, Muon, MuonMixin, OneCycleMomentum
from lightning_speedups.tricks.optimizers.muon.muon import PARTS
from zoo import (
    STOPS,
    Classifier,
    Memory,
    ReplayLoader,
    SometimesInfinite,
    assert_same_weights,
    fit_interrupted,
    give_gradients,
    loader,
    resume,
    scaled,
    trainer,
    twins,
    weights,
)


class MuonClassifier(Classifier):
    """Its filters are one matrix."""

    def __init__(self, criterion=None, lr=0.05, **options):
        super().__init__(criterion, lr)
        self.options = options

    def configure_optimizers(self):
        optimizer = Muon(Muon.groups(self, self.lr, weight_decay=0.01), **self.options)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


def EXAMPLE():
    Muon([nn.Parameter(torch.ones(2, 2))], lr=0.05)
    return {"module": MuonClassifier}


# ---- the optimizer


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight])

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert not torch.equal(weight, torch.ones(2, 2))


def test_state_and_settings_go_through_a_state_dict_and_a_copy():
    params, others = twins([(4, 3), (6,), (5, 2)])
    rules = ("muon", "sgd", "adamw")

    def made(side):
        return Muon([{"params": [p], "rule": rule, "lr": 0.1} for p, rule in zip(side, rules, strict=True)], steps=3)

    one = made(params)
    give_gradients(0, params)
    one.step()
    for mine, other in zip(params, others, strict=True):
        other.data.copy_(mine.data)
    other = Muon([{"params": [p], "rule": rule} for p, rule in zip(others, rules, strict=True)])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.param_groups[0]["steps"] == 3
    third = copy.deepcopy(other)
    copied = [p for group in third.param_groups for p in group["params"]]
    for step in (1, 2):
        give_gradients(step, params, others, copied)
        for optimizer in (one, other, third):
            optimizer.step()
    for sides in zip(params, others, copied, strict=True):
        assert torch.equal(sides[0], sides[1])
        assert torch.equal(sides[0], sides[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1}, "Expected `lr` to be a number of 0 or more, but got -1"),
        ({"momentum": 1}, r"Expected `momentum` to be a number in \[0, 1\), but got 1"),
        ({"steps": 6}, r"Expected `steps` to be a whole number in \[1, 5\], but got 6"),
        ({"scale": "none"}, "Expected `scale` to be 'original' or 'match_rms_adamw', but got 'none'"),
        ({"weight_decay": -1}, "Expected `weight_decay`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **arguments)
    with pytest.raises(ValueError, match="Expected `rule` to be 'muon', 'sgd' or 'adamw', but got 'lion'"):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "rule": "lion"}])
    with pytest.raises(ValueError, match=r"two dimensions or more, but got one of shape \(2,\)\. `Muon\.groups"):
        Muon(nn.Linear(2, 2).parameters())


# ---- the groups


def test_groups_have_rules_rates_and_decay_of_their_own():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2)
    )  # fmt: skip
    groups = Muon.groups(net, 0.24, rest_lr=0.5, head_lr=0.1, norm_bias_factor=64, weight_decay=0.01)
    found = {g["name"]: (g["rule"], g["lr"], g["weight_decay"], {tuple(p.shape) for p in g["params"]}) for g in groups}
    assert found == {
        "muon": ("muon", 0.24, 0.01, {(8, 3, 3, 3), (4, 8)}),
        "head": ("sgd", 0.1, 0.01, {(2, 4)}),
        "head biases": ("sgd", 0.1, 0.0, {(2,)}),
        "depthwise filters": ("sgd", 0.5, 0.01, {(8, 1, 3, 3)}),
        "norm biases": ("sgd", 32.0, 0.0, {(8,)}),
        "norms, biases and gains": ("sgd", 0.5, 0.0, {(8,), (4,)}),
    }
    by_adamw = Muon(Muon.groups(net, rest="adamw", rest_lr=1e-3)).param_groups
    assert [("betas" in group, "momentum" in group) for group in by_adamw] == [(False, True)] + [(True, False)] * 5
    assert {len(PARTS)} == {len({name for name, _, _ in PARTS})}


def test_frozen_parameters_are_in_the_groups_and_one_that_cannot_be_is_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in Muon.groups(net)) == 4
    with pytest.raises(ValueError, match=r"but got '0\.weight', one of torch\.complex64"):
        Muon.groups(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="Expected `norm_bias_factor` to be a number above 0"):
        Muon.groups(net, norm_bias_factor=0)
    with pytest.raises(ValueError, match="Expected `rest` to be 'sgd' or 'adamw'"):
        Muon.groups(net, rest="lion")


# ---- launches


BOOKKEEPING = {"as_strided", "view", "_unsafe_view", "_reshape_alias", "resolve_conj", "empty", "empty_like", "empty_strided", "resize_",
               "result_type", "lift_fresh", "to", "_local_scalar_dense"}  # fmt: skip
WHOLE = ("aten::_foreach", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def launches(optimizer):
    """Operators of a step, views apart; one for a list of tensors is one launch on a GPU, though a CPU goes through it."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        optimizer.step()

    def count(event):
        if event.name.startswith(WHOLE):
            return 1
        is_one = event.name.startswith("aten::") and event.name.removeprefix("aten::") not in BOOKKEEPING
        return sum(map(count, event.cpu_children)) if event.cpu_children else is_one

    return sum(count(event) for event in found.events() if event.cpu_parent is None)


def test_all_matrices_of_one_shape_go_through_at_once():
    net = timm.create_model("vit_tiny_patch16_224")
    groups = [group for group in Muon.groups(net) if group["rule"] == "muon"]
    (params,) = (group["params"] for group in groups)
    blocks = [p for p in params if p.ndim == 2]
    assert (len(blocks), len({p.shape for p in blocks})) == (48, 4)
    for p in blocks:
        p.grad = torch.randn_like(p)
    ours, timms = Muon(blocks), timm.optim.Muon([{"params": blocks, "use_muon": True}], lr=0.02, nesterov=True)
    for optimizer in (ours, timms):
        optimizer.step()
    assert 6 * launches(ours) <= launches(timms)


# ---- in fits


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_ends_with_the_same_bits(stop):
    whole, parted = MuonClassifier(), MuonClassifier()
    parted.load_state_dict(whole.state_dict())
    trainer().fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [])
    resume(parted, ReplayLoader(), [])
    assert_same_weights(weights(whole), weights(parted))


class SometimesInfiniteMuon(SometimesInfinite):
    def configure_optimizers(self):
        return Muon(Muon.groups(self, 0.05))


def test_steps_that_the_scaler_skips_are_skipped():
    skipping, plain = SometimesInfiniteMuon({1, 2}), SometimesInfiniteMuon(())
    plain.load_state_dict(skipping.state_dict())
    batches = list(loader())
    trainer(plugins=[scaled()], max_epochs=1).fit(skipping, loader())
    trainer(plugins=[scaled()], max_epochs=1).fit(plain, torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(*batches[i]) for i in (0, 3)]), batch_size=8))  # fmt: skip
    for name, value in weights(plain).items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(weights(skipping)[name], value, rtol=2e-2, atol=2e-3)


def test_frozen_parameters_rest_until_they_thaw():
    module = MuonClassifier(normalized=True)
    start = weights(module)
    trainer(callbacks=[FreezeBackboneFinetune("backbone", unfreeze_at_epoch=None)], max_epochs=2).fit(module, loader())
    assert torch.equal(weights(module)["backbone.0.weight"], start["backbone.0.weight"])
    assert not torch.equal(weights(module)["head.weight"], start["head.weight"])
    trainer(callbacks=[FreezeBackboneFinetune("backbone", unfreeze_at_epoch=1)], max_epochs=2).fit(module, loader())
    assert not torch.equal(weights(module)["backbone.0.weight"], start["backbone.0.weight"])


@pytest.mark.parametrize("rest", ["sgd", "adamw"])
def test_schedules_drive_rates_and_momentum_of_all_groups(rest):
    class Net(MuonClassifier):
        def configure_optimizers(self):
            optimizer = Muon(Muon.groups(self, 0.1, rest=rest, rest_lr=0.01))
            optimizer.register_step_pre_hook(self._note)
            return optimizer

    module = Net()
    trainer(callbacks=[LRCurve("linear")]).fit(module, loader())
    for g, base in enumerate([0.1, 0.01]):
        seen = [step[g]["lr"] for step in module.values]
        assert seen[0] == pytest.approx(base)
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] < 0.2 * base
    module = Net()
    trainer(callbacks=[OneCycleMomentum([0.4, *[0.04] * (len(Muon.groups(module)) - 1)])]).fit(module, loader())
    momenta = [[g["betas"][0] if "betas" in g else g["momentum"] for g in step] for step in module.values]
    assert momenta[0] == pytest.approx([0.95] * len(momenta[0]))
    assert min(min(step) for step in momenta) == pytest.approx(0.85, abs=0.01)


def test_a_monitor_shows_the_groups_by_their_names():
    logger = Memory()
    module = MuonClassifier()
    trainer(callbacks=[LearningRateMonitor("step", log_momentum=True)], logger=logger, log_every_n_steps=1).fit(
        module, loader()
    )
    assert set(logger["lr-Muon/muon"]) == {0.05}
    assert set(logger["lr-Muon/norm biases-momentum"]) == {0.9}


class Mixed(MuonMixin, Classifier):
    muon_options: ClassVar = {"lr": 0.24, "rest_lr": 0.5, "momentum": 0.6, "steps": 3, "normalized": True}


def test_the_mixin_configures_what_its_options_say():
    module = Mixed()
    optimizer = module.configure_optimizers()
    assert {type(optimizer), type(super(Mixed, module).configure_optimizers())} == {Muon}
    first, *others = optimizer.param_groups
    shown = {key: value for key, value in first.items() if key not in ("params", "weight_decay", "scale", "nesterov")}
    assert shown == {"name": "muon", "rule": "muon", "lr": 0.24, "momentum": 0.6, "steps": 3, "normalized": True}
    assert {group["lr"] for group in others} == {0.5}
    trainer(max_epochs=1).fit(module, loader())
    filters = module.backbone[0].weight
    assert filters.norm().item() == pytest.approx(math.sqrt(len(filters)), rel=0.3)
    module.muon_options = {"rate": 1}
    with pytest.raises(TypeError, match="rate"):
        module.configure_optimizers()


def test_the_mixin_has_no_base_of_lightnings():
    assert MuonMixin.__mro__ == (MuonMixin, object)
    import pytorch_lightning

    class Net(MuonMixin, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    assert isinstance(Net().configure_optimizers(), Muon)
    assert not issubclass(Net, LightningModule)


def test_it_learns():
    torch.manual_seed(0)
    module = Mixed()
    module.muon_options = {"lr": 0.05, "rest_lr": 0.05}
    trainer(max_epochs=20).fit(module, ReplayLoader())
    inputs, labels = next(iter(loader()))
    assert F.cross_entropy(module.eval().head(module.backbone(inputs)), labels) < 0.9 * math.log(4)
