"""λ against the Beta distribution, blends and boxes against their formulas and against timm's."""

import math

import numpy as np
import pytest
import scipy.stats
import timm.data.mixup
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.mixing import (
    Mixture,
    blend,
    blended_share,
    boxes_in,
    complementary,
    cut_box,
    draw_lambda,
    draw_mixture,
    kept_share,
    mix_values,
    paste,
)
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.tensors.labels import mix_targets, soft_targets


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 8.0])
def test_lambda_follows_the_beta_distribution(alpha):
    count = 20000
    drawn = draw_lambda(alpha, count, generator_for(1)).double().numpy()
    # At these points, and not at 0 and 1, where a small alpha's float32 numbers heap up.
    points = np.linspace(0.001, 0.999, 999)
    shares = np.searchsorted(np.sort(drawn), points, side="right") / count
    gap = np.abs(shares - scipy.stats.beta.cdf(points, alpha, alpha)).max()
    assert gap < 1.95 / math.sqrt(count)  # Kolmogorov–Smirnov at 0.1 %
    if alpha >= 0.4:
        assert scipy.stats.kstest(drawn, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.001


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e-3, 1e6])
def test_lambda_is_a_number_however_small_or_large_alpha_is(alpha):
    drawn = draw_lambda(alpha, 2000, generator_for(1))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_a_mixture_has_that_lambda(alpha, per_element):
    size, batches = (40, 50) if per_element else (2, 2000)
    mixtures = [
        draw_mixture((size, 3), generator_for(i), alpha=alpha, cutmix_alpha=0.0, per_element=per_element)
        for i in range(batches)
    ]
    drawn = [torch.ones(1) if mixture.method == "none" else mixture.lam for mixture in mixtures]
    assert all(len(lam) == (size if per_element else 1) for lam in drawn)
    drawn = torch.cat(drawn).double().numpy()
    assert scipy.stats.kstest(drawn, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.001


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


@pytest.mark.parametrize("lam", [0.0, 0.21, 0.5, 0.83, 1.0])
def test_a_box_around_the_same_centre_is_timms(lam, monkeypatch):
    for seed, (height, width) in enumerate([(32, 32), (17, 40), (40, 17), (1, 9), (224, 160)] * 20):
        centre = (
            torch.rand(2, generator=generator_for(seed), dtype=torch.float64) * torch.tensor([height, width])
        ).int()
        centre = iter(centre.tolist())
        monkeypatch.setattr(np.random, "randint", lambda *_, size=None, centre=centre: next(centre))
        theirs = [int(edge) for edge in timm.data.mixup.rand_bbox((4, 3, height, width), lam)]
        assert cut_box(height, width, lam, generator_for(seed)) == tuple(theirs)


@pytest.mark.parametrize("cutmix", [False, True])
def test_a_mixed_batch_is_timms(cutmix, monkeypatch):
    x, y, box = torch.randn(6, 3, 12, 10), torch.randint(0, 5, (6,)), (3, 8, 0, 7)
    lam = 1 - 5 * 7 / 120 if cutmix else 0.37
    theirs = timm.data.mixup.Mixup(label_smoothing=0.0, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (lam, cutmix))
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda shape, lam, **_: (box, lam))
    their_x, their_y = theirs(x.clone(), y)
    partner = torch.arange(5, -1, -1)  # timm's
    mixture = Mixture(
        "cutmix" if cutmix else "mixup",
        torch.tensor([lam]),
        partner,
        (box,) if cutmix else (),
        (12, 10) if cutmix else None,
    )
    torch.testing.assert_close(mix_values(x, mixture), their_x)
    torch.testing.assert_close(soft_targets(mix_targets(y, mixture), 5)[0], their_y)
    assert torch.equal(their_y, timm.data.mixup.mixup_target(y, 5, lam, 0.0))


def test_lambda_of_cutmix_is_the_share_that_the_box_leaves():
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 9)
    for seed in range(30):
        mixture = draw_mixture(x.shape, generator_for(seed), alpha=0.0, cutmix_alpha=1.0, per_element=True)
        moved = mixture.partner != torch.arange(6)
        kept = (mix_values(x, mixture) == x).double().mean((1, 2, 3))
        torch.testing.assert_close(kept[moved], mixture.lam.double()[moved], rtol=0, atol=1e-7)
        assert mixture.method == "cutmix"
        assert mixture.frame == (16, 9)
        assert len(mixture.boxes) == 6


def by_hand(x, mixture):
    """Sample for sample, in plain loops."""
    lam, mixed = mixture.lam.double().expand(len(x)), x.double().clone()
    boxes = mixture.boxes if len(mixture.boxes) == len(x) else mixture.boxes * len(x)
    for i, partner in enumerate(mixture.partner.tolist()):
        if boxes and boxes[i] != (0, 0, 0, 0):
            top, bottom, left, right = boxes[i]
            for row in range(top, bottom):
                for column in range(left, right):
                    mixed[i, ..., row, column] = x[partner, ..., row, column].double()
        elif mixture.method != "cutmix":
            mixed[i] = lam[i] * x[i].double() + (1 - lam[i]) * x[partner].double()
    return mixed


