"""Frozen modules through passes, calls of train() and copies, and what they are afterwards."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_speedups.modules.freezing import Frozen, InEval, wholly_frozen


class Centred(nn.Module):
    """A parameter and a buffer of its own that training moves, and children."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("mean", torch.zeros(4, 1, 1))
        self.norm, self.drop = nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Dropout(0.5)

    def forward(self, inputs):
        if self.training:
            self.mean.mul_(0.9).add_(inputs.detach().mean((0, 2, 3)).view(-1, 1, 1), alpha=0.1)
        return self.drop(self.norm((inputs - self.mean) * self.scale))


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), Centred(), spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.BatchNorm2d(4, affine=False), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


@pytest.fixture
def net():
    made = model()
    made(torch.randn(5, 2, 6, 6))  # which the lazy ones wait for
    return made


def images():
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def bits(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])} == set()


def switches(net):
    return (
        {name: parameter.requires_grad for name, parameter in net.named_parameters()},
        [module.training for module in net.modules()],
        ["train" in vars(module) for module in net.modules()],
    )


def test_nothing_in_it_moves_whatever_is_called(net):
    body = net[:-1]
    before, optimizer = bits(body), torch.optim.SGD(net.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):  # momentum would go on by itself
        net(images()).sum().backward()
        optimizer.step()
    before = bits(body)
    Frozen(body.modules())
    head = bits(net[-1])
    for call in (net.train, net.eval, body.train, lambda: net.apply(lambda module: module.train()), net[3].train):
        call()
        net.train()
        net(images()).sum().backward()
        optimizer.step()
    assert same(bits(body), before)
    assert not same(bits(net[-1]), head)


def test_it_has_no_gradient_and_none_left_from_before(net):
    net(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    frozen = Frozen(net[:-1].modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net[:-1].parameters())
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in net[-1].parameters())
    assert net[:-1](images()).grad_fn is None
    assert {id(parameter) for parameter in frozen.parameters} == {id(p) for p in net[:-1].parameters()}


def test_only_what_keeps_something_stays_in_eval_mode(net):
    Frozen(net[:-1].modules())
    net.train()
    resting = [name for name, module in net.named_modules() if not module.training]
    # GroupNorm keeps nothing, but is a norm; the dropout and containers go with the call.
    assert resting == ["1", "2", "3", "3.norm", "4.parametrizations.weight.0", "5", "6"]
    net.eval()
    assert not any(module.training for module in net.modules())


def test_modules_are_kept_in_eval_mode_but_for_recurrent_ones(net):
    net.add_module("lstm", nn.LSTM(3, 3, num_layers=2, dropout=0.5))
    frozen = Frozen([net[1], net[3]])
    kept = InEval([*[*net[:8].modules()][1:], net.lstm])
    for call in (net.train, net[3].train, net[3].drop.train):
        call()
    assert [name for name, module in net.named_modules() if module.training] == ["", "8", "lstm"]
    net.eval()
    assert not any(module.training for module in net.modules())
    net.train()
    kept.undo()
    assert [name for name, module in net.named_modules() if not module.training] == ["1", "3"]
    frozen.undo()
    assert all(module.training and "train" not in vars(module) for module in net.modules())


