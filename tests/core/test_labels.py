"""Mixed labels against torch's own losses on the soft targets that they stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

from lightning_speedups.core.labels import MixedLabels, Reads, soft_targets
from lightning_speedups.core.mixing import draw_lambda
from lightning_speedups.core.randomness import generator_for

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
    assert type(labels + 1) is type(labels.float()) is torch.Tensor
    assert torch.equal(torch.bincount(labels, minlength=C), torch.bincount(dominant, minlength=C))
    assert repr(labels).startswith("tensor([")
    assert torch.equal(pickle.loads(pickle.dumps(labels)), dominant)
    assert torch.equal(copy.deepcopy(labels), dominant)
    assert labels.numpy().tolist() == dominant.tolist()


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
    torch.testing.assert_close(F.nll_loss(scores()[3].log_softmax(0), labels[3]), F.cross_entropy(scores()[3], soft[3]))


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
    assert labels._reads.count == 0


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
            assert labels._reads.count == 1


def test_plain_labels_become_one_hot_probabilities():
    soft, mass = soft_targets(torch.tensor([2, -100, 0]), 3)
    assert soft.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert mass.tolist() == [1, 0, 1]
