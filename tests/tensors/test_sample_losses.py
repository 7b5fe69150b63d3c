"""Each intercepted loss against its closed form, for every reduction, with and without weights of samples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_speedups import LabelSmoothingLoss
from lightning_speedups.tensors.labels import MixedLabels
from lightning_speedups.tensors.sample_losses import SampleLosses, mean_over_samples

N, C = 6, 4
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 2.5])
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])


def values(*shape, seed=0, positive=False):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.sigmoid() if positive else drawn


def labels(*shape, ignored=False):
    drawn = torch.randint(0, C, shape, generator=torch.Generator().manual_seed(3))
    if ignored:
        drawn[0] = drawn.view(-1)[-2] = 9
    return drawn


def scores(*extra):
    return values(N, C, *extra).requires_grad_()


def index_cases():
    for extra in ((), (3,)):
        for weight in (None, CLASS_WEIGHTS.double()):
            for ignored in (False, True):
                yield extra, weight, ignored


def closed_form_of_indices(log, target, weight, ignored, smoothing=0.0):
    """Losses, normaliser and the mean over each sample's places that count, by loops over samples and places."""
    w = torch.ones(C, dtype=torch.float64) if weight is None else weight
    losses, total, counts = torch.zeros(target.shape, dtype=torch.float64), 0.0, [0] * N
    for place in (
        tuple(p) for p in torch.cartesian_prod(*(torch.arange(s) for s in target.shape)).view(-1, target.ndim).tolist()
    ):
        y = int(target[place])
        if y == 9:
            continue
        row = log[(place[0], slice(None), *place[1:])]
        losses[place] = -(1 - smoothing) * w[y] * row[y] - smoothing / C * (w * row).sum()
        total += float(w[y])
        counts[place[0]] += 1
    own = torch.tensor([loss.sum().item() / max(count, 1) for loss, count in zip(losses.detach(), counts, strict=True)])
    return losses, total, own


def check(compute, losses, total, own, argument, weights=WEIGHTS):
    """Every reduction: the value, its gradient, and the losses noted, with and without weights."""
    per_sample = losses.detach().view(N, -1).mean(1) if own is None else own
    w = weights.double().view(-1, *[1] * (losses.ndim - 1))
    expected = {"none": w * losses, "sum": (w * losses).sum(), "mean": (w * losses).sum() / total}
    for reduction, want in expected.items():
        with SampleLosses(N, weights) as seen:
            got = compute(reduction)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(seen.losses, per_sample.float())
        assert not seen.losses.requires_grad
        mine, theirs = (torch.autograd.grad(x.sum(), argument, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
        with SampleLosses(N) as unweighted:
            untouched = compute(reduction)
        assert torch.equal(untouched, compute(reduction))
        torch.testing.assert_close(unweighted.losses, per_sample.float())


@pytest.mark.parametrize(("extra", "weight", "ignored"), list(index_cases()))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_indices(extra, weight, ignored, smoothing):
    x, y = scores(*extra), labels(N, *extra, ignored=ignored)
    form = closed_form_of_indices(x.log_softmax(1), y, weight, ignored, smoothing)
    options = {"weight": weight, "ignore_index": 9, "label_smoothing": smoothing}
    check(lambda reduction: F.cross_entropy(x, y, reduction=reduction, **options), *form, x)
    check(lambda reduction: nn.CrossEntropyLoss(reduction=reduction, **options)(x, y), *form, x)


@pytest.mark.parametrize(("extra", "weight", "ignored"), list(index_cases()))
def test_nll_loss(extra, weight, ignored):
    x, y = scores(*extra), labels(N, *extra, ignored=ignored)
    form = closed_form_of_indices(x, y, weight, ignored)
    check(lambda reduction: F.nll_loss(x, y, weight, ignore_index=9, reduction=reduction), *form, x)


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS.double()])
def test_cross_entropy_of_probabilities(weight):
    x, y = scores(), values(N, C, seed=1).softmax(1)
    w = 1 if weight is None else weight
    losses = -(w * y * x.log_softmax(1)).sum(1)
    check(lambda reduction: F.cross_entropy(x, y, weight, reduction=reduction), losses, N, None, x)


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS.double()])
def test_cross_entropy_of_mixed_labels(weight):
    x, first = scores(), labels(N, ignored=True)
    second, lam = first.flip(0), torch.full((N,), 0.7)
    y = MixedLabels.mix(first, second, lam)
    (one, *_), (other, *_) = (closed_form_of_indices(x.log_softmax(1), part, weight, True) for part in (first, second))
    mass = 0.7 * (first != 9).sum() + 0.3 * (second != 9).sum()
    losses = 0.7 * one + 0.3 * other
    check(lambda r: F.cross_entropy(x, y, weight, ignore_index=9, reduction=r), losses, float(mass), None, x)
    y = MixedLabels.mix(first, second, lam)
    (one, *_), (other, *_) = (closed_form_of_indices(x, part, weight, True) for part in (first, second))
    check(
        lambda r: F.nll_loss(x, y, weight, ignore_index=9, reduction=r), 0.7 * one + 0.3 * other, float(mass), None, x
    )


