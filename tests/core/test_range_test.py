"""The range test's arithmetic against numpy, closed forms and fastai's published rules, written out again."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.range_test import (
    Sweep,
    diverged,
    falls,
    safe_peak,
    smooth,
    steepest,
    suggest,
    sweep_rate,
    valley,
)

losses_of_some_length = st.lists(st.floats(-100, 100), min_size=3, max_size=60)


@pytest.mark.parametrize(("steps", "low", "high"), [(2, 1e-3, 1.0), (10, 0.5, 3.0), (100, 1e-6, 10.0), (7, 2.0, 1e-3)])
def test_the_rates_are_a_geometric_series(steps, low, high):
    rates = [sweep_rate(step, steps, low, high) for step in range(steps)]
    np.testing.assert_allclose(rates, np.geomspace(low, high, steps), rtol=1e-12)


@given(losses_of_some_length, st.floats(0, 0.999))
def test_smoothing_is_the_weighted_mean_of_the_past(losses, beta):
    expected = [np.average(losses[: t + 1], weights=beta ** np.arange(t, -1, -1.0)) for t in range(len(losses))]
    np.testing.assert_allclose(smooth(losses, beta), expected, rtol=1e-7, atol=1e-9)


def test_smoothing_leaves_constants_alone_and_keeps_what_is_not_finite():
    np.testing.assert_allclose(smooth([2.5] * 50), 2.5, rtol=1e-12)
    assert not any(map(math.isfinite, smooth([1.0, math.inf, 1.0])[1:]))
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("loss", "best", "verdict"),
    [
        (4.0, 1.0, False),
        (4.01, 1.0, True),
        (1.9, -1.0, False),  # three times its size above it, as for the others
        (2.1, -1.0, True),
        (math.inf, 1.0, True),
        (math.nan, 1.0, True),
        (math.nan, math.nan, True),
    ],
)
def test_divergence(loss, best, verdict):
    assert diverged(loss, best, 4.0) is verdict


@given(losses_of_some_length.filter(lambda losses: len(set(losses)) > 1))
def test_the_steepest_point_is_that_of_numpys_gradient_by_logarithm(losses):
    rates = np.geomspace(1e-5, 1.0, len(losses))
    slopes = np.gradient(losses, np.log(rates))
    picked = slopes[list(rates).index(steepest(list(rates), losses))]
    assert picked == pytest.approx(slopes.min(), rel=1e-9)


def fastais_valley(losses):
    """The index that fastai takes, from its rule: longest falling subsequence by comparing all pairs."""
    longest = []
    for i, loss in enumerate(losses):
        longest.append(1 + max((longest[j] for j in range(i) if losses[j] > loss), default=0))
    end = longest.index(max(longest))
    return end - max(longest) + int(max(longest) / 3) + int(max(longest) / 3 / 2)


@given(losses_of_some_length)
def test_the_valley_is_fastais(losses):
    rates = np.geomspace(1e-5, 1.0, len(losses)).tolist()
    # For two points in all, fastai's index is -1: the last.
    assert valley(rates, losses) == rates[max(fastais_valley(losses), 0)]


def curve(points, low=1e-5, high=10.0):
    """Falls around 1e-3 (a logistic curve by logarithm), rises above 1."""
    rates = np.geomspace(low, high, points)
    return rates.tolist(), (2 - 1 / (1 + 1e-3 / rates) + rates**2).tolist()


@pytest.mark.parametrize("method", ["valley", "steepest"])
def test_suggestions_lie_where_the_curve_falls(method):
    rates, losses = curve(200)
    assert 2e-4 < suggest(rates, losses, method) < 3e-2
    assert suggest(rates, losses, method) in rates
    assert suggest(rates, losses, "steepest") == pytest.approx(1e-3, rel=0.1)  # the logistic curve's middle


def nearest(rates, rate):
    return rates[int(np.abs(np.log(rates) - np.log(rate)).argmin())]


def test_the_peak_is_a_fifth_of_the_rate_of_the_lowest_loss_among_the_points_that_count():
    rates, losses = curve(200)
    assert suggest(rates, losses, "minimum") == nearest(rates, rates[int(np.argmin(losses))] / 5)


@pytest.mark.parametrize(
    ("own", "peak"),
    [
        ([], 0.1),
        ([0.2], 0.4),  # no lower than twice the module's own
        ([0.1], 0.2),
        ([0.03], 0.1),
        ([0.002], 0.02),  # at most ten times it
        ([1e-4], 1e-3),
        ([0.6], 1.2),  # where the loss is lowest is known no better than to a small factor
        ([2.6], 0.1),  # placeholders: the sweep shows that these diverge, or do nothing
        ([123.0], 0.1),
        ([1e-8], 0.1),
        ([0.0], 0.1),
        ([1e-4, 1e-3], 0.01),  # of several groups, the range
        ([0.2, 0.3], 0.4),
        ([1e-9, 1e-3, 5.0], 0.01),  # what is meant
    ],
)
def test_the_modules_own_rates_bound_the_peak(own, peak):
    assert safe_peak(0.5, own) == pytest.approx(peak)


@given(st.floats(1e-6, 10.0), st.lists(st.floats(0, 100.0), max_size=4))
def test_no_own_rate_brings_a_peak_far_above_the_rate_of_the_lowest_loss(lowest, own):
    assert 0 < safe_peak(lowest, own) <= 10 * lowest


def test_own_rates_bound_the_minimum_alone_and_the_peak_stays_one_of_the_rates():
    rates, losses = curve(200)
    assert suggest(rates, losses, own=[5e-4]) == nearest(rates, 5e-3)
    assert suggest(rates, losses, own=[5e-4]) in rates
    for method in ("valley", "steepest"):
        assert suggest(rates, losses, method, [1e-5]) == suggest(rates, losses, method)


@pytest.mark.parametrize("method", ["minimum", "valley", "steepest"])
def test_the_first_tenth_the_last_five_points_and_all_after_a_bad_loss_do_not_count(method):
    rates, losses = curve(100)
    expected = suggest(rates, losses, method)
    spoilt = losses.copy()
    spoilt[:10] = np.linspace(90, 80, 10)
    spoilt[-5:] = [-70, -71, -72, -73, -74]
    assert suggest(rates, spoilt, method) == expected
    # Same place with a tail of bad and enticing points.
    assert suggest([*rates, 20.0, 30.0, 40.0], [*losses, math.nan, -80.0, -90.0], method) == expected


def test_too_few_points_are_told_with_the_way_out():
    rates, losses = curve(40)
    with pytest.raises(
        ValueError, match=r"Expected 10 points or more .* but got 9 .* Lower `min_lr`, or use more `ste"
    ):
        suggest(rates[:9], losses[:9])
    with pytest.raises(ValueError, match="but got 6 before"):
        suggest(rates, [*losses[:6], math.inf, *losses[7:]])
    assert suggest(rates[:10], losses[:10]) in rates


@pytest.mark.parametrize("losses", [[2.0] * 30, [1.0 + i for i in range(30)]])
def test_a_loss_that_never_falls_is_told_with_the_way_out(losses):
    with pytest.raises(ValueError, match=r"Expected the loss to fall .* Lower `min_lr` if it diverges at once"):
        suggest(curve(30)[0], losses)


def noisy(losses, noise, seed):
    return (np.asarray(losses) + noise * np.random.default_rng(seed).standard_normal(len(losses))).tolist()


@pytest.mark.parametrize(("steps", "share"), [(40, 0.1), (100, 0.05), (300, 0.05)])
def test_noise_alone_is_taken_for_a_fall_in_few_of_many_sweeps(steps, share):
    assert sum(falls(noisy(np.full(steps, 2.3), 0.3, seed)) for seed in range(300)) <= 300 * share


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_real_fall_is_seen_through_noise_of_any_size(noise, scale):
    _, losses = curve(100, high=1.0)
    assert all(falls((scale * np.array(noisy(losses, noise, seed))).tolist()) for seed in range(100))


@pytest.mark.parametrize("losses", [[2.0] * 30, [1.0 + i for i in range(30)]])
def test_what_stands_or_rises_does_not_fall(losses):
    assert not falls(losses)


def test_what_comes_after_a_loss_that_is_not_finite_is_no_fall():
    assert not falls([2.0, 2.1] * 10 + [math.nan] + [0.0] * 10)
    assert falls([2.0, 2.1] * 10 + [0.1] * 5 + [math.inf, 5.0])


def test_reading_a_sweep_refuses_noise_with_the_way_out():
    rates = [sweep_rate(step, 100, 1e-6, 10.0) for step in range(100)]
    with pytest.raises(ValueError, match=r"more than its noise .* of 100 steps shows no rate: .* Use more `steps`"):
        Sweep().read(rates, noisy(np.full(100, 2.3), 0.3, 1))


def test_reading_a_sweep_returns_what_is_suggested_with_the_own_rates():
    rates, losses = curve(100, low=1e-6)
    smoothed, suggestion = Sweep(beta=0.5).read(rates, losses, [1e-3])
    assert smoothed == smooth(losses, 0.5)
    assert suggestion == nearest(rates, 1e-2)
