"""Against torch's CrossEntropyLoss where they must agree, and against the closed form where torch surprises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_speedups import LabelSmoothingLoss
from lightning_speedups.tensors.labels import MixedLabels

C = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])
EACH = torch.tensor([0.0, 0.1, 0.3, 0.7])


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


def test_scores_of_sequences_with_the_classes_last_are_refused_with_the_way_out():
    scores, labels = torch.randn(3, 6, C), torch.zeros(3, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"but got \(3, 6\)\. Scores with the classes last need `scores\.movedim"):
        LabelSmoothingLoss()(scores, labels)
    LabelSmoothingLoss()(scores.movedim(-1, 1), labels)


def test_the_class_weights_move_with_the_module_and_its_settings_show():
    loss = LabelSmoothingLoss(0.1, WEIGHT)
    assert loss.double().weight.dtype == torch.float64
    assert "smoothing=0.1" in repr(loss)


def closed_form(scores, targets, smoothing, weight, reduction):
    """numpy, from the formula: targets (N, C, ...) that sum to 1, or to 0 where they are ignored."""
    scores, targets = np.moveaxis(scores.double().numpy(), 1, -1), np.moveaxis(targets.double().numpy(), 1, -1)
    smoothing = np.broadcast_to(np.asarray(smoothing, dtype=np.float64), C)
    weight = np.ones(C) if weight is None else weight.double().numpy()
    smoothed = sum(
        targets[..., [c]] * ((1 - smoothing[c]) * np.eye(C)[c] + smoothing[c] / C) for c in range(C)
    )  # t' = Σ_c t_c [(1 − ε_c) e_c + ε_c / C]
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    loss = -(smoothed * weight * logp).sum(-1)
    if reduction == "none":
        return torch.from_numpy(loss)
    total = (targets * weight).sum() if reduction == "mean" else 1.0
    return torch.tensor(loss.sum() / total if total else 0.0, dtype=torch.float64)


def kinds_of_target(shape, ignore_index, seed):
    """The same targets as class indices, mixed labels and probabilities, each with the probabilities it stands for."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, C, shape, generator=generator) for _ in range(2))
    lam = torch.rand(shape[:1], generator=generator)
    share = lam.view(-1, *[1] * (len(shape) - 1)).unsqueeze(1)
    kept = (torch.rand(shape, generator=generator) > 0.3) & (first != ignore_index) & (second != ignore_index)
    hot, hot_other = (F.one_hot(labels, C).movedim(-1, 1) for labels in (first, second))
    mixture = share * hot + (1 - share) * hot_other
    yield torch.where(kept, first, ignore_index), hot * kept.unsqueeze(1)
    yield (
        MixedLabels.mix(torch.where(kept, first, ignore_index), torch.where(kept, second, ignore_index), lam),
        mixture * kept.unsqueeze(1),
    )
    yield mixture, mixture


