"""Mixed labels against torch's own losses on the soft targets that they stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

from lightning_speedups.core.mixing import Mixture, draw_lambda, draw_mixture
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.tensors.labels import MixedLabels, Reads, mix_targets, smooth_targets, soft_targets

N, C = 64, 5
WEIGHT = torch.tensor([0.3, 1.7, 0.9, 2.2, 0.1])


def mixture(shape=(N,), per_element=True, seed=0):
    """Mixed labels, and the probabilities they stand for, made by hand."""
    generator = generator_for(seed)
    first = torch.randint(0, C, shape, generator=generator)
    second = first[torch.randperm(len(first), generator=generator)]
    lam = draw_lambda(0.5, shape[0] if per_element else 1, generator)
    share = lam.view(-1, *[1] * len(shape))
    soft = share * F.one_hot(first, C) + (1 - share) * F.one_hot(second, C)
    return MixedLabels.mix(first, second, lam), soft.movedim(-1, 1).contiguous(), first, second, lam


def scores(*trailing, dtype=torch.float32):
    return torch.randn(N, C, *trailing, generator=generator_for(9)).to(dtype)


@pytest.mark.parametrize("per_element", [True, False])
@pytest.mark.parametrize("trailing", [(), (3,), (4, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT}, {"weight": WEIGHT, "label_smoothing": 0.2}, {"reduction": "sum"},
     {"reduction": "none", "weight": WEIGHT, "label_smoothing": 0.3}],
)  # fmt: skip
def test_cross_entropy_equals_the_soft_target_loss_to_the_last_digit(options, trailing, per_element):
    labels, soft, *_ = mixture((N, *trailing), per_element)
    x = scores(*trailing)
    assert torch.equal(F.cross_entropy(x, labels, **options), F.cross_entropy(x, soft, **options))


def test_modules_and_positional_arguments_are_the_same():
    labels, soft, *_ = mixture()
    x = scores()
    expected = F.cross_entropy(x, soft, WEIGHT, label_smoothing=0.1)
    assert torch.equal(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(x, labels), expected)
    assert torch.equal(F.cross_entropy(x, labels, WEIGHT, None, -100, None, "mean", 0.1), expected)
    with pytest.warns(UserWarning, match="please use reduction='sum'"):
        summed = F.cross_entropy(input=x, target=labels, size_average=False)
    assert torch.equal(summed, F.cross_entropy(x, soft, reduction="sum"))
    assert torch.equal(nn.NLLLoss()(x.log_softmax(1), labels), F.cross_entropy(x, soft))
    torch.testing.assert_close(
        nn.NLLLoss(WEIGHT, reduction="none")(x.log_softmax(1), labels),
        F.cross_entropy(x, soft, WEIGHT, reduction="none"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_equal_torch_on_float32_targets(dtype):
    labels, soft, *_ = mixture()
    x = scores(dtype=dtype)
    assert torch.equal(F.cross_entropy(x, labels), F.cross_entropy(x, soft))


def test_gradient_equals_the_soft_target_gradient():
    labels, soft, *_ = mixture()
    x = scores().requires_grad_()
    ours = torch.autograd.grad(F.cross_entropy(x, labels, label_smoothing=0.1), x)[0]
    assert torch.equal(ours, torch.autograd.grad(F.cross_entropy(x, soft, label_smoothing=0.1), x)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_samples_count_for_nothing(ignore_index, smoothing):
    _, _, first, second, lam = mixture()
    first, second = first.clone(), second.clone()
    first[first == 2], second[second == 2] = 1, 1
    ignored = torch.arange(N) % 3 == 0
    first[ignored], second[ignored] = ignore_index, ignore_index
    labels = MixedLabels.mix(first, second, lam)
    kept = ~ignored
    soft = lam[kept, None] * F.one_hot(first[kept], C) + (1 - lam[kept, None]) * F.one_hot(second[kept], C)
    options = {"weight": WEIGHT, "label_smoothing": smoothing}
    x = scores()
    torch.testing.assert_close(
        F.cross_entropy(x, labels, ignore_index=ignore_index, **options), F.cross_entropy(x[kept], soft, **options)
    )
    apart = F.cross_entropy(x, labels, ignore_index=ignore_index, reduction="none", **options)
    assert torch.equal(apart[ignored], torch.zeros(int(ignored.sum())))


def test_a_sample_whose_partner_is_ignored_counts_by_its_share():
    labels = MixedLabels.mix(torch.tensor([1, 3]), torch.tensor([-100, 3]), torch.tensor([0.75]))
    x = scores()[:2]
    logp = x.double().log_softmax(1)
    expected = -(0.75 * logp[0, 1] + logp[1, 3]) / 1.75
    torch.testing.assert_close(F.cross_entropy(x, labels).double(), expected, rtol=1e-6, atol=0)
    assert labels.tolist() == [1, 3]


def test_one_hot_is_the_mixture():
    labels, soft, *_ = mixture()
    assert torch.equal(F.one_hot(labels, C), soft)
    assert torch.equal(F.one_hot(labels), soft)
    wide, soft_wide, *_ = mixture((N, 3))
    assert torch.equal(F.one_hot(wide, C), soft_wide.movedim(1, -1))


def test_they_are_the_dominant_labels_for_everything_else():
    labels, _, first, second, lam = mixture()
    dominant = torch.where(lam >= 0.5, first, second)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int64
    assert labels.tolist() == dominant.tolist()
    assert torch.equal(labels == dominant, torch.ones(N, dtype=torch.bool))
    assert torch.equal(WEIGHT[labels], WEIGHT[dominant])
    assert labels.sum().item() == dominant.sum().item()
    assert type(labels + 1) is type(labels == 1) is torch.Tensor
    assert labels.float().tolist() == dominant.tolist()
    assert torch.equal(torch.bincount(labels, minlength=C), torch.bincount(dominant, minlength=C))
    assert repr(labels).startswith("tensor([")
    assert torch.equal(pickle.loads(pickle.dumps(labels)), dominant)
    assert torch.equal(copy.deepcopy(labels), dominant)
    assert labels.numpy().tolist() == dominant.tolist()
    assert ["a", "b", "c", "d", "e"][labels[0]] == ["a", "b", "c", "d", "e"][dominant[0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.long(),
        lambda t: t.int().long(),
        lambda t: t.to("cpu"),
        lambda t: t.to(dtype=torch.int32).to(torch.int64),
        lambda t: t.cpu(),
        lambda t: t.view(-1),
        lambda t: t.view(8, 8).flatten(),
        lambda t: t.reshape(-1),
        lambda t: t.unsqueeze(1).squeeze(1),
        lambda t: torch.flatten(t.unsqueeze(1)),
        lambda t: t.clone().detach().contiguous(),
        lambda t: t[torch.arange(N)],
    ],
)
def test_shape_and_type_changes_keep_the_mixture(change):
    labels, soft, *_ = mixture()
    assert torch.equal(F.cross_entropy(scores(), change(labels)), F.cross_entropy(scores(), soft))


def test_a_selection_keeps_its_part_of_the_mixture():
    labels, soft, *_ = mixture()
    odd = torch.arange(N) % 2 == 1
    for select in (odd, slice(3, 20), torch.tensor([5, 1])):
        assert torch.equal(
            F.cross_entropy(scores()[select], labels[select]), F.cross_entropy(scores()[select], soft[select])
        )


@pytest.mark.parametrize(
    ("join", "how"),
    [
        (lambda t: torch.cat([t, t]), lambda x: torch.cat([x, x])),
        (lambda t: torch.cat(t.chunk(4)), lambda x: x),
        (lambda t: torch.cat(torch.split(t, 10)), lambda x: x),
        (lambda t: torch.stack(t.unbind()), lambda x: x),
        (lambda t: torch.stack(list(t)), lambda x: x),
        (lambda t: t.flip(0), lambda x: x.flip(0)),
        (lambda t: torch.flatten(input=t), lambda x: x),
        (lambda t: t.repeat(2), lambda x: x.repeat(2, 1)),
    ],
)
def test_parts_and_joints_keep_the_mixture(join, how):
    labels, soft, *_ = mixture()
    assert torch.equal(F.cross_entropy(how(scores()), join(labels)), F.cross_entropy(how(scores()), how(soft)))


def write_index(t):
    t[t == 0] = -100


@pytest.mark.parametrize(
    "write",
    [
        write_index,
        lambda t: t.sub_(1),
        lambda t: t.masked_fill_(t == 0, -100),
        lambda t: t.clamp_(max=2),
        lambda t: t.__iadd__(1),
    ],
)
def test_writing_into_them_is_refused_because_it_would_change_one_of_two(write):
    labels, soft, *_ = mixture()
    with pytest.raises(ValueError, match=r'would change mixed labels in place.*targets="soft"'):
        write(labels)
    assert torch.equal(F.cross_entropy(scores(), labels), F.cross_entropy(scores(), soft))


def test_one_sample_without_a_batch_dimension():
    labels, soft, *_ = mixture()
    for reduction in ("mean", "none", "sum"):
        assert torch.equal(
            F.cross_entropy(scores()[3], labels[3], reduction=reduction),
            F.cross_entropy(scores()[3], soft[3], reduction=reduction),
        )
    assert torch.equal(F.one_hot(labels[3], C), soft[3])
    for reduction in ("mean", "none", "sum"):
        torch.testing.assert_close(
            F.nll_loss(scores()[3].log_softmax(0), labels[3], reduction=reduction),
            F.cross_entropy(scores()[3], soft[3]),
        )
    torch.testing.assert_close(
        F.cross_entropy(scores()[3], labels[3], WEIGHT, label_smoothing=0.1),
        F.cross_entropy(scores()[3], soft[3], WEIGHT, label_smoothing=0.1),
    )


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda x, y: F.nll_loss(x.log_softmax(0), y), lambda x, y: F.one_hot(y, C)]
)
def test_one_sample_keeps_its_mixture_in_a_compiled_loss(loss):
    labels, *_ = mixture()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores()[3], labels[3]), loss(scores()[3], labels[3]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_few_bytes(dtype):
    first, second = torch.tensor([0, 156, 1], dtype=dtype), torch.tensor([156, 0, 1], dtype=dtype)
    x, lam = torch.randn(3, 200), torch.tensor([0.7])
    soft = 0.7 * F.one_hot(first.long(), 200) + (1 - lam) * F.one_hot(second.long(), 200)
    torch.testing.assert_close(F.cross_entropy(x, MixedLabels.mix(first, second, lam)), F.cross_entropy(x, soft))
    assert MixedLabels.mix(first, second, lam).type() == first.type()


METRICS = {
    "accuracy": torchmetrics.Accuracy("multiclass", num_classes=C),
    "top 2": torchmetrics.Accuracy("multiclass", num_classes=C, top_k=2),
    "macro f1": torchmetrics.F1Score("multiclass", num_classes=C, average="macro"),
    "auroc": torchmetrics.AUROC("multiclass", num_classes=C),
    "binned auroc": torchmetrics.AUROC("multiclass", num_classes=C, thresholds=10),
    "confusion": torchmetrics.ConfusionMatrix("multiclass", num_classes=C),
    "calibration": torchmetrics.CalibrationError("multiclass", num_classes=C),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_see_the_dominant_label_and_do_not_count_as_a_loss(name):
    labels, *_ = mixture()
    dominant = torch.tensor(labels.tolist())
    probabilities = scores().softmax(1)
    ours, plain = METRICS[name].clone(), METRICS[name].clone()
    assert torch.equal(ours(probabilities, labels), plain(probabilities, dominant))
    assert labels.reads.count == 0


def test_reads_are_counted_over_all_that_was_made_from_one_batch():
    reads = Reads()
    labels = MixedLabels.mix(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.4]), reads)
    _ = labels == 1, labels.sum(), labels.view(-1)
    assert reads.count == 0
    F.cross_entropy(scores()[:2], labels.view(-1).long())
    assert reads.count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_sees_the_mixture_without_a_graph_break_and_without_recompiling(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: (F.cross_entropy(x, y.view(-1), WEIGHT, label_smoothing=0.1), (x.argmax(1) == y).float().mean()),
        backend=backend,
        fullgraph=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            labels, soft, *_ = mixture(seed=seed)
            loss, hits = compiled(scores(), labels)
            assert torch.equal(loss, F.cross_entropy(scores(), soft, WEIGHT, label_smoothing=0.1))
            assert hits == (scores().argmax(1) == torch.tensor(labels.tolist())).float().mean()
            assert labels.reads.count == 1


def test_plain_labels_become_one_hot_probabilities():
    soft, mass = soft_targets(torch.tensor([2, -100, 0]), 3)
    assert soft.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert mass.tolist() == [1, 0, 1]


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_one_smoothing_for_each_class_goes_with_what_the_class_has(trailing):
    targets = torch.rand(6, C, *trailing, generator=generator_for(1), dtype=torch.float64)
    targets[0] = 0  # ignored
    each = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    smoothed = smooth_targets(targets, targets.sum(1), each)
    expected = sum(
        targets[:, [c]] * ((1 - e) * torch.eye(C)[c] + e / C).view(1, C, *[1] * len(trailing))
        for c, e in enumerate(each.tolist())
    )
    torch.testing.assert_close(smoothed, expected)
    torch.testing.assert_close(smoothed.sum(1), targets.sum(1))


def test_one_smoothing_is_the_same_as_a_number_or_a_tensor_or_for_each_class():
    targets = torch.eye(C)
    mass = targets.sum(1)
    expected = smooth_targets(targets, mass, 0.25)
    assert torch.equal(smooth_targets(targets, mass, torch.tensor(0.25)), expected)
    assert torch.equal(smooth_targets(targets, mass, torch.full((C,), 0.25)), expected)


@pytest.mark.parametrize("wrong", [5, 255, -1, -2])
def test_a_class_that_is_not_there_is_refused_by_name(wrong):
    told = rf"Expected class labels from 0 to 4, or the `ignore_index`, but got {wrong}\."
    for labels in (
        torch.tensor([0, wrong]),
        MixedLabels.mix(torch.tensor([0, 1]), torch.tensor([wrong, 0]), torch.tensor([0.75])),
        MixedLabels.mix(torch.tensor([wrong, 1]), torch.tensor([2, 0]), torch.tensor([0.75])),
    ):
        with pytest.raises(ValueError, match=told):
            soft_targets(labels, 5)
        assert soft_targets(labels, 5, ignore_index=wrong)[0].shape == (2, 5)


def test_the_parts_are_plain_and_reading_them_is_no_loss():
    labels, _, first, second, lam = mixture()
    dominant, other, share = labels.parts()
    assert {type(part) for part in (dominant, other, share)} == {torch.Tensor}
    assert dominant.tolist() == torch.where(lam >= 0.5, first, second).tolist()
    assert other.tolist() == torch.where(lam >= 0.5, second, first).tolist()
    assert torch.equal(share, torch.maximum(lam, 1 - lam))
    assert labels.reads.count == 0


METHODS = {
    "mixup": {"alpha": 1.0, "cutmix_alpha": 0.0},
    "cutmix": {"alpha": 0.0, "cutmix_alpha": 1.0},
    "both": {"alpha": 1.0, "cutmix_alpha": 1.0, "per_element": True, "prob": 0.8},
}


def soft_by_hand(labels, mix):
    """Probabilities of each target, in plain loops; boxes are for maps of the mixture's own size."""
    own = F.one_hot(labels, C).double()
    soft, lam = own.clone(), mix.lam.double().expand(len(labels))
    boxes = mix.boxes if len(mix.boxes) == len(labels) else mix.boxes * len(labels)
    for i, partner in enumerate(mix.partner.tolist()):
        if labels.ndim > 2 and boxes and boxes[i] != (0, 0, 0, 0):
            top, bottom, left, right = boxes[i]
            soft[i, ..., top:bottom, left:right, :] = own[partner, ..., top:bottom, left:right, :]
        elif not (labels.ndim > 2 and mix.method == "cutmix"):
            soft[i] = lam[i] * own[i] + (1 - lam[i]) * own[partner]
    return soft.movedim(-1, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(12,), (12, 3), (12, 6, 9), (12, 1, 6, 9), (12, 4, 6, 9)])