OPTIONS = {
    "mixup": {"alpha": 1.0, "cutmix_alpha": 0.0},
    "cutmix": {"alpha": 0.0, "cutmix_alpha": 1.0},
    "both": {"alpha": 1.0, "cutmix_alpha": 1.0},
}


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 3, 9, 14), (5, 14, 9), (1, 3, 6, 6), (4, 2, 3, 8, 7)])
def test_a_mixture_does_to_each_sample_what_it_says(shape, method, per_element):
    x, seen = torch.randn(shape), set()
    before = x.clone()
    for seed in range(12):
        mixture = draw_mixture(shape, generator_for(seed), **OPTIONS[method], prob=0.8, per_element=per_element)
        seen.add(mixture.method)
        if mixture.method == "none":
            assert mix_values(x, mixture) is x
        else:
            torch.testing.assert_close(mix_values(x, mixture).double(), by_hand(x, mixture), rtol=0, atol=1e-6)
    assert torch.equal(x, before)
    assert method in seen or not (per_element and len(x) > 1)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("method", OPTIONS)
def test_type_and_memory_format_are_kept(method, dtype, per_element):
    for shape, memory_format in (((6, 3, 5, 8), torch.channels_last), ((6, 3, 2, 5, 8), torch.channels_last_3d)):
        x = (torch.rand(shape) * 255).to(dtype).contiguous(memory_format=memory_format)
        for seed in range(6):
            for one in (x, x[:1], x.contiguous()):
                mixture = draw_mixture(one.shape, generator_for(seed), **OPTIONS[method], per_element=per_element)
                mixed = mix_values(one, mixture)
                assert mixed.stride() == one.stride()
                assert mixed.dtype == dtype
                tolerance = 0.5001 if dtype == torch.uint8 else 256 * torch.finfo(dtype).eps
                if mixture.method == "cutmix":
                    tolerance = 0
                torch.testing.assert_close(mixed.double(), by_hand(one, mixture), rtol=0, atol=tolerance)


def test_boxes_scale_with_the_size():
    mixture = Mixture("cutmix", boxes=((3, 9, 0, 32), (0, 0, 0, 0)), frame=(16, 32))
    assert boxes_in(mixture, (2, 16, 32)) == list(mixture.boxes)
    assert boxes_in(mixture, (2, 1, 32, 64)) == [(6, 18, 0, 64), (0, 0, 0, 0)]
    assert boxes_in(mixture, (2, 4, 8)) == [(1, 2, 0, 8), (0, 0, 0, 0)]  # 0.75 and 2.25
    assert boxes_in(mixture, (2, 8, 10)) == [(2, 5, 0, 10), (0, 0, 0, 0)]  # halves up: 1.5 and 4.5


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(0, 10**6))
def test_a_scaled_box_lies_inside_and_is_off_by_half_a_pixel_at_most(size, height, width, seed):
    box = cut_box(size, size, 0.5, generator_for(seed))
    ((top, bottom, left, right),) = boxes_in(Mixture("cutmix", boxes=(box,), frame=(size, size)), (height, width))
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    exact = [box[0] * height / size, box[1] * height / size, box[2] * width / size, box[3] * width / size]
    assert np.abs(np.array([top, bottom, left, right]) - exact).max() <= 0.5


def test_what_is_pasted_is_not_blended_and_labels_know():
    mixture = draw_mixture((40, 1, 8, 8), generator_for(5), alpha=1.0, cutmix_alpha=1.0, prob=0.7, per_element=True)
    pasted = torch.tensor([box != (0, 0, 0, 0) for box in mixture.boxes])
    share = blended_share(mixture)
    assert mixture.method == "both"
    assert torch.equal(share[pasted], torch.ones(int(pasted.sum())))
    assert torch.equal(share[~pasted], mixture.lam[~pasted])
    assert (mixture.lam[pasted] < 1).any()
    assert (mixture.lam == 1).any()  # prob left some alone


def test_the_alphas_decide_the_method():
    def methods(**options):
        return {draw_mixture((6, 1, 8, 8), generator_for(i), **options).method for i in range(40)}

    assert methods(alpha=1.0, cutmix_alpha=0.0, switch_prob=1.0) == {"mixup"}
    assert methods(alpha=0.0, cutmix_alpha=1.0, switch_prob=0.0) == {"cutmix"}
    assert methods(alpha=1.0, cutmix_alpha=1.0, switch_prob=0.0) == {"mixup"}
    assert methods(alpha=1.0, cutmix_alpha=1.0, switch_prob=1.0) == {"cutmix"}
    assert methods(alpha=1.0, cutmix_alpha=1.0, switch_prob=0.5) == {"mixup", "cutmix"}
    assert methods(alpha=1.0, cutmix_alpha=1.0, prob=0.0) == {"none"}
    assert methods(alpha=0.0, cutmix_alpha=0.0) == {"none"}
    assert methods(alpha=1.0, cutmix_alpha=1.0, prob=0.5, per_element=True) >= {"both"}


