"""λ against the Beta distribution, blends and boxes against their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.mixing import blend, complementary, cut_box, draw_lambda, kept_share, paste
from lightning_speedups.core.randomness import generator_for


def beta_cdf(alpha, points):
    """Beta(α, α)'s distribution function, by integrating its density on a fine grid; α ≥ 1 has no pole."""
    grid = np.linspace(0, 1, 20001)
    density = (grid * (1 - grid)) ** (alpha - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(points, grid, area / area[-1])


@pytest.mark.parametrize("alpha", [1.0, 2.0, 8.0])
def test_lambda_follows_the_beta_distribution(alpha):
    count = 20000
    drawn = np.sort(draw_lambda(alpha, count, generator_for(1)).numpy())
    gap = np.abs(beta_cdf(alpha, drawn) - (np.arange(count) + 0.5) / count).max()
    assert gap < 1.95 / math.sqrt(count)  # Kolmogorov–Smirnov at 0.1 %


def test_lambda_of_small_alpha_has_the_moments_of_the_beta_distribution():
    drawn = draw_lambda(0.2, 50000, generator_for(2)).double()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.005)


def test_lambda_and_its_complement_are_exact():
    lam = draw_lambda(0.3, 10000, generator_for(3))
    assert torch.equal(1 - (1 - lam), lam)
    assert torch.equal(complementary(lam), lam)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_blend_is_the_formula(dtype):
    x = torch.randn(5, 3, 4).to(dtype)
    partner, lam = torch.tensor([2, 0, 1, 4, 3]), torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0])
    expected = lam.view(-1, 1, 1).double() * x.double() + (1 - lam).view(-1, 1, 1).double() * x.double()[partner]
    mixed = blend(x, partner, lam)
    assert mixed.dtype == dtype
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # λ itself is a float32
    torch.testing.assert_close(mixed.double(), expected, rtol=2 * step, atol=2 * step)


def test_blend_rounds_integers():
    mixed = blend(torch.tensor([[10], [255]], dtype=torch.uint8), torch.tensor([1, 0]), torch.tensor([0.83]))
    assert mixed.tolist() == [[52], [213]]  # 51.65 and 213.35
    assert mixed.dtype == torch.uint8


def test_blend_keeps_the_memory_format_and_leaves_its_input_alone():
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert blend(x, torch.tensor([3, 2, 1, 0]), torch.tensor([0.5])).is_contiguous(memory_format=torch.channels_last)
    assert paste(x, x, torch.tensor([3, 2, 1, 0]), [(0, 2, 0, 2)]).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_boxes_lie_inside_the_image_and_are_no_larger_than_asked(height, width, lam, seed):
    top, bottom, left, right = cut_box(height, width, lam, generator_for(seed))
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert (bottom - top) <= height * math.sqrt(1 - lam)
    assert (right - left) <= width * math.sqrt(1 - lam)
    assert 0 <= kept_share((top, bottom, left, right), height, width) <= 1


def test_boxes_sit_anywhere_and_have_the_right_area_on_average():
    sides = [cut_box(1000, 1000, 0.75, generator_for(i)) for i in range(2000)]
    whole = [box for box in sides if box[0] > 0 and box[1] < 1000 and box[2] > 0 and box[3] < 1000]
    assert {kept_share(box, 1000, 1000) for box in whole} == {0.75}
    centres = np.array([(box[0] + box[1]) / 2 for box in whole])
    assert centres.min() < 300
    assert centres.max() > 700


def test_each_image_gets_its_own_box_of_its_partner():
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    mixed = paste(x, x, torch.tensor([1, 2, 0]), [(0, 1, 0, 4), (0, 0, 0, 0), (2, 4, 0, 2)])
    assert [(mixed[i] != i).sum().item() for i in range(3)] == [4, 0, 4]
    assert mixed[0, 0, 0].tolist() == [1.0] * 4
    assert mixed[2, 0, 3, :2].tolist() == [0.0] * 2
