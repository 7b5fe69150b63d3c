"""A step that computes everything keeps the features, and refuses what would make them others in another step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_speedups.tensors.feature_store import FeatureStore, Kind
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts
from lightning_speedups.tricks.transfer.feature_cache.recorder import Recording, shapes

SAMPLES = torch.arange(4)


class Refused(Exception):
    pass


def refuse(what, way_out):
    return Refused(f"{what}. {way_out}")


def states():
    return {"torch": torch.get_rng_state().tolist()}


class Net(nn.Module):
    """A frozen backbone and two heads, which get its features, something from the batch and something constant."""

    def __init__(self, *layers):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), *layers).requires_grad_(False)
        self.head, self.other = Takes(), Takes()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, batch):
        features = self.backbone(batch[0])
        return self.head(features, batch[1], self.scale) + self.other(features, batch[1].view(4, 1), torch.ones(2, 4))


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features, labels, constant):
        return F.dropout(self.layer(features) * constant.mean() + labels.view(-1, 1))


def batch():
    return [torch.randn(4, 2), torch.arange(4.0)]


def record(module, given=None, watches=True):
    given = batch() if given is None else given
    step = Recording(SAMPLES, given, Cuts(module), watches, states, refuse)
    with step.listening():
        module(given)
    return step


@pytest.mark.parametrize("watches", [False, True])
def test_features_are_what_comes_to_the_cuts_and_has_a_row_for_each_sample_each_once(watches):
    module, given = Net(), batch()
    step = record(module, given, watches)
    assert step.kinds == {"head 0 0": Kind((3,), torch.float32)}
    assert torch.equal(step.features["head 0 0"], module.backbone(given[0]))


def test_features_that_a_head_writes_into_are_kept_as_they_came():
    module, given = Net(), batch()
    module.head.register_forward_pre_hook(lambda _, args: (args[0].mul_(2), *args[1:]))
    step = record(module, given)
    assert torch.equal(step.features["head 0 0"], module.backbone(given[0]))
    assert torch.equal(step.features["other 0 0"], module.backbone(given[0]) * 2)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Dropout(0.5), r"`backbone.1` \(Dropout\).*generator of torch"),
        (nn.BatchNorm1d(3), r"`backbone.1` \(BatchNorm1d\) normalises"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), r"`backbone.1` \(BatchNorm1d\) normalises"),
    ],
)
def test_what_makes_features_differ_is_refused_where_it_is(layer, found):
    with pytest.raises(Refused, match=found):
        record(Net(layer))


def test_without_a_watch_random_numbers_before_the_first_cut_are_found():
    with pytest.raises(Refused, match=r"in or before `head` \(Takes\)"):
        record(Net(nn.Dropout(0.5)), watches=False)


def test_tensors_that_change_during_the_step_are_refused_where_features_may_depend_on_them():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, values):
            self.calls += 1
            return values

    with pytest.raises(Refused, match=r"backbone\.1\.calls changed during the step"):
        record(Net(Counts())).moved()
    module = Net()
    module.behind = Counts()
    module.register_forward_hook(lambda module, _, made: module.behind(made))
    assert record(module).moved() == ["behind.calls"]


def test_other_kinds_than_those_that_are_kept_are_refused():
    step = record(Net())
    for kinds in ({}, {"head 0 0": Kind((4,), torch.float32)}, {**step.kinds, "other 0 0": Kind((3,), torch.float32)}):
        with pytest.raises(Refused, match=r"has the shapes \(3,\) for `head`, and in the first one it had"):
            step.keep(FeatureStore(kinds, 4), False)


def step_with(samples, features):
    step = Recording(samples, [], Cuts(Net()), False, states, refuse)
    step.features = features
    return step


def test_in_a_batch_of_one_sample_anything_may_look_like_a_feature():
    store = FeatureStore({"head 0 0": Kind((3,), torch.float32)}, 8)
    step_with(torch.tensor([7]), {"head 0 0": torch.ones(1, 3), "head 0 1": torch.ones(1, 5)}).keep(store, False)
    assert torch.equal(store.read("head 0 0", torch.tensor([7])), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("dtype", "change", "apart"),
    [
        (torch.float32, 1.0, None),
        (torch.float32, 1.005, None),
        (torch.float32, 1.02, "2%"),
        (torch.bfloat16, 1.02, None),
        (torch.bfloat16, 2.0, "50%"),
    ],
)
def test_other_features_of_the_same_samples_are_refused_but_for_rounding(dtype, change, apart):
    store = FeatureStore({"a": Kind((3,), dtype), "b": Kind((), dtype)}, 5)
    features = {"a": torch.ones(4, 3, dtype=dtype), "b": torch.ones(4, dtype=dtype)}
    step_with(SAMPLES, features).keep(store, False)
    features["a"] = features["a"].clone()
    features["a"][2] *= change
    if apart is None:
        step_with(SAMPLES, features).keep(store, True)
    else:
        with pytest.raises(Refused, match=rf"makes something else of the same samples .*by {apart}\)"):
            step_with(SAMPLES, features).keep(store, True)
        step_with(SAMPLES, features).keep(store, False)
    assert torch.equal(store.read("a", SAMPLES), features["a"])


def test_shapes_in_words():
    kinds = {"head 0 0": Kind((6,), torch.float32), "a.b 1 3": Kind((), torch.int64)}
    assert shapes(kinds) == "(6,) for `head`, () for `a.b`"