def test_targets_are_mixed_as_their_samples(shape, method, dtype):
    labels = torch.randint(0, C, shape, generator=generator_for(4)).to(dtype)
    before, seen = labels.clone(), set()
    for seed in range(8):
        mix = draw_mixture((12, 3, 6, 9), generator_for(seed), **METHODS[method])
        mixed = mix_targets(labels, mix)
        seen.add(mix.method)
        assert mixed.dtype == dtype
        torch.testing.assert_close(soft_targets(mixed, C)[0].double(), soft_by_hand(labels.long(), mix))
        assert isinstance(mixed, MixedLabels) == (not (labels.ndim > 2 and mix.method == "cutmix"))
    assert torch.equal(labels, before)
    assert method in seen


@pytest.mark.parametrize("method", METHODS)
def test_float_targets_and_float_maps_are_mixed_directly(method):
    for seed in range(8):
        mix = draw_mixture((12, 3, 6, 9), generator_for(seed), **METHODS[method])
        labels = torch.randint(0, C, (12, 6, 9))
        maps = F.one_hot(labels, C).movedim(-1, 1).float()
        torch.testing.assert_close(mix_targets(maps, mix).double(), soft_by_hand(labels, mix))
        values = torch.randn(12)
        for flat in (values, values.view(12, 1).repeat(1, 2), values.bfloat16()):
            lam = mix.lam.double().view(-1, *[1] * (flat.ndim - 1))
            expected = lam * flat.double() + (1 - lam) * flat[mix.partner].double()
            mixed = mix_targets(flat, mix)
            assert mixed.dtype == flat.dtype
            torch.testing.assert_close(
                mixed.double(), expected, rtol=0, atol=1e-6 if flat.dtype == torch.float32 else 0.03
            )


