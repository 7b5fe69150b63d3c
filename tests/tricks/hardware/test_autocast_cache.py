"""A weight is cast once a step, however often it is used; losses, gradients and what comes after are right."""

import logging

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_speedups import AutocastCache
from zoo import Classifier, Manual, ReplayLoader, assert_same_weights, loader, scaled, trainer, weights

HALF = {"bf16": lambda: {"precision": "bf16-mixed"}, "fp16": lambda: {"plugins": [scaled(1.0)]}}


def EXAMPLE():
    return {"callbacks": [AutocastCache()], "trainer": {"precision": "bf16-mixed"}}


class Casts(TorchDispatchMode):
    """Counts the casts to half precision of tensors with one number of elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        half = (kwargs or {}).get("dtype") in (torch.bfloat16, torch.float16)
        if half and "_to_copy" in str(func) and args[0].numel() == self.size:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Shared(Classifier):
    """One layer four times, of which the first ``blind`` ones are under no_grad; counts the casts of its weight."""

    def __init__(self, blind=0):
        torch.manual_seed(3)
        super().__init__()
        self.layer, self.blind, self.casts, self.gradients = nn.Linear(12, 12, bias=False), blind, [], []
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(128, 12))
        self.head = nn.Linear(12, 4)

    def training_step(self, batch, batch_idx):
        with Casts(144) as casts:
            features = self.backbone(batch[0])
            for number in range(4):
                with torch.set_grad_enabled(number >= self.blind):
                    features = features + self.layer(features).tanh()
            loss = nn.functional.cross_entropy(self.head(features).float(), batch[1])
        self.casts.append(casts.count)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        with Casts(144) as casts:
            self.layer(self.layer(self.backbone(batch[0])))
        self.casts.append(-casts.count)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(0 if self.layer.weight.grad is None else self.layer.weight.grad.abs().sum().item())


@pytest.mark.parametrize("half", HALF)
def test_a_weight_is_cast_once_a_step_and_training_goes_on_as_without(half):
    plain, module = Shared(), Shared()
    trainer(**HALF[half](), max_epochs=2).fit(plain, ReplayLoader())
    trainer(**HALF[half](), max_epochs=2, callbacks=[AutocastCache()]).fit(module, ReplayLoader())
    assert (plain.casts, module.casts) == ([4] * 8, [1] * 8)
    assert module.losses[0] == plain.losses[0]
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(module)[key], value, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("half", HALF)
def test_no_gradient_is_lost_where_the_first_uses_have_none(half):
    plain, module = Shared(blind=3), Shared(blind=3)
    trainer(**HALF[half](), max_steps=2).fit(plain, loader())
    trainer(**HALF[half](), max_steps=2, callbacks=[AutocastCache()]).fit(module, loader())
    assert min(module.gradients) > 0
    assert module.gradients == plain.gradients
    assert_same_weights(weights(plain), weights(module))


def test_validation_casts_once_and_the_next_steps_see_new_weights():
    plain, module = Shared(blind=3), Shared(blind=3)
    for one, tricks in ((plain, []), (module, [AutocastCache()])):
        trainer(precision="bf16-mixed", val_check_interval=1, callbacks=tricks, max_epochs=1).fit(
            one, ReplayLoader(), loader(8)
        )
    assert {casts for casts in module.casts if casts < 0} == {-1}
    assert {casts for casts in plain.casts if casts < 0} == {-2}
    assert_same_weights(weights(plain), weights(module))


@pytest.mark.parametrize("order", [1, -1])
def test_two_of_them_leave_in_either_order(order):
    tricks, run = [AutocastCache(), AutocastCache()], trainer(precision="bf16-mixed")
    for trick in tricks:
        trick.setup(run, Shared(), "fit")
    assert torch.is_autocast_cache_enabled()
    with run.precision_plugin.autocast_context_manager():
        assert torch.is_autocast_cache_enabled()
    for trick in tricks[::order]:
        trick.undo(run, Shared())
    assert "autocast_context_manager" not in vars(run.precision_plugin)


def test_other_precisions_are_left_alone_and_that_is_said(caplog):
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[AutocastCache()], max_steps=1).fit(Shared(), loader())
    said = [line for line in caplog.messages if "AutocastCache" in line]
    assert said == ["AutocastCache does nothing: Precision is no mixed precision of autocast."]


def test_manual_optimization_is_refused():
    with pytest.raises(MisconfigurationException, match=r"in which manual optimization changes them\. Remove it"):
        trainer(precision="bf16-mixed", callbacks=[AutocastCache()]).fit(Manual(), loader())