def bce(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log())


@pytest.mark.parametrize("extra", [(), (3,)])
def test_losses_of_elements(extra):
    x, y = values(N, *extra).requires_grad_(), values(N, *extra, seed=1)
    p, q = values(N, *extra, positive=True).requires_grad_(), values(N, *extra, seed=1, positive=True)
    difference, size = (x - y).abs(), x.numel()
    weight = values(N, *extra, seed=2, positive=True)
    check(lambda r: F.mse_loss(x, y, reduction=r), difference**2, size, None, x)
    check(lambda r: nn.MSELoss(reduction=r)(x, y), difference**2, size, None, x)
    check(lambda r: F.l1_loss(x, y, reduction=r), difference, size, None, x)
    huber = torch.where(difference < 0.5, difference**2 / 2, 0.5 * (difference - 0.25))
    check(lambda r: F.huber_loss(x, y, reduction=r, delta=0.5), huber, size, None, x)
    check(lambda r: F.smooth_l1_loss(x, y, reduction=r, beta=0.5), huber / 0.5, size, None, x)
    check(lambda r: F.binary_cross_entropy(p, q, reduction=r), bce(p, q), size, None, p)
    check(lambda r: F.binary_cross_entropy(p, q, weight, reduction=r), weight * bce(p, q), size, None, p)
    logits = bce(x.sigmoid(), q)
    check(lambda r: F.binary_cross_entropy_with_logits(x, q, reduction=r), logits, size, None, x)
    check(lambda r: F.binary_cross_entropy_with_logits(x, q, weight, reduction=r), weight * logits, size, None, x)
    for func, want in ((F.mse_loss, difference**2), (F.l1_loss, difference), (F.huber_loss, None)):
        want = torch.where(difference < 1, difference**2 / 2, difference - 0.5) if want is None else want
        check(lambda r, func=func: func(x, y, reduction=r, weight=weight), weight * want, float(weight.sum()), None, x)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_kl_div():
    x, y = scores(), values(N, C, seed=1).softmax(1)
    losses = y * (y.log() - x)
    check(lambda r: F.kl_div(x, y, reduction=r), losses, x.numel(), None, x)
    with SampleLosses(N, WEIGHTS):
        got = F.kl_div(x, y, reduction="batchmean")
    torch.testing.assert_close(got, (WEIGHTS.double().unsqueeze(1) * losses).sum() / N)


@pytest.mark.parametrize("options", [{"reduce": False}, {"size_average": False}, {"size_average": True}])
def test_the_old_spelling_of_reduction_is_refused(options):
    with SampleLosses(N, WEIGHTS), pytest.raises(ValueError, match="`reduction` for `cross_entropy`, but got old"):
        F.cross_entropy(scores(), labels(N), **options)


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_this_packages_smoothing_loss(weight, reduction, mixed):
    x, first = values(N, C).float().requires_grad_(), labels(N)
    y = MixedLabels.mix(first, first.flip(0), torch.full((N,), 0.75)) if mixed else first
    loss = LabelSmoothingLoss(0.1, weight, reduction=reduction)
    own = LabelSmoothingLoss(0.1, weight, reduction="none")(x, y)
    with SampleLosses(N, WEIGHTS) as seen:
        got = loss(x, y)
    w = torch.ones(C) if weight is None else weight
    total = (0.75 * w[first] + 0.25 * w[first.flip(0)]).sum() if mixed else w[first].sum()
    want = {"mean": (WEIGHTS * own).sum() / total, "sum": (WEIGHTS * own).sum(), "none": WEIGHTS * own}[reduction]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(seen.losses, own.detach())