def test_a_map_of_another_size_gets_the_box_scaled():
    labels = torch.arange(2).view(2, 1, 1).expand(2, 4, 8)
    mix = Mixture("cutmix", torch.tensor([0.5]), torch.tensor([1, 0]), ((0, 16, 32, 64),), (32, 64))
    mixed = mix_targets(labels, mix)
    assert type(mixed) is torch.Tensor
    expected = torch.zeros(4, 8, dtype=torch.int64)
    expected[0:2, 4:8] = 1
    assert torch.equal(mixed, torch.stack([expected, 1 - expected]))


@pytest.mark.parametrize("per_element", [False, True])
def test_a_mixed_map_stays_a_tensor_that_can_be_viewed(per_element):
    labels = torch.randint(0, C, (4, 6, 9))
    mix = draw_mixture((4, 3, 6, 9), generator_for(0), alpha=1.0, cutmix_alpha=0.0, per_element=per_element)
    x = torch.randn(4, C, 6, 9)
    flat = mix_targets(labels, mix).view(-1)
    torch.testing.assert_close(
        F.cross_entropy(x.movedim(1, -1).reshape(-1, C), flat), F.cross_entropy(x, soft_by_hand(labels, mix).float())
    )


def test_what_is_not_mixed_is_handed_back():
    labels = torch.tensor([0, 1])
    assert mix_targets(labels, Mixture("none")) is labels


