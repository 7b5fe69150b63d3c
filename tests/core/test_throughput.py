"""Every number here was worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.throughput import (
    Spread,
    common_target,
    paired_speedup,
    samples_per_second,
    spread,
    time_to_target,
)


def test_spread_of_an_even_count_has_the_mean_of_the_middle_two():
    assert spread([4.0, 1.0, 3.0, 10.0]) == Spread(3.5, 1.0, 10.0, 4)


def test_spread_keeps_infinity_and_drops_nan():
    assert spread([1.0, math.inf, math.nan, math.inf]) == Spread(math.inf, 1.0, math.inf, 3)
    assert spread([math.nan]) is None


def test_samples_per_second():
    assert samples_per_second(300, 2.0) == 150.0
    assert samples_per_second(0, 2.0) == 0.0


@pytest.mark.parametrize(("samples", "seconds"), [(-1, 1.0), (1, 0.0), (1, -2.0), (1, math.inf), (1, math.nan)])
def test_samples_per_second_refuses_nonsense(samples, seconds):
    with pytest.raises(ValueError, match="Expected `s"):
        samples_per_second(samples, seconds)


def test_time_to_target_is_the_first_point_that_reaches_it():
    points = [(1.5, 0.40), (3.0, 0.70), (4.5, 0.65), (6.0, 0.80)]
    assert time_to_target(points, 0.70) == 3.0
    assert time_to_target(points, 0.71) == 6.0
    assert time_to_target(points, 0.81) == math.inf
    assert time_to_target([], 0.1) == math.inf


def test_a_diverged_point_never_reaches_a_target():
    assert time_to_target([(1.0, math.nan)], 0.1) == math.inf


def test_common_target_is_the_lowest_of_the_last():
    assert common_target([[0.5, 0.9, 0.8], [0.1, 0.85], [0.95]]) == 0.8
    assert common_target([[math.nan, 0.3], []]) == 0.3
    assert common_target([[], [math.nan]]) is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=1), min_size=1))
def test_every_run_reaches_the_common_target(runs):
    target = common_target(runs)
    assert all(time_to_target(enumerate(run, 1), target) < math.inf for run in runs)


def test_paired_speedup_pairs_by_position():
    # ratios 10/5, 20/40, 30/10: unpaired medians would give 20/10
    assert paired_speedup([10.0, 20.0, 30.0], [5.0, 40.0, 10.0]) == Spread(2.0, 0.5, 3.0, 3)


def test_a_trick_that_fails_on_most_seeds_is_no_speedup():
    result = paired_speedup([10.0, 10.0, 10.0], [1.0, math.inf, math.inf])
    assert result == Spread(0.0, 0.0, 10.0, 3)


def test_a_pair_in_which_neither_arrives_says_nothing():
    assert paired_speedup([math.inf, 6.0], [math.inf, 2.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert paired_speedup([math.inf], [2.0]) == Spread(math.inf, math.inf, math.inf, 1)
    assert paired_speedup([math.inf], [math.inf]) is None


def test_paired_speedup_refuses_what_can_not_be_paired():
    with pytest.raises(ValueError, match="one time a seed"):
        paired_speedup([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="> 0 seconds"):
        paired_speedup([1.0], [0.0])
