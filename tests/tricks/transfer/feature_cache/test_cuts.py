"""Where the frozen part ends, and whether it is what it was."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from lightning_speedups.tensors.unloaded import Unloaded
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts, places


def net():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.ReLU(), nn.Linear(3, 2))
    module.register_buffer("steps", torch.zeros(()))
    module[0].requires_grad_(False)
    return module


def test_what_is_around_the_cuts_and_does_not_train_stands_still():
    cuts = Cuts(net())
    assert list(cuts.inside) == ["2"]
    assert set(cuts.outside) == {"", "0", "0.0", "0.1", "1"}
    own = {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}
    assert set(cuts.still) == {"steps", "0.0.weight", "0.0.bias"} | {f"0.1.{name}" for name in own}
    assert cuts.flags == (False,) * 4 + (True,) * 2


@pytest.mark.parametrize(
    ("change", "names", "is_seen_at_once"),
    [
        (lambda module: None, [], False),
        (lambda module: module[0][0].weight.add_(1), ["0.0.weight"], True),
        (lambda module: module[0][1].running_mean.add_(1), ["0.1.running_mean"], True),
        (lambda module: setattr(module[0][0].bias, "data", torch.ones(3)), ["0.0.bias"], True),
        (lambda module: module[0][0].weight.data.mul_(2), ["0.0.weight"], False),
        (lambda module: module[2].weight.add_(1), [], False),
    ],
)
def test_what_moves_is_seen_at_once_or_by_its_sum(change, names, is_seen_at_once):
    module = net()
    cuts = Cuts(module)
    with torch.no_grad():
        change(module)
    assert cuts.moved() == (names if is_seen_at_once else [])
    assert cuts.train_as_then()
    assert cuts.is_like(Cuts(module)) == (not names)


def test_what_moves_in_each_step_is_left_out_while_the_same_parameters_train():
    module = net()
    cuts = Cuts(module, Cuts(module), ["steps"])
    fingerprint = cuts.fingerprint()
    module.steps += 1
    assert cuts.moved() == []
    assert Cuts(module, cuts).is_like(cuts)
    assert Cuts(module, cuts).fingerprint() == fingerprint
    module[0].requires_grad_(True)
    assert not cuts.train_as_then()
    assert not Cuts(module, cuts).is_like(cuts)
    module.register_parameter("scale", nn.Parameter(torch.ones(1), requires_grad=False))
    assert "steps" in Cuts(module, cuts).still


def test_fingerprints_are_those_of_all_that_features_depend_on():
    def other(change):
        module = net()
        with torch.no_grad():
            module[0][0].weight.fill_(0.5), module[0][0].bias.fill_(0.0)
            change(module)
        return Cuts(module).fingerprint("32-true")

    same = other(lambda module: None)
    assert other(lambda module: module[2].weight.add_(1)) == same
    for change in (
        lambda module: module[0][0].weight.add_(1),
        lambda module: module[0][1].eval(),
        lambda module: setattr(module[0][1], "eps", 1e-3),
        lambda module: module.__setitem__(1, nn.GELU()),
        lambda module: module.requires_grad_(False),
    ):
        assert other(change) != same


def test_shortcuts_are_over_what_is_frozen_and_made_once():
    module = net().eval()
    cuts = Cuts(module)
    for _ in range(2):
        with cuts.shortcuts.taken():
            module[0](Unloaded.of(torch.zeros(4, 2)))
    assert cuts.shortcuts.count == 1
    later = Cuts(module, Cuts(module, cuts))
    with later.shortcuts.taken():
        module[0](Unloaded.of(torch.zeros(4, 2)))
    assert later.shortcuts.count == 1  # it goes on with those of before


def test_places_go_by_call_and_nesting():
    calls = Counter()
    found, spec = places(calls, "head", ((1, {"a": [2, None]}), {"more": 3}))
    assert found == {"head 0 0": 1, "head 0 1": 2, "head 0 2": None, "head 0 3": 3}
    assert spec.unflatten(list(found.values())) == ((1, {"a": [2, None]}), {"more": 3})
    assert list(places(calls, "other", ((1,), {}))[0]) == ["other 0 0"]
    assert list(places(calls, "head", ((1,), {}))[0]) == ["head 1 0"]
