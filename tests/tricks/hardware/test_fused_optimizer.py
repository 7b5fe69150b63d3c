"""Fused steps end where plain ones do, also when gradients are clipped, and everything is as the module made it afterwards."""

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_speedups import ChannelsLast, FusedOptimizer
from lightning_speedups.tricks.hardware.fused_optimizer import can_fuse, set_fused
from zoo import (
    Classifier,
    Joins,
    Manual,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)

KINDS = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (Adam, {"lr": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "adagrad": (Adagrad, {"lr": 0.05}),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def EXAMPLE():
    return {"callbacks": [FusedOptimizer()]}


class Net(Classifier):
    """Its optimizer is one of torch's; notes in each step whether its groups are fused."""

    def __init__(self, name="sgd", **options):
        torch.manual_seed(4)
        super().__init__()
        self.backbone[0] = nn.Conv2d(2, 6, 3, bias=False)  # before a norm its gradient is rounding, which Adam blows up
        self.kind, self.options = KINDS[name][0], KINDS[name][1] | options

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), **self.options)
        optimizer.register_step_pre_hook(self._note)
        return optimizer

    @property
    def fused(self):
        return [[group["fused"] for group in step] for step in self.values]


def assert_close(one, other):
    for key, value in weights(other).items():
        torch.testing.assert_close(weights(one)[key], value, rtol=1e-5, atol=1e-6)


@every_kind
def test_each_step_is_fused_and_ends_where_the_plain_one_does(name):
    plain, module = Net(name), Net(name)
    trainer().fit(plain, ReplayLoader())
    trainer(callbacks=[FusedOptimizer()]).fit(module, ReplayLoader())
    assert module.fused == [[True]] * 12
    assert [step[0]["foreach"] for step in module.values] == [False] * 12
    assert_close(module, plain)


PRECISIONS = {
    "float32": lambda: {},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "scaled": lambda: {"plugins": [scaled(1.0)]},
}


@pytest.mark.parametrize("own", [None, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@every_kind
def test_clipped_gradients_give_the_weights_of_a_run_without_fused_steps(name, precision, own):
    plain, module = Net(name), Net(name, fused=own)
    for one, tricks in ((plain, []), (module, [FusedOptimizer()])):
        arguments = PRECISIONS[precision]() | {"gradient_clip_val": 0.1}
        trainer(callbacks=tricks, max_epochs=1, **arguments).fit(one, ReplayLoader())
    assert module.fused == [[True]] * 4
    assert_close(module, plain)


def test_lightning_itself_refuses_to_clip_them():
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer(precision="bf16-mixed", gradient_clip_val=0.1).fit(Net(fused=True), loader())


class ClipsItself(Net):
    def configure_gradient_clipping(self, optimizer, *_, **__):
        self.clip_gradients(optimizer, 0.1)


def test_gradients_that_the_module_itself_clips_are_those_without_the_scale():
    plain, module = Net(), ClipsItself(fused=True)
    trainer(plugins=[scaled()], gradient_clip_val=0.1, max_epochs=1).fit(plain, ReplayLoader())
    trainer(plugins=[scaled()], callbacks=[FusedOptimizer()], max_epochs=1).fit(module, ReplayLoader())
    assert_close(module, plain)


def test_a_scaler_without_clipping_leaves_the_scale_to_the_step():
    module, marks = Net(fused=True), []
    module.on_train_batch_end = lambda *_: marks.append(module.optimizers().optimizer._step_supports_amp_scaling)
    trainer(plugins=[scaled()], callbacks=[FusedOptimizer()], max_steps=2).fit(module, loader())
    assert marks == [True, True]


def states(optimizer):
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    steps = [(kept["step"].dtype, kept["step"].device) for kept in optimizer.state.values() if "step" in kept]
    return groups, steps, vars(optimizer).get("_step_supports_amp_scaling")


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("own", [None, True])
@every_kind
def test_groups_and_state_are_as_the_module_made_them_after_two_of_them(name, own, failing):
    plain, module = (
        Net(name, fused=own, foreach=None if own else True),
        Net(name, fused=own, foreach=None if own else True),
    )
    runs = [trainer(max_steps=3), trainer(callbacks=[FusedOptimizer(), FusedOptimizer()], max_steps=3)]
    runs[0].fit(plain, ReplayLoader())
    if failing:
        module.on_train_batch_end = lambda outputs, batch, batch_idx: 1 / 0 if batch_idx == 2 else None
        with pytest.raises(ZeroDivisionError):
            runs[1].fit(module, ReplayLoader())
    else:
        runs[1].fit(module, ReplayLoader())
    assert module.fused == [[True]] * 3
    assert states(runs[1].optimizers[0]) == states(runs[0].optimizers[0])


@pytest.mark.parametrize("order", [1, -1])
def test_two_of_them_leave_in_either_order(order):
    tricks, module = [FusedOptimizer(), FusedOptimizer()], Net()
    run = trainer(callbacks=tricks, max_steps=1)
    module.on_train_end = lambda: [trick.undo(run, module) for trick in tricks[::order]]
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["fused"] is None


@every_kind
def test_a_checkpoint_goes_on_without_the_trick_as_the_module_asks(name):
    whole, parted, rest = Net(name), Net(name), Net(name)
    trainer().fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 6, [FusedOptimizer()])
    (group,) = torch.load("at.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["fused"] is None
    assert group["foreach"] is None
    resume(rest, ReplayLoader(), [])
    assert set(map(tuple, rest.fused)) == {(None,)}
    assert_close(rest, whole)


@every_kind
def test_a_plain_checkpoint_goes_on_fused_and_exactly(name):
    ends = []
    for _ in range(2):
        parted, rest = Net(name), Net(name)
        fit_interrupted(parted, ReplayLoader(), 6, [])
        resume(rest, ReplayLoader(), [FusedOptimizer()])
        assert rest.fused == [[True]] * 6
        ends.append(rest)
    assert_same_weights(*map(weights, ends))
    whole = Net(name)
    trainer().fit(whole, ReplayLoader())
    assert_close(rest, whole)


@every_kind
@pytest.mark.parametrize("first", [True, False])
def test_layouts_that_a_checkpoint_brings_are_those_of_the_weights(name, first):
    whole, parted, rest = Net(name), Net(name), Net(name)
    trainer().fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 6, [FusedOptimizer(), *([ChannelsLast()] if first else [])])
    resume(rest, ReplayLoader(), [FusedOptimizer(), *([] if first else [ChannelsLast()])])
    assert_close(rest, whole)


@every_kind
def test_a_plain_checkpoint_goes_on_in_a_module_that_is_laid_by_hand(name):
    whole, parted, rest = Net(name), Net(name), Net(name).to(memory_format=torch.channels_last)
    trainer().fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 6, [])
    resume(rest, ReplayLoader(), [FusedOptimizer()])
    assert not rest.backbone[0].weight.is_contiguous()
    assert_close(rest, whole)


