"""Batches of a step, values over epochs and weighed sums, against plain counting and numpy's weighted mean."""

import numpy as np
import pytest
import torch

from lightning_speedups.core.effective_batch import batches_in_step, checked_by_epoch, factor_to_mean, value_in_epoch


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_batches_make_a_step_exactly_or_the_nearest_sizes_are_named(batch_size, processes):
    possible = {batches * batch_size * processes: batches for batches in range(1, 200)}
    for samples in range(1, 130):
        if samples in possible:
            assert batches_in_step(samples, batch_size, processes) == possible[samples]
            continue
        below = max((one for one in possible if one < samples), default=None)
        above = min(one for one in possible if one > samples)
        nearest = f"{below} or {above}" if below else f"{above}"
        with pytest.raises(ValueError, match=rf"\): {nearest}, but got {samples}\."):
            batches_in_step(samples, batch_size, processes)


def test_the_error_says_what_a_step_is_made_of():
    with pytest.raises(ValueError, match=r"a multiple of 24 samples \(a batch of 8 × 3 processes\): 48 or 72"):
        batches_in_step(50, 8, 3)
    with pytest.raises(ValueError, match=r"a multiple of 8 samples \(a batch of 8\): 8, but got 5\."):
        batches_in_step(5, 8)


@pytest.mark.parametrize("by_epoch", [{0: 3}, {0: 1, 2: 5}, {4: 7, 0: 2, 1: 9}])
def test_a_value_holds_until_the_next_one_begins(by_epoch):
    value, values = None, []
    for epoch in range(8):
        value = by_epoch.get(epoch, value)
        values.append(value)
    assert [value_in_epoch(by_epoch, epoch) for epoch in range(8)] == values


def test_numbers_by_epoch_are_a_copy():
    given = {0: 4, 2: 8}
    checked = checked_by_epoch("samples", given)
    assert checked == given
    assert checked is not given


@pytest.mark.parametrize("given", [0, -1, 2.0, True, None, "8", {}, {1: 8}, {0: 8, -1: 4}, {0: 0}, {0: 8, "2": 4}, [8]])
def test_what_is_no_number_of_an_epoch_is_refused(given):
    with pytest.raises(ValueError, match="Expected `samples` to be a whole number of 1 or more, or a dict"):
        checked_by_epoch("samples", given)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("counts", [[4, 4, 4], [4, 4, 1], [7], [0, 3], [0.25, 2.5]])
def test_a_weighed_sum_becomes_the_mean_of_all(counts, as_tensors):
    means = torch.randn(len(counts), dtype=torch.float64)
    total = torch.tensor(counts).sum() if as_tensors else sum(counts)
    summed = sum(count / 4.0 * mean / 3 for count, mean in zip(counts, means, strict=True))
    factor = factor_to_mean(total, unit=4.0, times=3)
    assert float(summed * factor) == pytest.approx(np.average(means.numpy(), weights=counts), rel=1e-6)
    assert isinstance(factor, torch.Tensor) is as_tensors


@pytest.mark.parametrize("unit", [1.0, 3.0, 8.0, 0.7])
def test_of_equal_counts_the_sum_is_the_mean_already(unit):
    for times in (1, 2, 4):
        assert factor_to_mean(times * unit, unit, times) == 1
        assert float(factor_to_mean(torch.tensor(times * unit), unit, times)) == 1


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_where_nothing_was_counted_the_sum_stays_what_it_is(nothing):
    assert float(factor_to_mean(nothing, unit=8.0, times=2)) == 1
