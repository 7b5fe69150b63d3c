"""Shares against their definition; tensors by all their names; values exchanged in place."""

import pytest
import torch
from torch import nn

from lightning_speedups.modules.averages import averaged_tensors, exchange, share_kept


def test_the_share_kept_is_the_same_for_the_same_steps_however_they_are_updated():
    assert share_kept(50.0, 10_000, 4) == pytest.approx(share_kept(50.0, 10_000) ** 4)
    assert [share_kept(1e9, t) for t in (0, 8, 80)] == pytest.approx([(1 + t) / (10 + t) for t in (0, 8, 80)])
    assert share_kept(1.0, 5) == 0


def test_what_is_averaged_has_all_its_names_and_fractions():
    module = nn.Module()
    module.one = nn.Linear(2, 2, bias=False)
    module.two = module.one
    module.norm = nn.BatchNorm1d(2, affine=False)
    module.register_buffer("mask", torch.full((2,), float("-inf")))
    module.whole = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert [*averaged_tensors(module)] == ["one.weight", "two.weight", "norm.running_mean", "norm.running_var"]


def test_exchanged_values_are_exact_and_stay_in_place():
    one, other = torch.randn(3), torch.randn(3)
    kept, address = (one.clone(), other.clone()), (one.data_ptr(), other.data_ptr())
    exchange([(one, other)])
    assert torch.equal(one, kept[1])
    assert torch.equal(other, kept[0])
    assert (one.data_ptr(), other.data_ptr()) == address