@given(
    st.sampled_from([(1,), (6,), (5, 3), (4, 2, 3)]),
    st.one_of(st.floats(0, 0.99), st.lists(st.floats(0, 0.99), min_size=C, max_size=C)),
    st.booleans(),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([-100, 1]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_every_kind_of_target_follows_the_formula(shape, smoothing, weighted, reduction, ignore_index, driven, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(shape[0], C, *shape[1:], generator=generator, dtype=torch.float64)
    weight = torch.rand(C, generator=generator) + 0.05 if weighted else None
    loss = LabelSmoothingLoss(smoothing, weight, ignore_index, reduction)
    factor = 1.0
    if driven:
        factor, loss.strength = 0.5, torch.tensor(0.5)
    for target, stands_for in kinds_of_target(shape, ignore_index, seed):
        if target.is_floating_point() and bool((target.amin(1) > 0).any()):
            continue  # counts as smoothed already
        expected = closed_form(scores, stands_for, np.multiply(smoothing, factor), weight, reduction)
        # The list of ε is kept as float32.
        torch.testing.assert_close(loss(scores, target), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2), ()])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_same_smoothing_for_each_class_equals_torch_with_one_number(shape, weight, reduction):
    x, target = torch.randn(*shape[:1], C, *shape[1:]), torch.randint(0, C, shape)
    expected = nn.CrossEntropyLoss(weight, label_smoothing=0.3, reduction=reduction)(x, target)
    torch.testing.assert_close(LabelSmoothingLoss([0.3] * C, weight, reduction=reduction)(x, target), expected)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_each_sample_is_smoothed_by_its_own_class(weight):
    x, target = torch.randn(40, C), torch.randint(0, C, (40,))
    each = LabelSmoothingLoss(EACH, weight, reduction="none")(x, target)
    for c, epsilon in enumerate(EACH.tolist()):
        expected = F.cross_entropy(x, target, weight, label_smoothing=epsilon, reduction="none")
        torch.testing.assert_close(each[target == c], expected[target == c])


def test_a_number_goes_through_torch_to_the_bit():
    x, target = torch.randn(9, C), torch.randint(0, C, (9,))
    apart = F.cross_entropy(x, target, WEIGHT, label_smoothing=0.1, reduction="none")
    assert torch.equal(LabelSmoothingLoss(0.1, WEIGHT, reduction="none")(x, target), apart)
    assert torch.equal(LabelSmoothingLoss(0.1, WEIGHT)(x, target), apart.sum() / WEIGHT[target].sum())


def test_targets_smoothed_by_class_are_not_smoothed_again():
    x, target = torch.randn(7, C), torch.randint(0, C, (7,))
    own = EACH[target].unsqueeze(1)
    once = (1 - own) * F.one_hot(target, C) + own / C
    loss = LabelSmoothingLoss(EACH)
    torch.testing.assert_close(loss(x, once), loss(x, target))


@pytest.mark.parametrize("smoothing", [EACH, 0.3])
def test_ignored_targets_have_no_loss_and_no_gradient_with_a_tensor_of_smoothing(smoothing):
    x, target = torch.randn(6, C), torch.randint(0, C, (6,))
    target[:3] = -100
    x[0, 1] = float("-inf")  # an ignored sample may hold anything
    x.requires_grad_()
    loss = LabelSmoothingLoss(smoothing, WEIGHT)
    loss.strength = torch.tensor(0.5)
    loss(x, target).backward()
    assert torch.equal(x.grad[:3], torch.zeros(3, C))
    torch.testing.assert_close(loss(x, target), loss(x[3:], target[3:]))
    assert loss(x[:3], target[:3]).item() == 0.0


def test_gradient_is_right_with_one_smoothing_for_each_class():
    x = torch.randn(5, C, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (5, 2))
    assert torch.autograd.gradcheck(lambda s: LabelSmoothingLoss(EACH.double(), WEIGHT)(s, target), (x,))
    soft = F.one_hot(target, C).movedim(-1, 1).double()
    ours, theirs = (torch.autograd.grad(LabelSmoothingLoss(EACH, WEIGHT)(x, t), x)[0] for t in (target, soft))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_a_float32_loss_with_one_smoothing_for_each_class(dtype):
    x, target = torch.randn(5, C).to(dtype), torch.randint(0, C, (5,))
    loss = LabelSmoothingLoss(EACH, WEIGHT)
    assert loss(x, target).dtype == torch.float32
    torch.testing.assert_close(loss(x, target), loss(x.float(), target), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(x.float(), target), loss(x, target), rtol=1e-6, atol=0)


def test_a_number_of_classes_that_does_not_fit_is_refused():
    for target in (torch.tensor([0, 1]), torch.eye(3)[:2]):
        with pytest.raises(ValueError, match=r"Expected scores of shape \(N, 4, ...\) for a `smoothing` of 4 values"):
            LabelSmoothingLoss(EACH)(torch.randn(2, 3), target)


def test_a_label_that_is_no_class_is_an_error():
    for label in (7, -1):
        with pytest.raises(ValueError, match=f"Expected class labels from 0 to .* but got {label}"):
            LabelSmoothingLoss(EACH)(torch.randn(2, C), torch.tensor([0, label]))


@pytest.mark.parametrize("smoothing", [EACH, 0.3])
@pytest.mark.parametrize(
    "target", [torch.tensor([1, 2, 3]), MixedLabels.mix(*torch.randint(0, C, (2, 3)), torch.rand(3))]
)
def test_it_calls_torchs_loss_once_for_each_batch(target, smoothing, monkeypatch):
    """What reads or weighs samples inside torch's losses sees the whole loss of each."""
    seen, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *given, **named: seen.append(original(*given, **named)) or seen[-1])
    monkeypatch.setattr(F, "nll_loss", None)
    loss = LabelSmoothingLoss(smoothing, reduction="none")
    loss.strength = torch.tensor(0.5)
    result = loss(torch.randn(3, C), target)
    assert len(seen) == 1
    assert torch.equal(result, seen[0])