def test_groups_that_come_later_are_fused_from_the_next_epoch_on():
    module = Joins()
    run = trainer(callbacks=[FusedOptimizer()])
    run.fit(module, ReplayLoader())
    fused = [[group["fused"] for group in step] for step in module.values]
    assert fused == [[True]] * 4 + [[True, None]] * 4 + [[True, True]] * 4
    assert [group["fused"] for group in run.optimizers[0].param_groups] == [None, None]


def test_manual_optimization_is_fused():
    module = Manual()
    trainer(callbacks=[FusedOptimizer()], max_steps=2).fit(module, loader())
    assert [step[0]["fused"] for step in module.values] == [True, True]


class Words(Net):
    """Has an embedding with sparse gradients, in a group of its own."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.words(batch[1]).mean()

    def configure_optimizers(self):
        rest = [p for p in self.parameters() if p is not self.words.weight]
        optimizer = SGD([{"params": rest}, {"params": [self.words.weight]}], lr=0.1)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


def test_sparse_gradients_keep_their_plain_step():
    module = Words()
    trainer(callbacks=[FusedOptimizer()], max_steps=2).fit(module, loader())
    assert module.fused == [[True, None]] * 2


class Foreign(torch.optim.Optimizer):
    """Means something of its own by the word."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "fused": False})


def test_what_has_no_fused_step_is_found_and_said_in_one_line(caplog):
    gaps = nn.Parameter(torch.ones(4, 6)[:, :3])
    for kind, options, weight in ((SGD, {"differentiable": True}, nn.Parameter(torch.ones(3))), (SGD, {}, gaps),
                                  (SGD, {}, nn.Parameter(torch.ones(3, dtype=torch.complex64))), (RMSprop, {}, gaps),
                                  (SGD, {}, nn.Parameter(torch.ones(3, device="meta"))),
                                  (Foreign, {}, nn.Parameter(torch.ones(3)))):  # fmt: skip
        assert not can_fuse(kind([weight], lr=0.1, **options).param_groups[0])
    module = Classifier()
    module.configure_optimizers = lambda: RMSprop(module.parameters(), lr=0.01)
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[FusedOptimizer()], max_steps=1).fit(module, loader())
    said = [line for line in caplog.messages if "FusedOptimizer" in line]
    assert said == ["FusedOptimizer does nothing: it finds no parameters that torch steps fused in RMSprop."]


def test_the_count_of_steps_has_the_precision_that_each_way_uses(monkeypatch):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = Adam([weight])
    optimizer.step()
    group = optimizer.param_groups[0]
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    set_fused(optimizer, group, True, False)
    assert optimizer.state[weight]["step"].dtype == torch.float32
    set_fused(optimizer, group, None, None)
    assert optimizer.state[weight]["step"].dtype == torch.float64
    assert optimizer.state[weight]["step"] == 1
