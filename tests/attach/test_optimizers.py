"""Optimizers that are born as others, with schedulers built on them, fused ones, and what is put back."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import SequentialLR, StepLR

from lightning_speedups.attach.optimizers import as_groups, born_as
from lightning_speedups.attach.steps import split_groups


class Halves(Optimizer):
    """Halves its parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.5)


def parameter(value=1.0):
    return torch.full((2,), value, requires_grad=True)


def only_sgd(birth):
    return birth._replace(kind=Halves, defaults={**birth.defaults, "own": 1}) if birth.kind is SGD else None


def test_schedulers_have_the_other_from_the_start_and_hooks_run():
    one, other = parameter(), parameter()
    with born_as(only_sgd) as born:
        first, second = SGD([one], lr=0.5), Adam([other], lr=0.5)
        scheduler = SequentialLR(first, [StepLR(first, 1), StepLR(first, 1)], [1])
    assert [birth.kind for birth in born] == [SGD, Adam]
    assert type(first) is Halves
    assert scheduler.optimizer is first
    assert first.param_groups[0]["own"] == 1
    seen = []
    first.register_step_post_hook(lambda *_: seen.append(1))
    first.step()
    scheduler.step()
    assert one.tolist() == [0.5, 0.5]
    assert seen == [1]
    assert first.param_groups[0]["lr"] == 0.5
    assert isinstance(second, Adam)


def test_a_fused_one_no_longer_says_that_it_unscales_gradients():
    with born_as(lambda birth: birth._replace(kind=Halves) if birth.kind is AdamW else None):
        changed, kept = AdamW([parameter()], fused=True), SGD([parameter()], lr=1, fused=True)
    assert not hasattr(changed, "_step_supports_amp_scaling")
    assert kept._step_supports_amp_scaling


def test_groups_are_split_that_were_made_for_the_other():
    one, other = parameter(), parameter()
    with split_groups(lambda p: "own" if p is other else None), born_as(only_sgd):
        optimizer = SGD([one, other], lr=0.5)
    assert [group["params"][0] is which for group, which in zip(optimizer.param_groups, (one, other), strict=True)]
    assert [group["own"] for group in optimizer.param_groups] == [1, 1]


def test_torch_is_as_before_also_after_an_exception():
    before = vars(Optimizer).copy()
    with pytest.raises(ZeroDivisionError), born_as(only_sgd):
        1 / 0  # noqa: B018
    assert vars(Optimizer) == before
    with pytest.raises(TypeError, match="should be an iterable"), born_as(only_sgd):
        SGD(parameter(), lr=1)
    with pytest.raises(ValueError, match="empty parameter list"), born_as(only_sgd):
        SGD([], lr=1)


def test_params_in_any_form_are_groups_and_what_was_given_is_left_alone():
    weight = parameter()
    given = [{"params": weight, "lr": 1}, {"params": (p for p in [weight])}]
    assert [group["params"][0] is weight for group in as_groups(given)] == [True, True]
    assert given[0]["params"] is weight
    assert as_groups([("name", weight)])[0]["params"][0][0] == "name"
