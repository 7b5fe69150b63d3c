"""Against torch's CrossEntropyLoss where they must agree, and against the closed form where torch surprises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_speedups import LabelSmoothingLoss
from lightning_speedups.core.labels import MixedLabels

C = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])


def EXAMPLE():
    return {"criterion": LabelSmoothingLoss(0.1)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2), ()])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_class_indices_equal_torch(shape, weight, smoothing, reduction, ignore_index):
    x = torch.randn(*shape[:1], C, *shape[1:])
    target = torch.randint(0, C, shape)
    if shape:
        target[0] = ignore_index
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    if not shape and target == ignore_index:
        target = torch.tensor(0)
    expected = nn.CrossEntropyLoss(label_smoothing=smoothing, **options)(x, target)
    torch.testing.assert_close(LabelSmoothingLoss(smoothing, **options)(x, target), expected)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_hot_and_index_targets_give_one_loss_also_with_class_weights(weight, reduction):
    x, target = torch.randn(9, C, 2), torch.randint(0, C, (9, 2))
    loss = LabelSmoothingLoss(0.2, weight, reduction=reduction)
    torch.testing.assert_close(loss(x, F.one_hot(target, C).movedim(-1, 1).float()), loss(x, target))
    if weight is not None and reduction == "mean":
        soft = F.cross_entropy(x, F.one_hot(target, C).movedim(-1, 1).float(), weight, label_smoothing=0.2)
        assert not torch.isclose(soft, loss(x, target), rtol=0.02)  # torch's own two forms differ


def test_mixed_labels_are_smoothed_once_with_the_summed_weight_as_normaliser():
    first, second, lam = torch.randint(0, C, (8,)), torch.randint(0, C, (8,)), torch.rand(8)
    x = torch.randn(8, C)
    soft = lam[:, None] * F.one_hot(first, C) + (1 - lam[:, None]) * F.one_hot(second, C)
    smoothed = 0.9 * soft + 0.1 / C
    expected = -(smoothed * WEIGHT * x.log_softmax(1)).sum() / (soft * WEIGHT).sum()
    torch.testing.assert_close(LabelSmoothingLoss(0.1, WEIGHT)(x, MixedLabels.mix(first, second, lam)), expected)
    torch.testing.assert_close(LabelSmoothingLoss(0.1, WEIGHT)(x, soft), expected)


@pytest.mark.parametrize("weight", [None, torch.rand(200) + 0.1])
def test_byte_labels_equal_whole_ones(weight):
    x, target = torch.randn(3, 200), torch.tensor([0, 156, 3])
    loss = LabelSmoothingLoss(0.1, weight)
    assert torch.equal(loss(x, target.byte()), loss(x, target))


def test_probabilities_are_taken_in_the_precision_of_the_loss():
    x, soft = torch.randn(3, C), torch.eye(C)[:3]
    expected = LabelSmoothingLoss(0.1)(x, soft)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        loss = LabelSmoothingLoss(0.1)(x, soft.to(dtype))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


def test_targets_that_are_smoothed_already_are_not_smoothed_again():
    x, target = torch.randn(7, C), torch.randint(0, C, (7,))
    once = 0.8 * F.one_hot(target, C) + 0.2 / C
    torch.testing.assert_close(LabelSmoothingLoss(0.2)(x, once), F.cross_entropy(x, target, label_smoothing=0.2))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_nothing_but_ignored_targets_is_zero_with_a_zero_gradient(weight):
    x = torch.randn(3, C, requires_grad=True)
    loss = LabelSmoothingLoss(0.1, weight)(x, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_a_float32_loss(dtype):
    x, target = torch.randn(5, C).to(dtype), torch.randint(0, C, (5,))
    loss = LabelSmoothingLoss(0.1)(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), target, label_smoothing=0.1), rtol=1e-6, atol=0)


def test_gradient_is_right():
    x = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(3, C, dtype=torch.float64) * (torch.arange(C) > 0)
    assert torch.autograd.gradcheck(lambda s: LabelSmoothingLoss(0.3, WEIGHT)(s, soft), (x,))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"smoothing": 1.0}, r"`smoothing` to be a number in \[0, 1\), but got 1.0"),
        ({"smoothing": -0.1}, "`smoothing`"),
        ({"smoothing": float("nan")}, "`smoothing`"),
        ({"reduction": "avg"}, "`reduction` to be 'none', 'mean' or 'sum', but got 'avg'"),
        ({"weight": torch.tensor([1.0, -1.0])}, "`weight`"),
        ({"weight": torch.ones(2, 2)}, "`weight`"),
        ({"weight": [1.0, 2.0]}, "`weight` to be a tensor"),
        ({"ignore_index": float("nan")}, "`ignore_index`"),
        ({"smoothing": "0.1"}, "`smoothing`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        LabelSmoothingLoss(**arguments)


@pytest.mark.parametrize(
    "target", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, C + 1), torch.zeros(2, dtype=torch.int64)]
)
def test_targets_that_do_not_fit_are_refused(target):
    with pytest.raises(ValueError, match="Expected `target` of shape"):
        LabelSmoothingLoss()(torch.randn(3, C), target)


def test_the_class_weights_move_with_the_module_and_its_settings_show():
    loss = LabelSmoothingLoss(0.1, WEIGHT)
    assert loss.double().weight.dtype == torch.float64
    assert "smoothing=0.1" in repr(loss)