def test_the_mean_over_samples():
    x = values(N, 3).float().requires_grad_()
    assert torch.equal(mean_over_samples(x), x.mean())
    with SampleLosses(N) as seen:
        assert torch.equal(mean_over_samples(x), x.mean())
    torch.testing.assert_close(seen.losses, x.detach().mean(1))
    with SampleLosses(N, WEIGHTS) as seen:
        torch.testing.assert_close(mean_over_samples(x), (x * WEIGHTS.unsqueeze(1)).sum() / x.numel())
    torch.testing.assert_close(seen.losses, x.detach().mean(1))


@pytest.mark.parametrize("flat", [False, True])
def test_the_mean_over_samples_counts_each_loss_by_its_weight(flat):
    x = values(N, 5).requires_grad_()
    mask = (PADDED != 9).double()
    for shares in (mask, mask * 0.5, torch.rand(N, 1), torch.rand(N, 5), PADDED != 9):
        shown, share = (one.reshape(-1) if flat else one for one in (x, shares.expand(N, 5)))
        want = (shares * x).sum() / shares.expand(N, 5).sum()
        torch.testing.assert_close(mean_over_samples(shown, share), want)
        own = (shares * x).detach().sum(1) / (shares.expand(N, 5) != 0).sum(1).clamp(min=1)
        for weights in (None, WEIGHTS):
            with SampleLosses(N, weights) as seen:
                shown = x.view(-1) if flat else x
                got = mean_over_samples(shown, weight=share)
            torch.testing.assert_close(seen.losses, own.float())
            each = 1 if weights is None else weights.double().unsqueeze(1)
            torch.testing.assert_close(got, (each * shares * x).sum() / shares.expand(N, 5).sum())


def test_the_mean_over_samples_of_which_none_counts_is_nothing_whatever_they_are():
    x = torch.tensor([[1.0, math.inf], [math.nan, 2.0]]).requires_grad_()
    for weights in (None, torch.tensor([2.0, 0.5])):
        with SampleLosses(2, weights) as seen:
            assert mean_over_samples(x, torch.zeros(2, 2)) == 0.0
            assert mean_over_samples(x, torch.eye(2)).item() == 1.5
        assert seen.losses.tolist() == [1.0, 2.0]


def test_all_ignored_is_what_torch_makes_of_it():
    x, y = scores(), torch.full((N,), -100)
    assert F.cross_entropy(x, y).isnan()
    with SampleLosses(N, WEIGHTS) as seen:
        assert F.cross_entropy(x, y).isnan()
    assert seen.losses.tolist() == [0.0] * N


def test_an_infinite_loss_that_counts_nothing_adds_nothing():
    x, y = values(N, C), labels(N)
    x[0, y[0]] = -math.inf
    x.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        with SampleLosses(N, torch.tensor([0.0] + [2.0] * (N - 1))) as seen:
            loss = F.cross_entropy(x, y, reduction=reduction)
        want = {"none": torch.cat([x.new_zeros(1), 2 * F.cross_entropy(x[1:], y[1:], reduction="none")])}
        want["sum"] = want["none"].sum()
        want["mean"] = want["sum"] / N
        torch.testing.assert_close(loss, want[reduction])
        assert seen.losses[0].isinf()
        (slope,) = torch.autograd.grad(loss.sum(), x)
        assert slope.isfinite().all()
        assert not slope[0].any()


def test_losses_that_are_nought_stay_so():
    x = torch.zeros(N, 2, requires_grad=True)
    with SampleLosses(N, WEIGHTS) as seen:
        loss = F.mse_loss(x, torch.zeros(N, 2))
    assert loss.item() == 0.0
    assert seen.losses.tolist() == [0.0] * N


PADDED = torch.tensor(
    [[1, 2, 0, 3, 1], [2, 2, 9, 9, 9], [0, 9, 9, 9, 9], [9, 9, 9, 9, 9], [3, 9, 1, 9, 2], [9, 0, 1, 2, 3]]
)


def own_by_hand(scores):
    """Each sample's loss, from its tokens that count alone."""
    rows = [[-row.log_softmax(0)[label] for row, label in zip(*one, strict=True) if label != 9] for one in scores]
    return torch.tensor([float(sum(row)) / len(row) if row else 0.0 for row in rows])


