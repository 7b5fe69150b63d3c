"""What depends on which of two targets was taken is told when a loss comes of it, and only then."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch.utils.checkpoint import checkpoint

from lightning_speedups.core.randomness import generator_for
from lightning_speedups.tensors.labels import BlendedTargets, MixedLabels
from lightning_speedups.tensors.reads import OneOfTwo, Reads

N, C = 16, 4


def pair(follows=True, ignored=False):
    """Scores, and labels of which no two of a sample are equal; or for both of some samples -100."""
    first = torch.randint(0, C, (N,), generator=generator_for(0))
    second = (first + 1 + torch.arange(N) % 3) % C
    if ignored:
        first[::4] = second[::4] = -100
    share = 0.55 + 0.4 * torch.rand(N, generator=generator_for(1))
    labels = MixedLabels.mix(first, second, share, Reads(follows))
    return torch.randn(N, C, generator=generator_for(2)).requires_grad_(), labels


def written_in(hot, labels):
    hot[torch.arange(N), labels] = 1
    return hot


def in_place(scores, labels):
    scores = scores * 1
    scores[torch.arange(N), labels] -= 0.3
    return scores.sum()


def without_gradients(scores, labels):
    with torch.no_grad():
        hot = torch.full_like(scores, 0.1).scatter_(1, labels.unsqueeze(1), 0.9)
    return (hot * scores.log_softmax(1)).sum()


AT_ONCE = {
    "gather": lambda s, y: s.gather(1, y.view(-1, 1)).sum(),
    "index": lambda s, y: s[torch.arange(N), y].sum(),
    "a margin of torch's": lambda s, y: F.multi_margin_loss(s, y),
    "in place": in_place,
    "an embedding": lambda s, y: F.embedding(y, s).sum(),
}
LATER = {
    "a table": lambda s, y: (torch.eye(C)[y] * s).sum(),
    "a weight for each sample": lambda s, y: (F.cross_entropy(s, y, reduction="none") * torch.arange(4.0)[y]).sum(),
    "masks of classes": lambda s, y: (torch.stack([y == c for c in range(C)], 1).float() * s).sum(),
    "a mask as index": lambda s, y: s[y == 1].sum(),
    "pairs of one class": lambda s, y: ((y[:, None] == y[None]).float() * (s @ s.T)).sum(),
    "scatter": lambda s, y: (torch.zeros(N, C).scatter(1, y.unsqueeze(1), 1) * s).sum(),
    "scattered in place": lambda s, y: (torch.zeros(N, C).scatter_(1, y.unsqueeze(1), 1) * s).sum(),
    "written by index": lambda s, y: (written_in(torch.zeros(N, C), y) * s).sum(),
    "without gradients": without_gradients,
    "numbers not for a loss of numbers": lambda s, y: ((s[:, 0] - (y.float() + 1)) ** 2).sum(),
    "where": lambda s, y: torch.where(y[:, None] == torch.arange(C), s, 0.0).sum(),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *LATER])
@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_a_loss_of_dominant_labels_is_told_in_whole_and_in_part(name, beside):
    scores, labels = pair()
    loss = {**AT_ONCE, **LATER}[name](scores, labels) + beside * F.cross_entropy(scores, labels)
    assert not labels.reads.misread
    loss.backward()
    assert labels.reads.misread
    assert type(loss) is type(scores.grad) is torch.Tensor


@pytest.mark.parametrize("name", [*AT_ONCE, *LATER])
def test_what_meets_a_gradient_at_once_is_told_without_being_followed(name):
    scores, labels = pair(follows=False)
    {**AT_ONCE, **LATER}[name](scores, labels).backward()
    assert bool(labels.reads.misread) == (name in AT_ONCE)


@pytest.mark.parametrize("name", [*AT_ONCE, *LATER])
def test_what_is_the_same_for_both_labels_is_not_told(name):
    scores, labels = pair()
    same = MixedLabels.mix(labels._labels, labels._labels, torch.tensor([0.7]), Reads(True))
    {**AT_ONCE, **LATER}[name](scores, same).backward()
    assert not same.reads.misread


METRICS = {
    "accuracy": torchmetrics.Accuracy("multiclass", num_classes=C),
    "macro f1": torchmetrics.F1Score("multiclass", num_classes=C, average="macro"),
    "auroc": torchmetrics.AUROC("multiclass", num_classes=C),
    "binned auroc": torchmetrics.AUROC("multiclass", num_classes=C, thresholds=10),
    "confusion": torchmetrics.ConfusionMatrix("multiclass", num_classes=C),
    "hinge": torchmetrics.HingeLoss("multiclass", num_classes=C),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_scores_with_gradients_count_the_same_and_are_not_told(name):
    (scores, labels), ours, plain = pair(), METRICS[name].clone(), METRICS[name].clone()
    for _ in range(2):
        assert torch.equal(ours(scores, labels), plain(scores, labels._labels))
        F.cross_entropy(scores, labels).backward()
    assert torch.equal(ours.compute(), plain.compute())
    assert labels.reads.count == 2
    assert not labels.reads.misread


def test_looks_at_the_labels_beside_the_loss_are_not_told():
    scores, labels = pair()
    counts = torch.zeros(C)
    each = F.cross_entropy(scores, labels, reduction="none")
    logged = [
        (scores.argmax(1) == labels).float().mean(),
        *(each[labels == c].mean() for c in range(C)),
        labels.bincount(minlength=C).max(),
        counts.index_add_(0, labels, torch.ones(N)).sum(),
    ]
    assert str(labels)
    assert labels.shape == (N,)
    assert type(labels.shape) is torch.Size
    assert len(labels.cpu().numpy()) == len(labels.tolist())
    assert len(logged) == 7
    each.mean().backward()
    assert not labels.reads.misread


def test_the_form_of_labels_says_nothing_of_them():
    scores, labels = pair()
    views = scores[:, 0].view_as(labels) + scores[:, 1].reshape_as(labels) + scores[:, 2].expand_as(labels)
    zeros = torch.zeros_like(labels).float() + labels.new_ones(N) + torch.full_like(labels.float(), 2.0)
    (views * zeros).sum().backward()
    assert not labels.reads.misread


@pytest.mark.parametrize("ignored", [False, True])
def test_masks_of_what_is_ignored_are_the_same_for_both_labels(ignored):
    scores, labels = pair(ignored=ignored)
    valid = labels != -100
    valid[0] = False
    valid &= torch.arange(N) < 12
    each = F.cross_entropy(scores, labels, reduction="none")
    loss = (each * valid).sum() / valid.sum() + each[valid].mean() + torch.where(labels >= 0, each, 0.0).sum()
    (loss + F.cross_entropy(scores[valid], labels[valid])).backward()
    assert not labels.reads.misread


def test_a_selection_of_labels_with_their_scores_is_one_of_the_mixture():
    scores, labels = pair()
    some = labels != 2
    F.cross_entropy(scores[some], labels[some]).backward()
    F.cross_entropy(scores[labels == 2], labels[labels == 2]).backward()
    F.cross_entropy(scores[some], labels.masked_select(some)).backward()
    assert not labels.reads.misread
    (scores[some].sum() + scores[labels != 1].sum()).backward()
    assert labels.reads.misread


def test_labels_may_be_selected_on_another_device_as_well():
    scores, labels = pair()
    order = labels.argsort()
    assert labels.to("meta")[order.to("meta")].shape == (N,)
    F.cross_entropy(scores[order], labels[order]).backward()
    assert not labels.reads.misread


def test_at_the_end_everything_is_plain_again():
    scores, labels = pair()
    counts, hits = torch.zeros(C), scores.argmax(1) == labels
    counts.index_add_(0, labels, torch.ones(N))
    assert type(counts) is type(hits) is OneOfTwo
    for followed in (counts, hits):
        assert type(pickle.loads(pickle.dumps(followed))) is torch.Tensor
        assert torch.equal(copy.deepcopy(followed), followed)
    labels.reads.close()
    assert type(counts) is torch.Tensor
    assert not vars(counts)
    assert counts.sum() == N
    assert type(hits) is type(hits.float()) is type(hits & hits) is torch.Tensor
    assert not vars(hits)
    hits &= hits
    assert type(hits) is torch.Tensor


class Picked(torch.autograd.Function):
    """Probabilities of the labels, with a gradient of one's own."""

    @staticmethod
    def forward(ctx, s, y):
        ctx.save_for_backward(s, y)
        return s.softmax(1).gather(1, y[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        s, y = ctx.saved_tensors
        return torch.zeros_like(s).scatter_(1, y[:, None], gradient[:, None]), None


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, y: Picked.apply(s, y).mean(),
        lambda s, y: F.mse_loss(Picked.apply(s, y), BlendedTargets.of(torch.full((N,), 0.5), y.reads)),
        lambda s, y: F.cross_entropy(Picked.apply(s, y)[:, None] * s, y),
        lambda s, y: checkpoint(lambda s, y: s.gather(1, y[:, None]), s, y, use_reentrant=True).mean(),
        lambda s, y: checkpoint(lambda s, y: s.gather(1, y[:, None]), s, y, use_reentrant=False).mean(),
    ],
)
@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_functions_with_gradients_of_their_own_keep_them_and_are_told(loss, beside):
    gradients = []
    for follows in (True, False):
        scores, labels = pair(follows)
        (loss(scores, labels) + beside * F.cross_entropy(scores, labels)).backward()
        gradients.append(scores.grad)
        assert labels.reads.misread or not follows
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_nothing_that_was_followed_lives_longer_for_it():
    scores, labels = pair()
    table = (labels == 1).float()
    seen = [weakref.ref(table), weakref.ref(labels), weakref.ref(table * scores[:, 0])]
    (table * scores[:, 0]).sum().backward()
    assert labels.reads.misread
    del table, labels
    gc.collect()
    assert [one() for one in seen] == [None] * 3


