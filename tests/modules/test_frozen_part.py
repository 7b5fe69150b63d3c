"""Where the frozen part of a network ends, and what differs between two computations of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers_like import Output, Pieces

from lightning_speedups.modules.frozen_part import (
    after,
    before,
    different,
    find_cuts,
    is_compiled,
    is_frozen,
    is_untrained,
    memories,
)


def net():
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.ReLU(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Linear(2, 2)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trains", "cuts", "outside"),
    [
        ("0 2 3", [""], []),
        ("2 3", ["2", "3"], ["", "0", "0.0", "0.1", "1"]),
        ("3", ["3"], ["", "0", "0.0", "0.1", "1", "2", "2.0", "2.1"]),
        ("0.1 3", ["0.1", "3"], ["", "0", "0.0", "1", "2", "2.0", "2.1"]),
        ("", [], ["", "0", "0.0", "0.1", "1", "2", "2.0", "2.1", "3"]),
    ],
)
def test_cuts_are_the_largest_modules_that_train(trains, cuts, outside):
    module = net().requires_grad_(False)
    for name in trains.split():
        module.get_submodule(name).requires_grad_(True)
    found = find_cuts(module)
    assert [list(parts) for parts in found] == [cuts, outside]
    assert all(module.get_submodule(name) is part for parts in found for name, part in parts.items())


def test_a_module_with_one_frozen_parameter_is_cut_into_its_children():
    module = net()
    module.register_parameter("scale", nn.Parameter(torch.ones(1), requires_grad=False))
    assert list(find_cuts(module)[0]) == ["0", "2", "3"]
    assert not is_frozen(module)
    assert is_frozen(module.requires_grad_(False))


def test_lists_of_modules_are_not_called():
    module = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "b": nn.ModuleDict({"c": nn.Linear(1, 1)})})
    assert list(find_cuts(module)[0]) == ["a.0", "b.c"]


def test_dropout_beside_what_trains_counts_as_if_it_did():
    module = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(1, 1), nn.Dropout()), "drop": nn.Dropout2d(), "b": nn.Linear(1, 1)}
    )
    module["a"].requires_grad_(False)
    assert [list(parts) for parts in find_cuts(module)] == [["drop", "b"], ["", "a", "a.0", "a.1"]]
    module["drop"].p = 0.0
    assert list(find_cuts(module)[0]) == ["b"]
    module["drop"].p = 0.5
    assert list(find_cuts(module.eval())[0]) == ["b"]
    assert list(find_cuts(nn.Sequential(module.train().requires_grad_(True)))[0]) == [""]
    assert list(find_cuts(module.requires_grad_(False))[0]) == []


def test_names_that_begin_alike_are_not_in_each_other():
    module = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1), "c": nn.Linear(1, 1).requires_grad_(False)})
    assert [list(parts) for parts in find_cuts(module)] == [["a", "ab"], ["", "c"]]
    module["ab"].requires_grad_(False)
    assert [list(parts) for parts in find_cuts(module)] == [["a"], ["", "ab", "c"]]


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.0]], [[3.0, 0.0]], 0.8),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[0.0, 0.0]], [[0.0, 1.0]], 1.0),
        ([[torch.nan, 4.0]], [[torch.nan, 4.0]], 0.0),
        ([[torch.nan, 4.0]], [[3.0, 4.0]], 1.0),
        ([[torch.inf, 4.0]], [[torch.inf, 4.0]], 0.0),
        ([[torch.inf, 4.0]], [[1.0, 4.0]], 1.0),
    ],
)
def test_different(one, other, apart):
    assert different(torch.tensor(one), torch.tensor(other)).tolist() == pytest.approx([apart])


def test_different_of_integers_and_scalars():
    assert different(torch.tensor([1, 2]), torch.tensor([1, 4])).tolist() == [0.0, 0.5]
    assert different(torch.ones(2, 1, 3).bool(), torch.ones(2, 1, 3).bool()).tolist() == [0.0, 0.0]


def test_compiled_modules():
    module = nn.Sequential(nn.ReLU())
    module[0].compile(backend="eager")
    assert [is_compiled(part) for part in module.modules()] == [False, True]
    assert is_compiled(torch.compile(module, backend="eager"))


def test_untrained_values():
    trains = torch.ones(1, requires_grad=True)
    assert is_untrained({"a": [torch.ones(1), 3]})
    assert not is_untrained({"a": [trains * 2, torch.ones(1)]})
    assert is_untrained(Pieces(torch.ones(1), torch.ones(1)))
    assert not is_untrained([Output(a=torch.ones(1), b=trains * 2), Pieces])
    assert not is_untrained([3, None])
    assert not is_untrained([])


def test_memories_are_those_of_the_tensor_and_its_views():
    ones = torch.ones(4, 2)
    assert memories([ones]) == memories([ones.t(), ones[1:], ones.detach(), "a"])
    assert memories([ones.to_sparse(), None]) == set()
    assert len(memories([ones, ones.clone()])) == 2


def test_hooks_see_what_goes_in_and_out_and_are_taken_away():
    module, seen = net().eval(), []

    def double(name, part, given):
        (one,), kwargs = given
        assert kwargs == {}
        return (one * 2,), kwargs

    expected = module[3](module[2](module[1](module[0](torch.ones(1, 2)))) * 2)
    with (
        before({"3": module[3]}, double),
        after({"3": module[3]}, lambda name, part, made: seen.append((name, part, made))),
    ):
        assert torch.equal(module(torch.ones(1, 2)), expected)
    ((name, part, made),) = seen
    assert (name, part) == ("3", module[3])
    assert torch.equal(made, expected)
    with pytest.raises(ZeroDivisionError), before({"3": module[3]}, double), after({"3": module[3]}, double):
        _ = 1 / 0
    assert not module[3]._forward_hooks
    assert not module[3]._forward_pre_hooks