@pytest.mark.parametrize("further", [0, 7])
def test_padding_does_not_count_however_far_it_goes(further):
    x = values(N, 5 + further, C).float().requires_grad_()
    y = torch.cat([PADDED, torch.full((N, further), 9)], 1)
    expected = own_by_hand(list(zip(x.detach(), y, strict=True)))
    torch.testing.assert_close(own_by_hand(list(zip(x.detach()[:, :5], PADDED, strict=True))), expected)
    soft = torch.zeros(N, 5 + further, C).scatter(2, y.clamp(max=3).unsqueeze(2), 1.0) * (y != 9).unsqueeze(2)
    padding_weighs_nothing = torch.tensor([1.0] * C + [0.0])
    wide = torch.cat([x, torch.full((N, 5 + further, 1), -1e4)], 2)
    for loss in (
        lambda: F.cross_entropy(x.transpose(1, 2), y, ignore_index=9),
        lambda: F.cross_entropy(x.transpose(1, 2), soft.transpose(1, 2), reduction="sum"),
        lambda: F.cross_entropy(wide.transpose(1, 2), y.clamp(max=4), padding_weighs_nothing),
        lambda: F.nll_loss(x.transpose(1, 2).log_softmax(1), y, ignore_index=9, reduction="none"),
        lambda: F.cross_entropy(x.transpose(1, 2), MixedLabels.mix(y, y, torch.full((N,), 0.7)), ignore_index=9),
        lambda: F.cross_entropy(x.reshape(-1, C), y.reshape(-1), ignore_index=9),
        lambda: LabelSmoothingLoss(0.0, ignore_index=9)(x.transpose(1, 2), y),
    ):
        for weights in (None, WEIGHTS):
            with SampleLosses(N, weights) as seen:
                loss()
            torch.testing.assert_close(seen.losses, expected)


def test_elements_of_weight_0_do_not_count():
    x, y = values(N, 5).requires_grad_(), torch.zeros(N, 5, dtype=torch.float64)
    with SampleLosses(N) as seen:
        F.binary_cross_entropy_with_logits(x, y, weight=(PADDED != 9).double())
    rows = [F.softplus(row[label != 9]) for row, label in zip(x.detach(), PADDED, strict=True)]
    torch.testing.assert_close(seen.losses, torch.stack([row.sum() / max(len(row), 1) for row in rows]).float())


FLATTENED = {
    "view": lambda x, y: F.cross_entropy(x.view(-1, C), y.view(-1)),
    "reshape of a copy": lambda x, y: F.cross_entropy(x.reshape(-1, C), y.clone().reshape(-1)),
    "torch.flatten": lambda x, y: F.cross_entropy(torch.flatten(x, 0, 1), torch.flatten(y)),
    "only the targets are known": lambda x, y: F.cross_entropy(x.view(-1, C) * 1.0, y.flatten()),
    "only the scores are known": lambda x, y: F.cross_entropy(x.reshape(N * 5, C), y.view(-1) + 0),
    "next tokens": lambda x, y: F.cross_entropy(x[:, 1:].reshape(-1, C), y[:, 1:].contiguous().view(-1)),
    "nll": lambda x, y: F.nll_loss(x.log_softmax(2).view(-1, C), y.view(-1)),
    "sum": lambda x, y: F.cross_entropy(x.view(-1, C), y.view(-1), reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x.view(-1, C), y.view(-1), reduction="none"),
    "two dimensions": lambda x, y: F.cross_entropy(x.view(N, 5, 1, C).reshape(-1, C), y.view(N, 5, 1).reshape(-1)),
    "one's own": lambda x, y: mean_over_samples((-x.log_softmax(2).gather(2, y.unsqueeze(2))).view(-1)),
}


