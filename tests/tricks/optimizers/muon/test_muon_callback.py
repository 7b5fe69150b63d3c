"""Muon in place of a module's own optimizer: as if the module configured it, with its schedulers, other tricks and resume."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from lightning_speedups import (
    FreezeBackboneFinetune,
    FreezeProgressively,
    LRCurve,
    Muon,
    MuonCallback,
    OneCycleMomentum,
    WarmupLRScaler,
)
from lightning_speedups.tricks.optimizers.muon.rules import momentum_of
from zoo import (
    STOPS,
    Classifier,
    Manual,
    ReplayLoader,
    Timm,
    TwoGroups,
    Wrapper,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scaled,
    scheduled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [MuonCallback(lr=0.05)]}


def fitted(module, *callbacks, **arguments):
    run = trainer(callbacks=list(callbacks), **arguments)
    run.fit(module, loader(), loader())
    return run


def pair(make=Classifier, **arguments):
    one, other = make(**arguments), make(**arguments)
    other.load_state_dict(one.state_dict())
    return one, other


# ---- as a module that configures Muon itself


def test_with_a_rate_it_trains_as_a_module_with_muons_groups_does():
    module, by_itself = pair()

    def configure_optimizers():
        groups = Muon.groups(
            by_itself, 0.2, rest_lr=0.1, head_lr=0.03, norm_bias_factor=4, weight_decay=0.002,
        )  # fmt: skip
        for group in groups[1:]:
            group["nesterov"] = False
        return Muon(groups, momentum=0.6, steps=3, normalized=True)

    by_itself.configure_optimizers = configure_optimizers
    fitted(by_itself)
    callback = MuonCallback(0.2, 0.1, 0.03, 4, momentum=0.6, weight_decay=0.002, steps=3, normalized=True)
    run = fitted(module, callback)
    assert_same_weights(weights(module), weights(by_itself))
    (optimizer,) = run.optimizers
    assert type(optimizer) is type(module.optimizers().optimizer) is Muon


def test_without_a_rate_matrices_move_as_far_as_adamws_and_the_rest_is_adamws_to_the_bit():
    module, by_itself = pair(optimizer="adam", lr=1e-3)
    by_itself.configure_optimizers = lambda: Muon(
        [
            {
                "params": [p for p in by_itself.parameters() if p is not by_itself.backbone[0].weight],
                "rule": "adamw",
                "weight_decay": 0.1,
            },
            {"params": [by_itself.backbone[0].weight], "scale": "match_rms_adamw", "weight_decay": 0.1},
        ],
        lr=1e-3,
    )
    run = fitted(module, MuonCallback())
    fitted(by_itself)
    assert_same_weights(weights(module), weights(by_itself))
    rest, muon = run.optimizers[0].param_groups
    assert (rest["name"], rest["rule"], rest["betas"], rest["eps"]) == ("pg1", "adamw", (0.9, 0.999), 1e-8)
    assert (muon["name"], muon["rule"], muon["betas"], muon["lr"]) == ("pg1-muon", "muon", (0.95, 0.999), 1e-3)


def test_groups_and_rates_of_the_module_are_kept_one_by_one():
    module = Classifier(optimizer="adam")

    def configure_optimizers():
        parts = [{"params": module.backbone.named_parameters(), "lr": 1e-3, "name": "backbone", "weight_decay": 0.0}]
        return torch.optim.Adam([*parts, {"params": module.head.named_parameters()}], lr=1e-2, betas=(0.8, 0.9))

    module.configure_optimizers = configure_optimizers
    groups = fitted(module, MuonCallback(), max_epochs=1).optimizers[0].param_groups
    assert [(g["name"], g["rule"], g["lr"], g["betas"], len(g["params"])) for g in groups] == [
        ("backbone", "adamw", 1e-3, (0.8, 0.9), 3),
        ("pg2", "adamw", 1e-2, (0.8, 0.9), 2),
        ("backbone-muon", "muon", 1e-3, (0.95, 0.9), 1),
    ]
    assert not groups[0]["decoupled_weight_decay"]


def test_what_the_modules_optimizer_leaves_out_stays_out():
    module = Classifier()
    start = weights(module)
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), 0.1)
    fitted(module, MuonCallback(lr=0.1), max_epochs=1)
    assert torch.equal(weights(module)["backbone.0.weight"], start["backbone.0.weight"])
    assert not torch.equal(weights(module)["head.weight"], start["head.weight"])


# ---- another rule for the rest than the module's


def test_sgd_for_the_rest_of_a_module_with_adamw_is_torchs_nesterov_sgd_to_the_bit():
    module, by_itself = pair(optimizer="adam")
    filters = by_itself.backbone[0].weight
    by_itself.configure_optimizers = lambda: Muon(
        [
            {"params": [filters], "lr": 0.2},
            {"params": [p for p in by_itself.parameters() if p is not filters], "lr": 0.03, "rule": "sgd"},
        ]
    )
    run = fitted(module, MuonCallback(0.2, 0.03, weight_decay=0.0, rest="sgd"))
    fitted(by_itself)
    assert_same_weights(weights(module), weights(by_itself))
    _, *others = run.optimizers[0].param_groups
    assert {group["rule"] for group in others} == {"sgd"}
    other = Classifier(optimizer="adam")
    fitted(other, MuonCallback(0.2, 0.03, weight_decay=0.0))
    assert not torch.equal(weights(other)["head.weight"], weights(module)["head.weight"])


def test_the_rest_is_the_same_whatever_the_module_configures():
    plain, adam = pair(optimizer="sgd")
    adam.optimizer = "adam"
    by_momentum = {}
    for module, momentum in ((plain, 0.0), (adam, None)):
        if momentum is not None:
            module.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), 0.1, momentum=0.0)
        fitted(module, MuonCallback(0.2, 0.03, weight_decay=0.0, rest="sgd"))
        by_momentum[momentum] = weights(module)
    assert_same_weights(*by_momentum.values())


def test_adamw_for_the_rest_of_a_module_with_sgd():
    module, by_itself = pair()
    filters = by_itself.backbone[0].weight
    others = [p for p in by_itself.parameters() if p is not filters]
    by_itself.configure_optimizers = lambda: Muon(
        [{"params": [filters], "lr": 0.2}, {"params": others, "lr": 0.003, "rule": "adamw"}]
    )
    fitted(module, MuonCallback(0.2, 0.003, weight_decay=0.0, rest="adamw"))
    fitted(by_itself)
    assert_same_weights(weights(module), weights(by_itself))


def test_a_one_cycle_of_a_module_with_adamw_cycles_the_momentum_of_sgd():
    alone, module = (scheduled(lambda o: OneCycleLR(o, 0.4, total_steps=13), optimizer="adam") for _ in range(2))
    fitted(alone)
    fitted(module, MuonCallback(0.8, 0.2, rest="sgd"))
    for own, groups in zip(alone.values, module.values, strict=True):
        assert [g["rule"] for g in groups] == ["muon"] + ["sgd"] * (len(groups) - 1)
        assert all(momentum_of(g) == pytest.approx(own[0]["betas"][0]) for g in groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr": 0.1, "rest_lr": 0.1, "rest": "adam"},
            r"Expected `rest` to be 'sgd' or 'adamw', or None, but got 'adam'",
        ),
        ({"rest": "sgd"}, r"Expected `lr` with \['rest'\]"),
        ({"lr": 0.1, "rest": "sgd"}, "Expected `rest_lr` with `rest`='sgd'"),
    ],
)
def test_a_rule_for_the_rest_needs_rates(options, message):
    with pytest.raises(ValueError, match=message):
        MuonCallback(**options)


# ---- schedulers


SCHEDULERS = {
    "steps": (lambda o: StepLR(o, 2, gamma=0.5), lambda t: 0.5 ** (t // 2)),
    "lambda": (lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), lambda t: 1 / (1 + t)),
    "sequence": (
        lambda o: SequentialLR(o, [StepLR(o, 1, gamma=0.5), StepLR(o, 1, gamma=0.1)], [4]),
        lambda t: 0.5**t if t < 4 else 0.1 ** (t - 4),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_modules_schedulers_go_on_with_all_groups(name):
    make, factor = SCHEDULERS[name]
    module = scheduled(make, lr=0.1)
    fitted(module, MuonCallback(lr=0.2))
    assert len(module.values) == 12
    for t, groups in enumerate(module.values):
        assert [g["lr"] for g in groups] == pytest.approx([0.2 * factor(t)] + [0.1 * factor(t)] * (len(groups) - 1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_one_cycle_peaks_at_the_new_rates_and_cycles_momentum(optimizer):
    alone, module = (scheduled(lambda o: OneCycleLR(o, 0.4, total_steps=13), optimizer=optimizer) for _ in range(2))
    fitted(alone)
    fitted(module, MuonCallback(lr=0.8, rest_lr=0.2))
    for own, groups in zip(alone.values, module.values, strict=True):
        rate = own[0]["lr"] / 0.4
        assert [g["lr"] for g in groups] == pytest.approx([0.8 * rate] + [0.2 * rate] * (len(groups) - 1))
        key = "betas" if optimizer == "adam" else "momentum"
        assert all(g[key] == pytest.approx(own[0][key]) for g in groups)
    split = scheduled(lambda o: OneCycleLR(o, 0.4, total_steps=13), optimizer=optimizer)
    fitted(split, MuonCallback(lr=0.8, rest_lr=0.2), FreezeBackboneFinetune("backbone.0", 0, backbone_lr_ratio=0.5))
    assert len(split.values[0]) > len(module.values[0])
    assert {round(g["lr"] / own[0]["lr"], 6) for g in split.values[-1]} == {0.5, 1.0, 0.25}
    module = scheduled(lambda o: OneCycleLR(o, 0.004, total_steps=13), optimizer="adam")
    fitted(module, MuonCallback())
    assert max(max(g["lr"] for g in groups) for groups in module.values) == pytest.approx(0.004, rel=1e-3)


def test_a_plateau_scheduler_goes_on():
    module = scheduled(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, mode="max"), "epoch", lr=0.1)
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", 1.0)
    fitted(module, MuonCallback(lr=0.2), max_epochs=4)
    assert [groups[0]["lr"] for groups in module.values[::4]] == [0.2, 0.2, 0.1, 0.05]


def test_schedulers_that_would_overwrite_the_rates_or_count_the_groups_say_so():
    module = scheduled(lambda o: CyclicLR(o, 0.01, 0.1))
    with pytest.raises(MisconfigurationException, match=r"rates that CyclicLR would overwrite\. Use `CyclicMomentum`"):
        fitted(module, MuonCallback(lr=0.2))
    inner = scheduled(lambda o: SequentialLR(o, [StepLR(o, 1), CyclicLR(o, 0.01, 0.1)], [2]))
    with pytest.raises(MisconfigurationException, match="rates that CyclicLR would overwrite"):
        fitted(inner, MuonCallback(lr=0.2))
    module = scheduled(lambda o: LambdaLR(o, [lambda t: 1.0]))
    with pytest.raises(ValueError) as error:
        fitted(module, MuonCallback(lr=0.2))
    assert "changed the parameter groups" in error.value.__notes__[0]


# ---- beside other tricks


@pytest.mark.parametrize("is_first", [True, False])
def test_a_curve_in_the_place_of_a_one_cycle_starts_from_the_new_rates_in_either_order(is_first):
    module = scheduled(lambda o: OneCycleLR(o, 0.4, total_steps=13))
    callbacks = [MuonCallback(lr=0.2, rest_lr=0.1), LRCurve("linear", replace=True)]
    fitted(module, *(callbacks if is_first else callbacks[::-1]))
    assert [group["lr"] for group in module.values[0]] == pytest.approx([0.2] + [0.1] * (len(module.values[0]) - 1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_matrices_that_come_later_follow_muon_as_the_others_do(optimizer):
    module = Classifier(optimizer=optimizer)
    late = nn.Parameter(torch.randn(4, 3))
    module.on_train_start = lambda: module.optimizers().optimizer.add_param_group({"params": [late]})
    first, *_, last = (
        fitted(module, MuonCallback(lr=0.1, momentum=0.6, steps=3), max_epochs=1).optimizers[0].param_groups
    )
    others = ("params", "name", "lr")
    assert {k: v for k, v in last.items() if k not in others} == {k: v for k, v in first.items() if k not in others}
    late.grad = torch.randn(4, 3)
    before = late.detach().clone()
    Muon.step(module.optimizers().optimizer)
    assert not torch.equal(late, before)


TRICKS = {
    "curve": lambda: LRCurve("linear"),
    "one cycle": lambda: OneCycleMomentum(0.4),
    "warmup": lambda: WarmupLRScaler(scale=4.0, warmup_steps=6),
    "freezing": lambda: FreezeBackboneFinetune("backbone", unfreeze_at_epoch=1),
    "progressive": lambda: FreezeProgressively("backbone"),
}


@pytest.mark.parametrize("lr", [0.05, None])
@pytest.mark.parametrize("name", TRICKS)
def test_other_tricks_drive_and_split_its_groups_in_either_order(name, lr):
    ends = []
    for first in (True, False):
        module = Classifier(optimizer="sgd" if lr else "adam", lr=0.01)
        module.load_state_dict(ends[0][0] if ends else module.state_dict())
        start = weights(module)
        callbacks = [MuonCallback(lr=lr), TRICKS[name]()]
        run = trainer(callbacks=callbacks if first else callbacks[::-1])
        run.fit(module, ReplayLoader())
        (optimizer,) = run.optimizers
        assert type(optimizer) is Muon
        groups = [(g.get("name"), g["rule"], len(g["params"])) for g in optimizer.param_groups]
        ends.append((start, weights(module), groups, module.values))
    assert_same_weights(ends[0][1], ends[1][1])
    assert ends[0][2:] == ends[1][2:]
    assert {g["rule"] for g in optimizer.param_groups} == {"muon", "sgd" if lr else "adamw"}
    assert not torch.equal(ends[0][0]["head.weight"], ends[0][1]["head.weight"])


@pytest.mark.parametrize("lr", [0.05, None])
@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_ends_with_the_same_bits(stop, lr):
    def make():
        return scheduled(lambda o: StepLR(o, 2, gamma=0.5), optimizer="sgd" if lr else "adam", lr=0.01)

    whole, parted = make(), make()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=[MuonCallback(lr=lr)]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [MuonCallback(lr=lr)])
    resume(parted, ReplayLoader(), [MuonCallback(lr=lr)])
    assert_same_weights(weights(whole), weights(parted))


def test_a_checkpoint_of_another_optimizer_is_refused_and_one_of_muon_needs_it():
    module = Classifier()
    fit_interrupted(module, ReplayLoader(), 1, [])
    with pytest.raises(MisconfigurationException, match="cannot go on with the optimizer in the checkpoint"):
        resume(Classifier(), ReplayLoader(), [MuonCallback(lr=0.1)])
    fit_interrupted(Classifier(), ReplayLoader(), 1, [MuonCallback(lr=0.1)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resume(Classifier(), ReplayLoader(), [])


def test_it_steps_with_a_scaler_although_the_modules_optimizer_is_fused():
    module, plain = pair()
    for one, fused in ((module, True), (plain, False)):
        one.configure_optimizers = lambda one=one, fused=fused: torch.optim.AdamW(one.parameters(), 1e-3, fused=fused)
        fitted(one, MuonCallback(), plugins=[scaled()], max_epochs=1)
    assert_same_weights(weights(module), weights(plain))


def test_a_wrapper_around_the_modules_optimizer_is_one_around_muon():
    module, wrapped = pair()
    own = wrapped.configure_optimizers
    wrapped.configure_optimizers = lambda: Wrapper(own())
    fitted(module, MuonCallback(lr=0.1))
    run = fitted(wrapped, MuonCallback(lr=0.1))
    assert type(run.optimizers[0].base) is Muon
    assert_same_weights(weights(module), weights(wrapped))


# ---- what is refused, and what is said


def refused(module, callback=None, **arguments):
    with pytest.raises(MisconfigurationException) as error:
        fitted(module, callback or MuonCallback(lr=0.1), **arguments)
    return str(error.value)


def test_optimizers_that_it_cannot_replace_are_refused_by_their_names():
    module = Classifier()
    for make, message in [
        (lambda: torch.optim.RMSprop(module.parameters()), r"found ['RMSprop'] there"),
        (lambda: torch.optim.AdamW(module.parameters(), amsgrad=True), "has no ['amsgrad'], which AdamW asks for"),
        (
            lambda: Muon(Muon.groups(module)),
            "found ['Muon'] there. Make one of these, or leave it out where the module has `Muon` or `MuonMixin`",
        ),
        (lambda: None, "there. Make one of these"),
    ]:
        module.configure_optimizers = make
        if make() is None:
            with pytest.warns(UserWarning, match="returned `None`"):
                assert message in refused(module)
        else:
            assert message in refused(module)
    made = torch.optim.SGD(module.parameters(), 0.1)
    module.configure_optimizers = lambda: made
    assert "found [] there" in refused(module)
    stranger = nn.Parameter(torch.ones(2))
    module.configure_optimizers = lambda: torch.optim.SGD([*module.parameters(), stranger], 0.1)
    assert "finds 1 parameters in the optimizer that are not the module's" in refused(module)
    assert "Give `lr`" in refused(Classifier(), MuonCallback())
    wave = Classifier(optimizer="adam")
    wave.phases = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'phases', one of torch\.complex64"):
        fitted(wave, MuonCallback())
    assert "manual optimization" in refused(Manual())
    with pytest.raises(MisconfigurationException, match=r"adds in the middle of a run\. Use `FreezeBackboneFinetune`"):
        fitted(Classifier(), MuonCallback(lr=0.1), BackboneFinetuning(1))
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy may split\. Use `strategy='ddp'`"):
        MuonCallback()._require_fit(SimpleNamespace(strategy=FSDPStrategy()), Classifier())


def test_arguments_out_of_range_or_without_a_rate_are_refused():
    for arguments, message in [
        ({"lr": -1}, "Expected `lr` to be a number of 0 or more, or None"),
        ({"steps": 0}, "Expected `steps`"),
        ({"rest_lr": 0.1}, r"Expected `lr` with \['rest_lr'\]"),
        ({"normalized": True}, r"Expected `lr` with \['normalized'\]"),
        ({"norm_bias_factor": 64}, r"Expected `lr` with \['norm_bias_factor'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            MuonCallback(**arguments)


def test_weights_that_were_trained_before_are_warned_of_but_not_those_of_a_run_that_goes_on():
    module = Classifier()
    run = trainer(callbacks=[MuonCallback(lr=0.1)], max_epochs=1)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    with pytest.warns(UserWarning, match=r"Classifier was trained before.*arXiv:2605\.10468"):
        fitted(module, MuonCallback(lr=0.1), max_epochs=1)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_networks_of_timm_train_under_it(name):
    if name not in timm.list_models():
        pytest.skip("not in this timm")
    module = Timm(name)
    run = trainer(callbacks=[MuonCallback()], max_epochs=1)
    run.fit(module, loader())
    held = {group["rule"]: {id(p) for p in group["params"]} for group in run.optimizers[0].param_groups}
    assert {id(p) for p in module.model.get_classifier().parameters()} <= held["adamw"]
    assert len(held["muon"]) >= 5


def test_the_groups_of_a_module_with_two_are_all_there():
    module = TwoGroups()
    groups = fitted(module, MuonCallback(lr=0.1), max_epochs=1).optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    assert {group["lr"] for group in groups if group["rule"] == "sgd"} == {module.configure_optimizers().defaults["lr"]}
    assert math.isclose(groups[0]["lr"], 0.1)