@pytest.mark.parametrize("method", OPTIONS)
def test_prob_is_the_share_of_samples_that_are_mixed(method):
    many, alphas = (4000, 1, 32, 32), {name: 8 * alpha for name, alpha in OPTIONS[method].items()}  # λ around a half
    mixture = draw_mixture(many, generator_for(0), **alphas, prob=0.6, per_element=True)
    assert abs((mixture.lam < 1).double().mean().item() - 0.6) < 3 * math.sqrt(0.24 / 4000)


def test_a_mixture_needs_few_operations():
    """In a small network it is their number, not their size, that costs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with Count() as counter:
        mixture = draw_mixture(x.shape, generator_for(0), alpha=0.2, cutmix_alpha=0.0)
        mix_values(x, mixture)
        mix_targets(y, mixture)
    assert counter.count <= 26


def blended_by_hand(values, partner, lam):
    """The same in Python's numbers, where a share of 0 is not multiplied at all."""
    rows = []
    for i, j in enumerate(partner.tolist()):
        share = lam[i if len(lam) > 1 else 0].item()
        parts = [(share, values[i]), (1 - share, values[j])]
        rows.append(torch.stack([share * part.double() for share, part in parts if share > 0]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("worst", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)])
def test_a_share_of_nothing_spoils_nothing(worst, shape):
    values = torch.randn(5, *shape)
    values[1] = values[4] = worst
    partner, lam = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([1.0, 0.0, 0.75, 1.0, 0.25])
    values.requires_grad_()
    mixed = blend(values, partner, lam)
    torch.testing.assert_close(mixed.double(), blended_by_hand(values, partner, lam), equal_nan=True)
    assert torch.equal(mixed[[0, 1]], values[[0, 0]])
    gradient = torch.autograd.grad(mixed[:2].sum(), values)[0]
    assert torch.equal(gradient.flatten(1)[:, 0] if shape else gradient, torch.tensor([2.0, 0, 0, 0, 0]))


def test_two_infinities_of_one_sign_are_one():
    values, partner = torch.tensor([-torch.inf, -torch.inf, 1.0]), torch.tensor([1, 2, 0])
    for lam in (torch.tensor([0.25]), torch.tensor([0.75]), torch.tensor([0.25, 0.5, 0.75])):
        assert blend(values, partner, lam).tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("options", [{"prob": 0.5}, {"alpha": 0.02}, {"cutmix_alpha": 0.02, "prob": 0.7}])
def test_unmixed_samples_are_those_that_were_given_whatever_their_partners_hold(options):
    x, y, unmixed = torch.randn(16, 1, 8, 8), torch.arange(16) % 4, 0
    x[::3], ignored = torch.nan, y.clone()
    ignored[::3] = -100
    for seed in range(20):
        mixture = draw_mixture(
            x.shape, generator_for(seed), **{"alpha": 0.4, "cutmix_alpha": 0.0, **options}, per_element=True
        )
        pure = torch.ones(16, dtype=torch.bool) if mixture.lam is None else mixture.lam == 1
        unmixed += int(pure.sum())
        assert torch.equal(mix_values(x, mixture)[pure].nan_to_num(7), x[pure].nan_to_num(7))
        targets = mix_targets(ignored, mixture)
        assert torch.equal(torch.as_tensor(targets.tolist())[pure], ignored[pure])
        assert mixture.lam is None or bool((mixture.lam > 0).all())
    assert 0 < unmixed < 320


def test_a_batch_that_keeps_all_of_itself_is_not_mixed():
    kept = [draw_mixture((4, 3), generator_for(i), alpha=0.02, cutmix_alpha=0.0) for i in range(60)]
    assert {mixture.method for mixture in kept} == {"none", "mixup"}
    assert all(0 < mixture.lam < 1 for mixture in kept if mixture.method == "mixup")


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 1e-3, 9e-3])
def test_hardly_any_alpha_hardly_mixes(alpha):
    lam = draw_lambda(alpha, 4000, generator_for(0)).double()
    inside = ((lam > 0.01) & (lam < 0.99)).double().mean().item()
    expected = float(np.diff(scipy.stats.beta(alpha, alpha).cdf([0.01, 0.99]))[0])
    assert inside == pytest.approx(expected, abs=3 * math.sqrt(expected / 4000) + 1e-3)


def test_a_box_without_pixels_leaves_targets_as_they_were_whatever_their_partners_hold():
    x, targets, kept = torch.randn(6, 1, 4, 4), torch.tensor([0.5, torch.nan, 2.0, torch.nan, 1.0, 3.0]), 0
    for seed in range(100):
        mixture = draw_mixture(x.shape, generator_for(seed), alpha=0.0, cutmix_alpha=1.0)
        if mixture.lam == 1:
            kept += 1
            assert torch.equal(mix_targets(targets, mixture).nan_to_num(7), targets.nan_to_num(7))
            assert torch.equal(mix_values(x, mixture), x)
    assert kept > 3