@pytest.mark.parametrize("how", FLATTENED)
def test_flattened_losses_are_averaged_by_sample_and_weighted_by_it(how):
    x, y = values(N, 5, C).requires_grad_(), labels(N, 5)
    own = torch.stack([F.cross_entropy(one, label, reduction="none") for one, label in zip(x, y, strict=True)])
    own = own[:, 1:] if how == "next tokens" else own
    for weights in (None, WEIGHTS):
        with SampleLosses(N, weights) as seen:
            got = FLATTENED[how](x, y)
        torch.testing.assert_close(seen.losses, own.detach().mean(1).float())
        each = own * (1 if weights is None else weights.double().unsqueeze(1))
        want = {"sum": each.sum(), "none": each.flatten()}.get(how, each.mean())
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.1, [0.1] * C])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_flattened_this_packages_smoothing_loss_is_what_it_is_otherwise(dtype, smoothing, mixed, weights):
    x, y = values(N, 5, C).to(dtype).requires_grad_(), labels(N, 5)
    y = MixedLabels.mix(y, y.flip(0), torch.full((N,), 0.75)) if mixed else y
    criterion, seen = LabelSmoothingLoss(smoothing), [SampleLosses(N, weights) for _ in range(2)]
    with seen[0]:
        want = criterion(x.mT, y)
    with seen[1]:
        got = criterion(x.view(-1, C), y.view(-1))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(seen[1].losses, seen[0].losses)


def test_flattened_losses_that_are_not_known_to_be_one_samples_after_the_others_are_left_alone():
    x, y = values(5, N, C).requires_grad_(), labels(5, N)
    square, marks = values(N, N, C).requires_grad_(), labels(N, N)
    two_views = torch.cat([values(N, C), values(N, C, seed=1)]).requires_grad_()
    mask = torch.tensor([True] * 2 * N + [False] * 3 * N).view(N, 5)
    for loss in (
        lambda: F.cross_entropy(x.view(-1, C), y.view(-1)),  # time first
        lambda: F.cross_entropy(x.view(-1, C) * 1.0, y.view(-1)),
        lambda: F.cross_entropy(square.view(-1, C), marks.view(-1)),  # as may be this
        lambda: F.cross_entropy(two_views, labels(2 * N)),
        lambda: F.cross_entropy(x.transpose(0, 1)[mask], y.t()[mask]),
    ):
        for weights in (None, WEIGHTS):
            with SampleLosses(N, weights) as seen:
                assert torch.equal(got := loss(), loss())
            assert seen.losses is None
            assert torch.equal(got, loss())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_of_as_many_samples_as_targets_each_the_batchs_own_memory_tells_which_is_which(weights):
    x, rows = values(N, N, C).requires_grad_(), labels(N, N + 1)
    taken = {
        "the batch": (rows[:, 1:].contiguous(), lambda y: y.view(-1)),
        "a part of it": (rows, lambda y: y[:, 1:].flatten()),
        "a view that the loader made": (rows[:, 1:], lambda y: y.reshape(-1)),
    }
    for batch, flat in taken.values():
        with SampleLosses(N, weights, [{"labels": batch}, 0]) as seen:
            got = F.cross_entropy(x.view(-1, C), flat(batch))
        own = F.cross_entropy(x.mT, rows[:, 1:], reduction="none")
        torch.testing.assert_close(seen.losses, own.detach().mean(1).float())
        torch.testing.assert_close(got, ((1 if weights is None else weights.double().unsqueeze(1)) * own).mean())
    square = rows[:, 1:].contiguous()
    for batch, shown in (([], square), (square, square.t()), (square, square + 0), (square.t(), square.t())):
        with SampleLosses(N, weights, batch) as seen:
            F.cross_entropy(x.view(-1, C), shown.reshape(-1))
        assert seen.losses is None


def test_nothing_is_kept_alive_that_was_flattened():
    import weakref

    with SampleLosses(N):
        x = values(N, 5, C).view(-1, C)
        gone = weakref.ref(x)
        del x
        assert gone() is None


def test_several_calls_add_up_and_others_are_left_alone():
    x, y = scores(), labels(N)
    with SampleLosses(N, WEIGHTS) as seen:
        F.cross_entropy(x, y)
        F.mse_loss(x[:, 0], torch.zeros(N, dtype=torch.float64))
        outside = [
            F.mse_loss(x[:3], torch.zeros(3, C, dtype=torch.float64)),  # not of this batch
            F.cross_entropy(x.detach(), y),  # a metric
            F.mse_loss(x.sum(), torch.tensor(0.0, dtype=torch.float64)),
            F.cross_entropy(x[0], y[0]),
        ]
        with torch.no_grad():
            outside.append(F.cross_entropy(x, y))
    expected = F.cross_entropy(x, y, reduction="none") + x[:, 0] ** 2
    torch.testing.assert_close(seen.losses, expected.detach().float())
    plain = [
        F.mse_loss(x[:3], torch.zeros(3, C, dtype=torch.float64)), F.cross_entropy(x, y),
        F.mse_loss(x.sum(), torch.tensor(0.0, dtype=torch.float64)), F.cross_entropy(x[0], y[0]), F.cross_entropy(x, y),
    ]  # fmt: skip
    assert all(torch.equal(one.detach(), other.detach()) for one, other in zip(outside, plain, strict=True))