class Attends(nn.Module):
    """Drops out by its own mode, as attention does, with its layers in a module list."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Linear(2, 2))])
        self.last = nn.Dropout()


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("", ""),
        ("a", "a"),
        ("a b.0", "a b.layers.0"),
        ("a b.1", "a b.layers.1 b.layers.1.0 b.layers.1.1 b.layers.1.2"),
        ("b b.0", "b.layers.0"),  # b holds a tensor, and what trains
        ("a b b.0", "a drop b.layers.0"),  # the dropout between them too
        ("b b.0 b.1", "b b.layers b.layers.0 b.layers.1 b.layers.1.0 b.layers.1.1 b.layers.1.2 b.last"),
        ("b.0 b.1", "b.layers b.layers.0 b.layers.1 b.layers.1.0 b.layers.1.1 b.layers.1.2"),
        ("b.1 c", "b.layers.1 b.layers.1.0 b.layers.1.1 b.layers.1.2 b.last more more.0 c"),
    ],
)
def test_what_evaluates_is_all_in_which_nothing_trains_and_what_stands_between(frozen, expected):
    net = nn.Module()
    net.first, net.a, net.drop, net.b = nn.Dropout(), nn.Linear(2, 2), nn.Dropout(), Attends()
    net.more, net.c, net.end = nn.Sequential(nn.Dropout()), nn.BatchNorm1d(2, affine=False), nn.Dropout()
    parts = {"a": net.a, "b": net.b, "b.0": net.b.layers[0], "b.1": net.b.layers[1][2], "c": net.c}
    found = wholly_frozen(net, [net], {parts[name] for name in frozen.split()})
    assert [name for name, module in net.named_modules() if module in found] == expected.split()
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("shared", [nn.Dropout, lambda: nn.Sequential(nn.ReLU(), nn.Dropout())])
def test_a_dropout_that_several_layers_share_rests_with_the_last_of_them(shared):
    drop, layers = shared(), [nn.Linear(2, 2) for _ in range(3)]
    net = nn.Sequential(
        nn.Sequential(*(nn.Sequential(layer, drop) for layer in layers[:2])), nn.Sequential(layers[2], drop)
    )
    assert wholly_frozen(net, [net[0]], {layers[0]}) == [net[0][0], layers[0]]
    assert {*wholly_frozen(net, [net[0]], {*layers[:2]})} == {net[0], *net[0], *layers[:2]}
    assert {*wholly_frozen(net, [net], {*layers})} == {*net.modules()}


@pytest.mark.parametrize("drop", [nn.Dropout(), None])
def test_a_backbone_that_is_registered_elsewhere_too_rests_all_the_same(drop):
    blocks = [nn.Sequential(nn.Linear(2, 2), drop or nn.Dropout()) for _ in range(3)]
    net = nn.ModuleDict({"model": nn.Sequential(*blocks), "backbone": nn.Sequential(*blocks[:2])})
    found = wholly_frozen(net, [net["backbone"]], {blocks[0][0], blocks[1][0]})
    assert {*found} == {net["backbone"], *net["backbone"].modules()} - {drop}


def test_a_module_is_frozen_without_its_children(net):
    Frozen([net, net[3]])
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["3.scale"]
    net.train()
    assert [name for name, module in net.named_modules() if not module.training] == ["3"]


def test_norms_may_be_left_as_they_are(net):
    before = bits(net)
    frozen = Frozen(net[:-1].modules(), train_norm=True)
    net.train()
    net(images()).sum().backward()
    trained = {name for name, parameter in net[:-1].named_parameters() if parameter.grad is not None}
    norms = ("1", "2", "3.norm", "6")
    assert trained == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    moved = {name for name, tensor in bits(net[:-1]).items() if not torch.equal(before[name], tensor)}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    statistics = {f"{norm}.{kind}" for norm in ("1", "3.norm", "5", "6") for kind in kinds}
    statistics -= {"3.norm.num_batches_tracked"}  # torch's InstanceNorm does not count
    assert {name for name in moved if "parametrizations" not in name} == statistics
    frozen.undo()
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("calls", [0, 1])
def test_it_is_undone_to_what_the_user_had_chosen(net, train_norm, calls):
    net[0].bias.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    net[1].eval()
    net[3].norm.eval()
    before = switches(net)
    frozen = Frozen(net.modules(), train_norm)
    if calls and not train_norm:  # left as they are, norms go with the call
        net[1].train()
        net[3].norm.train()
    frozen.undo()
    assert switches(net) == before
    frozen.undo()
    assert switches(net) == before
    net.train()
    assert all(module.training for module in net.modules())


def test_it_trains_again_as_if_it_had_never_been_frozen(net):
    twin = copy.deepcopy(net)
    Frozen(net.modules()).undo()
    for one in (net, twin):
        torch.manual_seed(2)  # the dropout's
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        one(images()).sum().backward()
        optimizer.step()
    assert same(bits(net), bits(twin))


def test_two_parts_are_undone_one_by_one(net):
    first, second = Frozen([net[0], net[1]]), Frozen([net[2], net[5]])
    first.undo()
    net.train()
    assert [net[i].training for i in (1, 2, 5)] == [True, False, False]
    assert [net[i].weight.requires_grad for i in (0, 1, 2)] == [True, True, False]
    second.undo()
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_stays_frozen_by_itself(net, twin_of):
    net[4], net[6], net[8] = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(64, 3)  # torch pickles no others
    frozen = Frozen(net[:-1].modules())
    twin = twin_of(net)
    assert same(bits(net), bits(twin))
    frozen.undo()
    twin.train()
    assert [twin[i].training for i in (1, 2, 3, 5)] == [False] * 4
    assert twin[1].train.module is twin[1]
    assert all(module.training for module in net.train().modules())
    assert not any(parameter.requires_grad for parameter in twin[:-1].parameters())


def test_train_returns_the_module(net):
    Frozen(net[:-1].modules())
    assert net[1].train() is net[1]
    assert net[1].eval() is net[1]
    assert net.train() is net
