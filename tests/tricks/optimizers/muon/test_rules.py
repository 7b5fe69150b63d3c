"""Muon against a plain loop, torch's Muon and timm's; the other rules against torch's SGD and AdamW."""

import pytest
import timm.optim
import torch
from torch import nn

from lightning_speedups import Muon
from lightning_speedups.tricks.optimizers.muon.rules import momentum_of
from zoo import give_gradients, twins


class Reference:
    """Muon as it is written down, one parameter after the other, in float64."""

    def __init__(self, params, lr, momentum=0.95, decay=0.0, steps=5, scale=None, normalized=False, nesterov=True):
        self.params, self.buffers = list(params), {}
        self.lr, self.momentum, self.decay, self.steps = lr, momentum, decay, steps
        self.scale, self.normalized, self.nesterov = scale, normalized, nesterov

    @torch.no_grad()
    def step(self):
        for p in self.params:
            if p.grad is None:
                continue
            buffer = self.momentum * self.buffers.get(p, 0) + p.grad.double()
            self.buffers[p] = buffer
            update = p.grad.double() + self.momentum * buffer if self.nesterov else buffer
            x = update.flatten(1)
            rows, columns = x.shape
            x = x / x.norm()
            for _ in range(self.steps):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            factor = (
                0.2 * max(rows, columns) ** 0.5 if self.scale == "match_rms_adamw" else max(1, rows / columns) ** 0.5
            )
            weight = p.double()
            weight *= rows**0.5 / weight.norm() if self.normalized else 1 - self.lr * self.decay
            p.copy_(weight - self.lr * factor * x.view(p.shape))


SHAPES = [(6, 10), (10, 6), (6, 10), (8, 3, 3, 3), (8, 3, 3, 3), (5, 5), (4, 6, 1, 1), (4, 3, 5)]


FORMS = {
    "plain": ({}, {}),
    "three, decayed": ({"steps": 3, "weight_decay": 0.1}, {"steps": 3, "decay": 0.1}),
    "matching AdamW": ({"scale": "match_rms_adamw", "momentum": 0.8}, {"scale": "match_rms_adamw", "momentum": 0.8}),
    "without Nesterov": ({"nesterov": False}, {"nesterov": False}),
    "airbench": ({"steps": 3, "momentum": 0.6, "normalized": True}, {"steps": 3, "momentum": 0.6, "normalized": True}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", FORMS)
def test_matrices_and_filters_move_as_in_a_plain_loop_however_they_lie_in_memory(form, layout):
    options, same = FORMS[form]
    ours, theirs = twins(SHAPES, layout)
    optimizer, reference = Muon(ours, lr=0.05, **options), Reference(theirs, 0.05, **same)
    for step in range(4):
        give_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
    assert all(one.ndim != 4 or one.is_contiguous(memory_format=layout) for one in ours)


def near(ours, theirs, starts):
    """Updates of torch's and timm's are rounded to bfloat16."""
    for one, other, start in zip(ours, theirs, starts, strict=True):
        assert (one - other).norm() < 0.04 * (other - start).norm()


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_matrices_move_as_torchs_muon_moves_them(scale):
    ours, theirs = twins([shape for shape in SHAPES if len(shape) == 2])
    starts = [p.detach().clone() for p in ours]
    one = Muon(ours, lr=0.05, weight_decay=0.1, scale=scale)
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn=scale)
    for step in range(3):
        give_gradients(step, ours, theirs)
        one.step()
        other.step()
    near(ours, theirs, starts)


@pytest.mark.parametrize("steps", [3, 5])
def test_filters_move_as_timms_muon_moves_them(steps):
    ours, theirs = twins([(8, 3, 3, 3), (8, 3, 3, 3), (16, 8, 3, 3), (8, 16, 1, 1)])
    starts = [p.detach().clone() for p in ours]
    one = Muon(ours, lr=0.05, weight_decay=0.1, steps=steps)
    other = timm.optim.Muon(
        [{"params": theirs, "use_muon": True}], lr=0.05, weight_decay=0.1, ns_steps=steps,
        ns_coefficients="original", adjust_lr_fn="original", nesterov=True,
    )  # fmt: skip
    for step in range(3):
        give_gradients(step, ours, theirs)
        one.step()
        other.step()
    near(ours, theirs, starts)


SHAPES_OF_REST = [(6,), (4, 3), (2, 3, 3, 3), ()]
RESTS = {
    "sgd": (
        {"lr": 0.1, "momentum": 0.85, "weight_decay": 0.01},
        lambda params: torch.optim.SGD(params, 0.1, 0.85, weight_decay=0.01, nesterov=True, foreach=True),
    ),
    "plain sgd": ({"lr": 0.1, "momentum": 0.0}, lambda params: torch.optim.SGD(params, 0.1)),
    "heavy ball": (
        {"lr": 0.1, "nesterov": False, "dampening": 0.2},
        lambda params: torch.optim.SGD(params, 0.1, 0.9, dampening=0.2, foreach=True),
    ),
    "adamw": (
        {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)},
        lambda params: torch.optim.AdamW(params, 0.01, (0.8, 0.99), weight_decay=0.1, foreach=True),
    ),
    "adam": (
        {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4, "decoupled_weight_decay": False},
        lambda params: torch.optim.Adam(params, 0.01, eps=1e-4, weight_decay=0.1, foreach=True),
    ),
}


@pytest.mark.parametrize("name", RESTS)
def test_the_other_rules_are_torchs_to_the_bit(name):
    values, make = RESTS[name]
    ours, theirs = twins(SHAPES_OF_REST)
    one = Muon([{"params": ours, "rule": "adamw" if "adam" in name else "sgd", **values}])
    other = make(theirs)
    for step in range(4):
        give_gradients(step, ours, theirs)
        one.step()
        other.step()
    for mine, torchs in zip(ours, theirs, strict=True):
        assert torch.equal(mine, torchs)


@pytest.mark.parametrize("rule", ["muon", "sgd", "adamw"])
def test_a_rate_may_be_a_tensor(rule):
    ours, theirs = twins([(4, 3), (4, 3, 3, 3)])
    rate = torch.tensor(0.05)
    one = Muon([{"params": ours, "rule": rule, "lr": rate, "weight_decay": 0.1}])
    other = Muon([{"params": theirs, "rule": rule, "lr": 0.05, "weight_decay": 0.1}])
    for step in range(2):
        give_gradients(step, ours, theirs)
        one.step()
        other.step()
    for mine, same in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-6)
    assert one.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"normalized": True}])
@pytest.mark.parametrize("rule", ["muon", "sgd", "adamw"])
def test_what_has_no_gradient_rests_to_the_bit(rule, options):
    moved, rests = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    before = rests.detach().clone()
    optimizer = Muon(
        [{"params": [moved, rests], "rule": rule, "lr": 0.1, **(options if rule == "muon" else {"weight_decay": 0.1})}]
    )
    for gradient in (torch.randn(4, 3), torch.zeros(4, 3)):
        moved.grad = gradient
        optimizer.step()
    assert torch.equal(rests, before)
    assert rests not in optimizer.state
    moved.grad = None
    optimizer.step()


def test_momentum_is_the_first_of_betas_where_there_are_some():
    assert momentum_of({"momentum": 0.9}) == 0.9
    assert momentum_of({"betas": (0.8, 0.99), "momentum": 0.9}) == 0.8