@pytest.mark.parametrize("trailing", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda x, y, **options: F.nll_loss(x.log_softmax(1), y, **options)])
def test_scores_of_minus_infinity_for_classes_without_a_share(loss, ignored, dtype, trailing):
    """A mixture of two index losses, which touch no other class; classes 3 and 4 are not in the task."""
    _, _, first, second, _ = mixture((N, *trailing))
    first, second = first % 3, second % 3
    lam = draw_lambda(0.5, N, generator_for(5))
    if ignored:
        first[::5], second[::5] = -100, -100
    share = lam.view(-1, *[1] * len(trailing)).to(dtype)
    ours, theirs = (scores(*trailing, dtype=dtype).requires_grad_() for _ in range(2))

    def masked(x):
        x = x.masked_fill((torch.arange(C) >= 3).view(-1, *[1] * len(trailing)), -torch.inf)
        return torch.where((first == -100).unsqueeze(1), torch.inf, x) if ignored and loss is F.cross_entropy else x

    mean = loss(masked(ours), MixedLabels.mix(first, second, lam))
    a, b = (loss(masked(theirs), labels, reduction="none") for labels in (first, second))
    expected = (share * a + (1 - share) * b).sum() / (first != -100).sum()
    rounding = {torch.bfloat16: 0.03, torch.float16: 5e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(mean, expected, rtol=rounding, atol=rounding, check_dtype=False)
    gradient = torch.autograd.grad(mean, ours)[0]
    assert gradient.isfinite().all()
    if not ignored:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, theirs)[0], rtol=rounding, atol=rounding)