def test_nothing_is_seen_outside_or_without_a_loss():
    with SampleLosses(N) as seen:
        scores().softmax(1).sum()
    F.cross_entropy(scores(), labels(N))
    assert seen.losses is None


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_under_autocast_the_losses_are_float32(weights):
    net, x, y = nn.Linear(5, C), torch.randn(N, 5), labels(N)
    with torch.autocast("cpu", dtype=torch.bfloat16), SampleLosses(N, weights) as seen:
        loss = F.cross_entropy(net(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = F.cross_entropy(net(x), y, reduction="none")
    assert seen.losses.dtype == torch.float32
    torch.testing.assert_close(seen.losses, own.detach().float())
    torch.testing.assert_close(loss, ((1 if weights is None else weights) * own).mean())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_compiled_part_runs_under_it_without_compiling_anew_in_each_step(weights):
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, C))
    compiled = torch.compile(net, backend="eager")
    y, inputs = labels(N), [torch.randn(N, 5) for _ in range(4)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for x in inputs:
        with SampleLosses(N, weights) as seen:
            loss = F.cross_entropy(compiled(x), y)
        own = F.cross_entropy(net(x), y, reduction="none")
        torch.testing.assert_close(seen.losses, own.detach())
        torch.testing.assert_close(loss, ((1 if weights is None else weights) * own).mean())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_part_that_flattens_is_one_graph():
    net = torch.compile(lambda x: x.view(-1, 3, C).relu().view(-1, C), backend="eager", fullgraph=True)
    x, y = values(N, 3 * C).requires_grad_(), labels(N, 3)
    with SampleLosses(N) as seen:
        F.cross_entropy(net(x), y.view(-1))
    own = F.cross_entropy(x.view(N, 3, C).relu().mT, y, reduction="none").mean(1)
    torch.testing.assert_close(seen.losses, own.detach().float())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_compiled_loss(weights):
    loss_of = torch.compile(lambda x, y: F.cross_entropy(x, y), backend="eager")
    x, y = scores(), labels(N)
    for _ in range(2):
        with SampleLosses(N, weights) as seen:
            loss = loss_of(x, y)
        own = F.cross_entropy(x, y, reduction="none")
        torch.testing.assert_close(loss, ((1 if weights is None else weights.double()) * own).mean())
        torch.testing.assert_close(seen.losses, own.detach().float())


def test_the_weighted_mean_is_unbiased_through_the_mode():
    """Many draws of a subset: the sum over the steps' gradients has the expectation of the full set's sum."""
    from lightning_speedups.core.subsets import draw_unbiased

    x, y = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), labels(24)
    w = torch.zeros(5, C).requires_grad_()
    known = torch.rand(24, generator=torch.Generator().manual_seed(1))
    full = torch.autograd.grad(F.cross_entropy(x @ w, y, reduction="sum"), w)[0]
    stream, sums = torch.Generator().manual_seed(2), []
    for _ in range(1500):
        places, weights = draw_unbiased(known, 16, stream)
        epoch = torch.zeros_like(w)
        for batch in places.split(8):
            with SampleLosses(8, weights[batch]):
                loss = F.cross_entropy(x[batch] @ w, y[batch])
            epoch += 8 * torch.autograd.grad(loss, w)[0]
        sums.append(epoch)
    sums = torch.stack(sums)
    sigma = sums.std(0) / math.sqrt(1500)
    assert ((sums.mean(0) - full).abs() < 4 * sigma).all()
    assert (((sums.mean(0) - full) / sigma).square().mean()) < 2


def test_losses_that_come_one_by_one_leave_their_graph_behind():
    scores, labels = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1])
    with SampleLosses(2) as seen:
        F.cross_entropy(scores, labels, reduction="none").mean().backward()
    assert seen.losses is not None
    assert not seen.losses.requires_grad
