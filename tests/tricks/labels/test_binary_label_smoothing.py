"""Against torch's binary cross-entropy on targets that were smoothed by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import BinaryLabelSmoothing, MixupCallback
from lightning_speedups.core.mixing import blend
from lightning_speedups.tensors.labels import MixedLabels
from zoo import CLASSES, Classifier, OneHot, ReplayLoader, images, loader, trainer

C = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])
EACH = torch.tensor([0.0, 0.1, 0.3, 0.7])


def EXAMPLE():
    return {"criterion": OneHot(BinaryLabelSmoothing(0.1))}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHT}, {"pos_weight": WEIGHT}, {"weight": WEIGHT, "pos_weight": 2 * WEIGHT}]
)
@pytest.mark.parametrize("shape", [(6, C), (6, 3, C), (C,)])
def test_it_is_torchs_loss_of_smoothed_targets(shape, options, smoothing, reduction):
    x, target = torch.randn(shape), torch.rand(shape).round()
    expected = F.binary_cross_entropy_with_logits(
        x, target * (1 - smoothing) + smoothing / 2, reduction=reduction, **options
    )
    assert torch.equal(BinaryLabelSmoothing(smoothing, reduction=reduction, **options)(x, target), expected)


@given(
    st.sampled_from([(1, C), (6, C), (5, C, 3), (2, C, 2, 3)]),
    st.lists(st.floats(0, 0.99), min_size=C, max_size=C),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_it_follows_the_formula_with_one_smoothing_for_each_class(shape, smoothing, reduction, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    along = (C, *[1] * (len(shape) - 2))
    weight, pos_weight = torch.rand(along, generator=generator), torch.rand(along, generator=generator) + 0.1
    options = {"weight": weight, "pos_weight": pos_weight} if weighted else {}
    z, w, p = (value.double().numpy() for value in (x, weight, pos_weight)) if weighted else (x.numpy(), 1.0, 1.0)
    epsilon = np.array(smoothing).reshape(along)
    yes = t.numpy() * (1 - epsilon) + epsilon / 2
    apart = w * (p * yes * np.log1p(np.exp(-z)) + (1 - yes) * np.log1p(np.exp(z)))
    expected = {"none": apart, "mean": apart.mean(), "sum": apart.sum()}[reduction]
    loss = BinaryLabelSmoothing(smoothing, reduction=reduction, **options)(x, t)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-5, atol=1e-6)  # ε is kept as float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_targets_of_any_number_type_are_taken(dtype):
    x, target = torch.randn(6, C), torch.rand(6, C).round()
    loss = BinaryLabelSmoothing(0.1)(x, target.to(dtype))
    assert torch.equal(loss, BinaryLabelSmoothing(0.1)(x, target))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.1, EACH])
def test_half_precision_scores_give_a_float32_loss(dtype, smoothing):
    x, target = torch.randn(6, C).to(dtype), torch.rand(6, C).round()
    loss = BinaryLabelSmoothing(smoothing, WEIGHT, 2 * WEIGHT)
    assert loss(x, target.to(dtype)).dtype == torch.float32
    assert torch.equal(loss(x, target.to(dtype)), loss(x.float(), target))
    assert loss(x.double(), target).dtype == torch.float64


def test_everything_is_smoothed_once_so_that_mixing_before_or_after_is_the_same():
    x, target, lam = torch.randn(6, C), torch.rand(6, C).round(), torch.rand(6, 1)
    partner = torch.randperm(6)
    mixed = lam * target + (1 - lam) * target[partner]
    smoothed = 0.8 * target + 0.1
    expected = F.binary_cross_entropy_with_logits(x, lam * smoothed + (1 - lam) * smoothed[partner])
    torch.testing.assert_close(BinaryLabelSmoothing(0.2)(x, mixed), expected)
    torch.testing.assert_close(BinaryLabelSmoothing(0.2)(x, blend(target, partner, lam.flatten())), expected)


@pytest.mark.parametrize("shape", [(6, C), (6,), (6, C, 2)])
def test_mixed_labels_are_read_as_shares_of_yes(shape):
    x, first, second = torch.randn(shape), torch.randint(0, 2, shape), torch.randint(0, 2, shape)
    lam = torch.rand(6)
    labels = MixedLabels.mix(first, second, lam)
    share = lam.view(6, *[1] * (len(shape) - 1))
    expected = BinaryLabelSmoothing(0.1)(x, share * first + (1 - share) * second)
    torch.testing.assert_close(BinaryLabelSmoothing(0.1)(x, labels), expected)
    assert labels.reads.count == 1
    byte = MixedLabels.mix(first.byte(), second.byte(), lam)
    torch.testing.assert_close(BinaryLabelSmoothing(0.1)(x, byte), expected)


def test_a_strength_multiplies_the_smoothing():
    x, target = torch.randn(6, C), torch.rand(6, C).round()
    for smoothing, half in ((0.2, 0.1), (EACH, EACH / 2)):
        loss = BinaryLabelSmoothing(smoothing)
        loss.strength = torch.tensor(0.5)
        torch.testing.assert_close(loss(x, target), BinaryLabelSmoothing(half)(x, target))


def test_gradient_is_right():
    x, target = torch.randn(3, C, 2, dtype=torch.float64, requires_grad=True), torch.rand(3, C, 2)
    loss = BinaryLabelSmoothing(EACH, pos_weight=WEIGHT.view(C, 1))
    assert torch.autograd.gradcheck(lambda scores: loss(scores, target), (x,))


def test_nothing_is_written_into_what_comes_in():
    x, target = torch.randn(6, C), torch.rand(6, C)
    before = x.clone(), target.clone()
    BinaryLabelSmoothing(EACH, WEIGHT, WEIGHT)(x, target)
    assert torch.equal(x, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"smoothing": 1.0}, r"`smoothing` to be a number in \[0, 1\), but got 1.0"),
        ({"smoothing": [0.1, -0.2]}, r"`smoothing\[1\]` .* but got -0.2"),
        ({"reduction": "avg"}, "`reduction` to be 'none', 'mean' or 'sum', but got 'avg'"),
        ({"weight": [1.0]}, r"`weight` to be a tensor of numbers >= 0, or None, but got \[1.0\]"),
        ({"weight": torch.tensor([-1.0])}, "`weight`"),
        ({"pos_weight": torch.tensor([1.0, float("nan")])}, "`pos_weight`"),
        ({"pos_weight": 2.0}, "`pos_weight`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        BinaryLabelSmoothing(**arguments)


@pytest.mark.parametrize(
    ("shape", "target", "told"),
    [
        ((3, C), torch.zeros(3, C + 1), r"`target` of the shape of the scores, \(3, 4\), but got \(3, 5\)\. Class"),
        ((3, C), torch.zeros(3, dtype=torch.int64), r"but got \(3,\). Class labels become .* by `F.one_hot"),
        ((3, 1), torch.zeros(3), r"but got \(3,\)\."),
        ((3, C, 2), torch.zeros(3, 2, dtype=torch.int64), "F.one_hot"),
        ((3,), torch.tensor([0, 2, 1]), r"`target` in \[0, 1\], but got values from 0 to 2"),
        ((3,), torch.tensor([-1.0, 1.0, 1.0]), "values from -1 to 1"),
        ((3,), torch.tensor([0.0, float("nan"), 1.0]), "values from nan to nan"),
        ((2,), MixedLabels.mix(torch.tensor([0, 3]), torch.tensor([3, 0]), torch.tensor([0.7])), "from 0 to 3"),
    ],
)
def test_targets_that_do_not_fit_are_refused(shape, target, told):
    with pytest.raises(ValueError, match=told):
        BinaryLabelSmoothing()(torch.randn(shape), target)


def test_complex_targets_are_refused():
    with pytest.raises(RuntimeError, match="ComplexFloat"):
        BinaryLabelSmoothing()(torch.randn(3, C), torch.zeros(3, C, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_past_one_is_no_error(dtype):
    target = torch.tensor([1.0, 0.0], dtype=dtype)
    target[0] += torch.finfo(dtype).eps
    assert torch.isfinite(BinaryLabelSmoothing()(torch.zeros(2), target))


def test_an_empty_batch_is_no_error():
    assert BinaryLabelSmoothing(0.1, reduction="sum")(torch.zeros(0, C), torch.zeros(0, C)) == 0


def test_a_smoothing_for_each_class_wants_a_class_dimension():
    for shape in ((C,), (3, C + 1), (C, 3)):
        with pytest.raises(ValueError, match=r"scores of shape \(N, 4, ...\)"):
            BinaryLabelSmoothing(EACH)(torch.zeros(shape), torch.zeros(shape))


def test_vmap_is_refused_as_it_cannot_look_at_the_targets():
    x, target = torch.randn(6, C), torch.rand(6, C).round()
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        torch.func.vmap(BinaryLabelSmoothing(0.1))(x, target)


@pytest.mark.parametrize("smoothing", [EACH, 0.3])
def test_a_compiled_loss_is_compiled_twice_for_all_strengths(smoothing):
    torch._dynamo.reset()
    loss = BinaryLabelSmoothing(smoothing, WEIGHT, WEIGHT)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(6, C), torch.rand(6, C)
    compiled(x, target)
    loss.strength = torch.tensor(0.9)
    compiled(x, target)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.7, 0.3, None, 0.1):
            loss.strength = None if strength is None else torch.tensor(strength)
            torch.testing.assert_close(compiled(x, target), loss(x, target))
    mixed = MixedLabels.mix(target.round().long(), target.flip(0).round().long(), torch.rand(6))
    torch.testing.assert_close(compiled(x, mixed), loss(x, mixed))


def test_it_moves_copies_and_shows_its_settings():
    loss = BinaryLabelSmoothing(EACH, WEIGHT, 2 * WEIGHT, "sum")
    x, target = torch.randn(6, C), torch.rand(6, C)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, target), loss(x, target))
    assert set(loss.state_dict()) == {"weight", "pos_weight"}
    assert loss.double().pos_weight.dtype == torch.float64
    assert "smoothing=0.1, reduction='mean'" in repr(BinaryLabelSmoothing())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0, "cutmix_alpha": 1.0}])
def test_mixup_hands_over_its_labels_in_a_real_fit(options):
    """Class labels that the criterion makes one-hot, and yes-or-no labels that are mixed as they are."""
    module = Classifier(OneHot(BinaryLabelSmoothing(0.1)), lr=0.0)
    trainer(callbacks=[MixupCallback(seed=1, **options)], max_epochs=1).fit(module, ReplayLoader())
    for (inputs, labels), loss in zip(module.seen, module.losses, strict=True):
        shares = F.one_hot(labels, CLASSES)
        assert bool(((shares > 0) & (shares < 1)).any())
        module.train()
        scores = module.head(module.backbone(inputs))
        expected = F.binary_cross_entropy_with_logits(scores, 0.9 * shares + 0.05)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_mixup_of_several_labels_for_each_sample_equals_soft_targets(dtype):
    inputs, labels = images()
    several = torch.stack([(labels + i) % 2 for i in range(CLASSES)], 1)
    losses = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(0)
        module = Classifier(BinaryLabelSmoothing(0.1))
        data = torch.utils.data.TensorDataset(inputs, several.to(kind))
        trainer(callbacks=[MixupCallback(seed=1)], max_epochs=1).fit(module, torch.utils.data.DataLoader(data, 8))
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_mixup_with_class_labels_alone_says_what_is_wrong():
    with pytest.raises((ValueError, MisconfigurationException), match=r"F\.one_hot"):
        trainer(callbacks=[MixupCallback(seed=1)]).fit(Classifier(BinaryLabelSmoothing(0.1)), loader())


@pytest.mark.parametrize("smoothing", [0.0, [0.0, 0.0, 0.0]])
def test_infinite_scores_that_are_right_cost_nothing(smoothing):
    x = torch.tensor([[-torch.inf, 0.5, torch.inf], [1.0, -torch.inf, -2.0]], requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    finite = x.detach().isfinite()
    loss = BinaryLabelSmoothing(smoothing, reduction="none")(x, target)
    expected = F.binary_cross_entropy_with_logits(x[finite], target[finite], reduction="none")
    torch.testing.assert_close(loss[finite], expected)
    assert torch.equal(loss[~finite], torch.zeros(3))
    ours, theirs = (torch.autograd.grad(one.sum(), x)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("score", "label"), [(-torch.inf, 1.0), (torch.inf, 0.0)])
def test_infinite_scores_that_are_wrong_cost_more_than_anything_else(score, label):
    assert BinaryLabelSmoothing(0.0)(torch.tensor([[score]]), torch.tensor([[label]])) > 1e38