def test_a_backward_pass_may_come_after_the_end():
    scores, labels = pair()
    loss = ((labels == 1).float() * scores[:, 0]).sum() + scores.gather(1, labels[:, None]).sum()
    labels.reads.close()
    loss.backward()
    assert labels.reads.misread == ["gather", "mul"]
    assert scores.grad.isfinite().all()


def test_a_tensor_that_a_function_hands_back_is_not_changed():
    _, labels = pair()
    for source in (labels, labels == 1, labels.float().exp()):
        plain = source._labels
        assert type(source.positive() if plain.dtype != torch.bool else source.resolve_conj()) is OneOfTwo
        assert type(plain) is torch.Tensor
        assert torch.equal(source, plain)


def test_use_is_more_than_a_look_at_the_form():
    for use, is_used in (
        (lambda y: y.shape, False), (len, False), (lambda y: y.view(-1).long(), False),
        (lambda y: y == 1, True), (lambda y: y.tolist(), True), (lambda y: y[0].item(), True),
    ):  # fmt: skip
        _, labels = pair(follows=False)
        use(labels)
        assert labels.reads.is_used == is_used


TARGETS = torch.tensor([0.3, 1.0, 1.6, 2.0])


@pytest.mark.parametrize(
    "classes",
    [
        lambda y: y.long(),
        lambda y: y.unsqueeze(1).to(torch.int64).squeeze(1),
        lambda y: y.view(2, 2).int().flatten().long(),
        lambda y: y.byte().long(),
        lambda y: y.type(torch.LongTensor),
        lambda y: y.detach().clone().short().long(),
    ],
)
def test_classes_made_of_blended_numbers_are_told(classes):
    scores = torch.randn(4, 4, requires_grad=True)
    for targets, told in ((TARGETS, True), (TARGETS.round(), False)):
        reads = Reads(True)
        F.cross_entropy(scores, classes(BlendedTargets.of(targets, reads))).backward()
        assert bool(reads.misread) == told


def test_classes_by_the_largest_of_several_are_told():
    scores, soft = torch.randn(2, 3, requires_grad=True), torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]])
    seen = BlendedTargets.of(soft, Reads(True))
    F.cross_entropy(scores, seen.argmax(1)).backward()
    assert seen.reads.misread


def test_blended_numbers_are_plain_to_everything_else():
    scores = torch.randn(4, requires_grad=True)
    seen = BlendedTargets.of(TARGETS, Reads(True))
    valid = seen > 0.5
    loss = F.mse_loss(scores, seen) + (scores[valid] - seen[valid]).abs().mean() + (scores * seen.round()).sum()
    loss.backward()
    exact = (scores.round().long() == seen.long()).float().mean()
    assert type(loss) is type(seen + 1) is torch.Tensor
    assert torch.equal(seen * 1, TARGETS)
    assert 0 <= exact <= 1
    assert not seen.reads.misread