def test_a_label_of_minus_infinity_costs_infinitely_much():
    labels = MixedLabels.mix(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.75]))
    assert F.cross_entropy(torch.tensor([[0.0, -torch.inf, 0.0]]), labels) == torch.inf


CASTS = {
    "float": lambda y, x: y.float(),
    "type_as": lambda y, x: y.view(-1, 1).type_as(x).squeeze(1),
    "to": lambda y, x: y.unsqueeze(1).to(x)[:, 0],
    "to a type": lambda y, x: y.to(dtype=torch.float64),
    "double": lambda y, x: y.double()[None][0],
    "half": lambda y, x: y.half(),
    "none": lambda y, x: y,
}
LOSSES_OF_NUMBERS = {
    "bce": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.to(x.dtype)),
    "bce with logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "BCEWithLogitsLoss": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("loss", LOSSES_OF_NUMBERS)
def test_losses_of_numbers_read_the_blend_of_both_labels(loss, cast):
    _, _, first, second, lam = mixture()
    first, second = first % 2, second % 2
    labels, x = MixedLabels.mix(first, second, lam), scores()[:, 0].requires_grad_()
    seen = CASTS[cast](labels, x)
    assert seen.tolist() == labels.tolist()  # to a metric, the dominant ones
    assert labels.reads.count == 0
    blended = lam * first + (1 - lam) * second
    rounding = 2e-3 if cast == "half" else 1e-6
    ours, expected = LOSSES_OF_NUMBERS[loss](x, seen), LOSSES_OF_NUMBERS[loss](x, blended)
    torch.testing.assert_close(ours.float(), expected, rtol=rounding, atol=rounding)
    assert labels.reads.count == 1


def test_labels_cast_to_numbers_and_back_are_the_same_mixture():
    labels, soft, *_ = mixture()
    assert torch.equal(F.cross_entropy(scores(), labels.float().long()), F.cross_entropy(scores(), soft))