@pytest.mark.parametrize("smoothing", [EACH, 0.3])
def test_a_compiled_loss_is_compiled_twice_for_all_strengths(smoothing):
    torch._dynamo.reset()
    loss = LabelSmoothingLoss(smoothing, WEIGHT)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(6, C), torch.randint(0, C, (6,))
    compiled(x, target)  # without a schedule
    loss.strength = torch.tensor(0.9)
    compiled(x, target)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.7, 0.3, None, 0.1):
            loss.strength = None if strength is None else torch.tensor(strength)
            torch.testing.assert_close(compiled(x, target), loss(x, target))
        mixed = MixedLabels.mix(target, target.flip(0), torch.rand(6))
    torch.testing.assert_close(compiled(x, mixed), loss(x, mixed))


def test_the_smoothing_of_each_class_shows():
    assert "smoothing=tensor([0.0000, 0.1000, 0.3000, 0.7000])" in repr(LabelSmoothingLoss(EACH))


@pytest.mark.parametrize("trailing", [(), (3,)])
@pytest.mark.parametrize("smoothing", [0.0, [0.0] * C, "to nothing"])
@pytest.mark.parametrize("kind", ["indices", "probabilities", "mixed"])
def test_classes_that_are_masked_away_cost_nothing(kind, smoothing, trailing):
    """Without smoothing it is torch's loss of indices, which touches no other class."""
    loss = LabelSmoothingLoss(0.3 if smoothing == "to nothing" else smoothing)
    if smoothing == "to nothing":
        loss.strength = torch.tensor(0.0)
    first, second = torch.randint(0, 2, (2, 6, *trailing))
    lam = torch.linspace(0, 1, 6)
    share = lam.view(-1, *[1] * len(trailing))
    one_hot = F.one_hot(first, C).movedim(-1, 1).float()
    target = {"indices": first, "probabilities": one_hot, "mixed": MixedLabels.mix(first, second, lam)}[kind]
    x = torch.randn(6, C, *trailing, requires_grad=True)
    scores = x.masked_fill((torch.arange(C) >= 2).view(-1, *[1] * len(trailing)), -torch.inf)
    expected = F.cross_entropy(scores, first, reduction="none")
    if kind == "mixed":
        expected = share * expected + (1 - share) * F.cross_entropy(scores, second, reduction="none")
    torch.testing.assert_close(loss(scores, target), expected.mean())
    (ours,) = torch.autograd.grad(loss(scores, target), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.mean(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.3, EACH, 0.0])
@pytest.mark.parametrize("kind", ["indices", "mixed"])
def test_an_ignored_target_may_have_any_scores(kind, smoothing):
    target = torch.tensor([-100, 1, 2, -100])
    target = MixedLabels.mix(target, target, torch.tensor([0.7])) if kind == "mixed" else target
    x = torch.randn(4, C)
    x[0], x[3, 1] = torch.nan, torch.inf
    x.requires_grad_()
    loss = LabelSmoothingLoss(smoothing)(x, target)
    loss.backward()
    torch.testing.assert_close(loss, LabelSmoothingLoss(smoothing)(x[1:3], target[1:3]))
    assert x.grad[1:3].isfinite().all()
