"""In a step on features the cuts get what is kept, and nobody else gets anything by accident."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_speedups.tensors.feature_store import FeatureStore, Kind
from lightning_speedups.tensors.unloaded import Unloaded
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts
from lightning_speedups.tricks.transfer.feature_cache.replay import Replay

SAMPLES = torch.tensor([4, 1, 2])
INPUTS = torch.randn(3, 2)


class Refused(Exception):
    pass


def refuse(what, way_out):
    return Refused(f"{what}. {way_out}")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 3).requires_grad_(False)
        self.head = nn.Linear(3, 2)


@pytest.fixture
def module():
    return Net()


@pytest.fixture
def step(module):
    store = FeatureStore({"head 0 0": Kind((3,), torch.float32)}, 5)
    store.write(torch.arange(5), {"head 0 0": torch.arange(15.0).view(5, 3)})
    return Replay(SAMPLES, Cuts(module), store, refuse)


def test_the_cuts_get_features_and_the_inputs_can_be_read(module, step):
    inputs = step.stand_ins({"a": [INPUTS, "name"]})
    assert type(inputs["a"][0]) is Unloaded
    assert inputs["a"][1] == "name"
    with step.listening():
        made = module.head(module.backbone(inputs["a"][0]))
    assert torch.equal(made, module.head(torch.arange(15.0).view(5, 3)[SAMPLES]))
    assert inputs["a"][0].tolist() == INPUTS.tolist()


def test_one_tensor_that_comes_twice_is_loaded_once(module, step):
    seen = []
    module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with step.listening():
        features = module.backbone(step.stand_ins(INPUTS))
        module.head(features), module.head(features)
    assert seen[0] is seen[1]


def test_a_step_that_goes_on_longer_than_the_first_is_refused(module, step):
    with step.listening():
        module.head(module.backbone(step.stand_ins(INPUTS)))
        with pytest.raises(Refused, match=r"`head` needs a tensor of the shape \(3, 3\)"):
            module.head(module.backbone(step.stand_ins(INPUTS)))


def test_what_is_no_feature_is_refused_but_for_what_is_made_of_the_inputs_alone(module, step):
    inputs = step.stand_ins(INPUTS)
    given = inputs @ torch.ones(2, 3)
    with step.listening():
        with pytest.raises(Refused, match=r"that is not among the features\. Only trainable"):
            module.head(given[:2])
        assert torch.equal(module.head(inputs.repeat(1, 2)[:, :3]), module.head(INPUTS.repeat(1, 2)[:, :3]))


def test_what_an_earlier_step_has_left_is_refused(module, step):
    earlier = module.backbone(Replay(SAMPLES, step.cuts, step.store, refuse).stand_ins(INPUTS))
    with step.listening(), pytest.raises(Refused, match="`head` was given what an earlier step had made"):
        module.head(earlier)


def test_real_tensors_pass_and_all_is_put_back(module, step):
    with step.listening():
        made = module.head(torch.ones(3, 3))
    assert torch.equal(made, module.head(torch.ones(3, 3)))
    assert not module.head._forward_pre_hooks
    assert "forward" not in vars(module.backbone)
