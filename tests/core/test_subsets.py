"""How many are kept, with which chances, and that the weights make up for the ones left out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.subsets import draw_hard, draw_unbiased, draw_uniform

DRAWS = 4000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def skewed(count=40, seed=1):
    return torch.rand(count, generator=generator(seed)) ** 3


@pytest.mark.parametrize("draw", [draw_uniform, draw_unbiased, draw_hard])
@given(
    losses=st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 7.0, math.nan, math.inf, -math.inf, -1.0]), min_size=1, max_size=30
    ),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 3),
)
def test_exactly_so_many_different_places_in_order_and_the_same_again(draw, losses, share, seed):
    losses = torch.tensor(losses)
    kept = max(1, round(share * len(losses)))
    places, weights = draw(losses, kept, generator(seed))
    assert places.dtype == torch.int64
    assert len(places) == kept
    assert torch.equal(places, places.unique())  # ascending, none twice
    assert 0 <= int(places[0]) <= int(places[-1]) < len(losses)
    assert weights.shape == losses.shape
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert (weights >= 1).all()
    again = draw(losses, kept, generator(seed))
    assert torch.equal(places, again.places)
    assert torch.equal(weights, again.weights)


def test_another_stream_draws_others():
    for draw in (draw_uniform, draw_unbiased, draw_hard):
        assert not torch.equal(draw(skewed(), 20, generator(1)).places, draw(skewed(), 20, generator(2)).places)


@pytest.mark.parametrize("kept", [4, 12, 20, 28, 36, 39, 40])
@pytest.mark.parametrize("unknown", [0, 6, 40])
def test_the_weighted_sum_over_the_kept_has_the_expectation_of_the_sum_over_all(kept, unknown):
    """Of anything: here each sample's gradient is a vector that has nothing to do with its loss."""
    losses = skewed()
    losses[:unknown] = math.nan
    gradients = torch.randn(40, 3, generator=generator(5), dtype=torch.float64)
    stream, sums = generator(9), []
    for _ in range(DRAWS):
        places, weights = draw_unbiased(losses, kept, stream)
        sums.append((weights[places].unsqueeze(1) * gradients[places]).sum(0))
    sums = torch.stack(sums)
    error = sums.std(0) / math.sqrt(DRAWS)
    # The weights are float32.
    assert ((sums.mean(0) - gradients.sum(0)).abs() <= 3 * error + 1e-5).all()
    if kept < 40:
        assert (error > 0).all()


def test_only_samples_below_the_mean_are_dropped_and_the_rest_of_them_stand_for_all():
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 3.0, 4.0, 5.0, math.nan])
    for seed in range(50):
        places, weights = draw_unbiased(losses, 7, generator(seed))
        assert set(places.tolist()) >= {6, 7, 8, 9}
        assert weights.tolist() == [2.0] * 6 + [1.0] * 4


def test_the_mean_is_that_of_the_known():
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, math.nan, math.inf])
    weights = draw_unbiased(losses, 8, generator()).weights
    assert weights.tolist() == [2.0] * 4 + [1.0] * 6


def test_where_too_few_are_low_those_with_the_lowest_losses_join_them():
    losses = torch.tensor([0.0, 8.0, 7.0, 6.0, 9.0, 9.0, 9.0, 9.0])
    # 3 of 8 go, at most half of the low ones: 6 of them; four losses of 9 are equal and join together.
    for seed in range(20):
        weights = draw_unbiased(losses, 5, generator(seed), max_drop=0.5).weights
        assert weights.tolist() == [pytest.approx(8 / 5)] * 8
    weights = draw_unbiased(losses, 5, generator(), max_drop=0.75).weights
    assert weights.tolist() == [4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("max_drop", [0.3, 0.75, 0.9])
@pytest.mark.parametrize("kept", [12, 20, 28, 36])
def test_no_more_than_the_largest_share_is_dropped(max_drop, kept):
    weights = draw_unbiased(skewed(), kept, generator(), max_drop).weights
    low = int((weights > 1).sum())
    assert (40 - kept) / low <= max_drop or low == 40
    assert float(weights.max()) == pytest.approx(low / (low - 40 + kept))


def test_uniform_keeps_each_with_the_same_chance():
    stream, counts = generator(3), torch.zeros(40)
    for _ in range(DRAWS):
        places, weights = draw_uniform(skewed(), 10, stream)
        counts[places] += 1
        assert (weights == 1).all()
    sigma = math.sqrt(DRAWS * 0.25 * 0.75)
    assert ((counts - DRAWS / 4).abs() < 4 * sigma).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_first_of_the_hard_ones_has_chances_in_proportion_to_its_percentile(beta):
    """With one to keep the chances are the proportions themselves."""
    losses = torch.tensor([3.0, 1.0, 2.0, 2.0, math.nan])
    percentile = torch.tensor([0.8, 0.2, 0.6, 0.6, 1.0], dtype=torch.float64)
    chances = percentile**beta / (percentile**beta).sum()
    stream, counts = generator(4), torch.zeros(5, dtype=torch.float64)
    for _ in range(DRAWS):
        counts[draw_hard(losses, 1, stream, beta).places] += 1
    assert ((counts / DRAWS - chances).abs() < 4 * (chances * (1 - chances) / DRAWS).sqrt()).all()


def test_hard_ones_are_kept_more_often_and_the_more_so_the_higher_the_power():
    def mean(beta):
        stream = generator(2)
        return sum(float(skewed()[draw_hard(skewed(), 20, stream, beta).places].mean()) for _ in range(300)) / 300

    assert float(skewed().mean()) < mean(1.0) < mean(3.0)
    assert mean(0.0) == pytest.approx(float(skewed().mean()), abs=0.02)
