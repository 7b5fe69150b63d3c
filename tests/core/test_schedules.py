"""One-cycle against torch's OneCycleLR, ramps against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from lightning_speedups.core.schedules import anneal_between, one_cycle, ramp


def torch_one_cycle(total, **shape):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    shape["anneal_strategy"] = shape.pop("anneal")
    scheduler = OneCycleLR(optimizer, max_lr=0.7, total_steps=total, **shape)
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("total", "pct"), [(2, 0.4), (3, 0.45), (10, 0.3), (97, 0.25), (200, 0.5)])
def test_one_cycle_equals_torch_at_every_step(total, pct, three_phase, anneal):
    shape = {
        "pct_start": pct,
        "anneal": anneal,
        "three_phase": three_phase,
        "div_factor": 17.0,
        "final_div_factor": 300.0,
    }
    ours = [one_cycle(step, total, max_lr=0.7, **shape) for step in range(total)]
    np.testing.assert_allclose(ours, list(torch_one_cycle(total, **shape)), rtol=1e-9)


def test_one_cycle_begins_at_its_peak_where_torch_divides_by_zero():
    assert one_cycle(0, 4, max_lr=0.5, pct_start=0.25) == (0.5, 0.85)


def test_one_cycle_stays_at_its_end_where_torch_climbs_again():
    end = 0.5 / 25 / 1e4
    assert one_cycle(9, 10, max_lr=0.5)[0] == pytest.approx(end, rel=1e-9)
    assert one_cycle(10, 10, max_lr=0.5) == one_cycle(1000, 10, max_lr=0.5) == one_cycle(9, 10, max_lr=0.5)


@given(
    st.integers(1, 10**6),
    st.floats(0.001, 0.999),
    st.booleans(),
    st.sampled_from(["cos", "linear"]),
    st.floats(0, 1.2),
)
def test_one_cycle_is_finite_and_inside_its_bounds_for_any_length(total, pct, three_phase, anneal, place):
    pct = pct / 2 if three_phase else pct
    step = int(place * total)
    lr, momentum = one_cycle(step, total, max_lr=0.3, pct_start=pct, three_phase=three_phase, anneal=anneal)
    assert math.isfinite(lr)
    assert 0.3 / 25 / 1e4 * (1 - 1e-6) <= lr <= 0.3 * (1 + 1e-9)
    assert 0.85 - 1e-9 <= momentum <= 0.95 + 1e-9


def test_ramp_is_linear_then_constant():
    np.testing.assert_allclose([ramp(t, 5, 0.5, 3.0) for t in range(8)], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0])


def test_ramp_of_no_length_is_at_its_end_at_once():
    assert ramp(0, 0, 0.1, 2.0) == 2.0


@pytest.mark.parametrize("shape", ["cos", "linear"])
def test_annealing_begins_and_ends_where_it_should(shape):
    assert anneal_between(3.0, 1.0, 0.0, shape) == 3.0
    assert anneal_between(3.0, 1.0, 1.0, shape) == 1.0
    assert anneal_between(3.0, 1.0, 0.5, shape) == pytest.approx(2.0)
