"""What an unmodified training_step receives, and what its loss makes of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import LabelSmoothingLoss, MixupCallback
from lightning_speedups.attach.batches import Order
from lightning_speedups.callbacks.mixup_callback import mix_inputs
from lightning_speedups.core.randomness import generator_for
from small import CLASSES, Batches, Classifier, ReplayLoader, fit_interrupted, images, loader, resume, trainer


def EXAMPLE():
    return {"callbacks": [MixupCallback(alpha=0.4, cutmix_alpha=1.0, seed=3)]}


def redraw(inputs, number, *, seed=3, rank=0, alpha=0.2, cutmix_alpha=0.0, prob=1.0, per_element=False):
    """What the callback must have drawn for a batch: its number, rank and seed fix it."""
    return mix_inputs(inputs, generator_for(seed, rank, number, Order.MIX), alpha, cutmix_alpha, prob, 0.5, per_element)


def soft_loss(scores, labels, partner, lam):
    lam = lam[:, None]
    return F.cross_entropy(scores, lam * F.one_hot(labels, CLASSES) + (1 - lam) * F.one_hot(labels[partner], CLASSES))


class WithAccuracy(Classifier):
    """The issue's module: F.cross_entropy and a torchmetrics accuracy."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES, top_k=1)
        self.scores = []

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        scores = self.head(self.backbone(inputs))
        loss = F.cross_entropy(scores, labels)
        self.log("accuracy", self.accuracy(scores, labels), on_step=True)
        self.log("loss", loss)
        self.seen.append((inputs, labels))
        self.scores.append(scores.detach())
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize(
    "options", [{}, {"cutmix_alpha": 1.0}, {"per_element": True, "cutmix_alpha": 1.0}, {"alpha": 1.0}]
)
def test_an_unchanged_module_trains_on_the_mixture_and_measures_the_dominant_label(options):
    module = WithAccuracy()
    trainer(callbacks=[MixupCallback(seed=3, **options)], max_epochs=2).fit(module, loader(24))
    inputs, labels = images(24)
    for number, (seen, scores, loss) in enumerate(zip(module.seen, module.scores, module.losses, strict=True)):
        place = slice(8 * (number % 3), 8 * (number % 3) + 8)
        x, y = inputs[place], labels[place]
        mixed, partner, lam = redraw(x, number, **options)
        assert torch.equal(seen[0], mixed)
        assert not torch.equal(seen[0], x)
        assert loss == soft_loss(scores, y, partner, lam.expand(8)).item()
        assert seen[1].dtype == torch.int64
        assert seen[1].tolist() == torch.where(lam >= 0.5, y, y[partner]).tolist()


def test_mixup_is_its_formula_and_cutmix_pastes_the_share_it_says():
    x = torch.randn(6, 3, 16, 16)
    mixed, partner, lam = mix_inputs(x, generator_for(0), 0.3, 0.0, 1.0, 0.5, per_element=True)
    share = lam.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner])
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 16)
    for seed in range(30):
        mixed, partner, lam = mix_inputs(x, generator_for(seed), 0.0, 1.0, 1.0, 0.5, per_element=True)
        moved = partner != torch.arange(6)
        kept = (mixed == x).double().mean((1, 2, 3))
        torch.testing.assert_close(kept[moved], lam.double()[moved], rtol=0, atol=1e-7)


def test_with_both_alphas_cutmix_comes_as_often_as_asked():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    cuts, count = 0, 800
    for seed in range(count):
        mixed, *_ = mix_inputs(x, generator_for(seed), 1.0, 1.0, 1.0, 0.3, per_element=False)
        cuts += bool((mixed == mixed.round()).all())
    assert abs(cuts / count - 0.3) < 3 * math.sqrt(0.3 * 0.7 / count) + 0.02


def test_prob_mixes_as_often_as_asked_and_leaves_other_batches_untouched():
    module = Classifier()
    trainer(callbacks=[MixupCallback(alpha=1.0, prob=0.4, seed=1)], max_epochs=40).fit(module, loader(32))
    x, _ = images(32)
    untouched = [torch.equal(seen, x[8 * (i % 4) : 8 * (i % 4) + 8]) for i, (seen, _) in enumerate(module.seen)]
    plain = [type(labels) is torch.Tensor for _, labels in module.seen]
    assert untouched == plain
    assert abs(sum(plain) / 160 - 0.6) < 3 * math.sqrt(0.24 / 160)


class Pair(NamedTuple):
    picture: torch.Tensor
    kind: torch.Tensor


@pytest.mark.parametrize(
    ("collate", "take", "places"),
    [
        (lambda x, y: {"x": x, "y": y, "id": 1}, lambda b: (b["x"], b["y"]), {"inputs": "x", "labels": "y"}),
        (lambda x, y: [y, x], lambda b: (b[1], b[0]), {"inputs": 1, "labels": 0}),
        (Pair, lambda b: (b.picture, b.kind), {}),
        (Pair, lambda b: (b.picture, b.kind), {"inputs": "picture", "labels": "kind"}),
        (lambda x, y: SimpleNamespace(x=x, y=y), lambda b: (b.x, b.y), {"inputs": "x", "labels": "y"}),
    ],
)
def test_any_batch_is_mixed_at_the_places_named(collate, take, places):
    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(take(batch), batch_idx)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch  # Lightning cannot move a plain object

    module, (x, y) = Module(), images(8)
    data = DataLoader(
        TensorDataset(x, y), batch_size=8, collate_fn=lambda pairs: collate(*map(torch.stack, zip(*pairs, strict=True)))
    )
    trainer(callbacks=[MixupCallback(seed=3, **places)], max_epochs=1).fit(module, data)
    assert torch.equal(module.seen[0][0], redraw(x, 0)[0])


def test_the_datasets_own_memory_is_never_written():
    x, y = images(16)
    before = x.clone(), y.clone()
    data = Batches((x[:8], y[:8]), (x[8:], y[8:]))  # slices: the batches are the dataset's memory
    trainer(callbacks=[MixupCallback(cutmix_alpha=1.0)]).fit(Classifier(), data)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_validation_and_the_sanity_check_see_whole_samples():
    class Module(Classifier):
        def validation_step(self, batch, batch_idx):
            assert torch.equal(batch[0], images(8)[0])
            assert type(batch[1]) is torch.Tensor
            self.validated = True

    module = Module()
    trainer(callbacks=[MixupCallback()], num_sanity_val_steps=1).fit(module, loader(8), loader(8))
    assert module.validated


def test_soft_targets_are_handed_over_as_probabilities_also_where_nothing_is_mixed():
    module = Classifier()
    callback = MixupCallback(targets="soft", num_classes=CLASSES, seed=3, stop_after=0.5)
    trainer(callbacks=[callback], max_epochs=2).fit(module, loader(16))
    x, y = images(16)
    _, partner, lam = redraw(x[:8], 0)
    expected = lam[:, None] * F.one_hot(y[:8], CLASSES) + (1 - lam[:, None]) * F.one_hot(y[:8][partner], CLASSES)
    torch.testing.assert_close(module.seen[0][1], expected, rtol=0, atol=0)
    assert torch.equal(module.seen[3][0], x[8:])
    assert torch.equal(module.seen[3][1], F.one_hot(y[8:], CLASSES).float())


def test_float_targets_are_mixed_directly():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return F.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    module, x, y = Regression(), images(8)[0], torch.randn(8, CLASSES)
    trainer(callbacks=[MixupCallback(seed=3)], max_epochs=1).fit(module, Batches((x, y)))
    _, partner, lam = redraw(x, 0)
    torch.testing.assert_close(module.seen[0][1], lam * y + (1 - lam) * y[partner])


class WrongLoss(Classifier):
    """Picks log-probabilities by hand, which sees the dominant labels only."""

    def training_step(self, batch, batch_idx):
        scores = self.head(self.backbone(batch[0])).log_softmax(1)
        return -scores.gather(1, batch[1].unsqueeze(1)).mean()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_that_does_not_see_the_mixture_stops_the_run_in_the_first_step(accumulate):
    run = trainer(callbacks=[MixupCallback()], accumulate_grad_batches=accumulate)
    with pytest.raises(MisconfigurationException, match=r'nothing in WrongLoss.training_step read .*targets="soft"'):
        run.fit(WrongLoss(), loader())
    assert run.fit_loop.epoch_loop.batch_progress.current.ready == 1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_batch_that_training_step_skips_is_no_proof_of_a_wrong_loss():
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    class SkippingWrong(WrongLoss):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    trainer(callbacks=[MixupCallback()], max_epochs=1).fit(Skipping(), loader())
    run = trainer(callbacks=[MixupCallback()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="nothing in SkippingWrong"):
        run.fit(SkippingWrong(), loader())
    assert run.fit_loop.epoch_loop.batch_progress.current.ready == 2


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(self.backbone.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_with_two_optimizers_stops_mixing_at_the_same_batch():
    module = TwoOptimizers()
    trainer(callbacks=[MixupCallback(stop_after=0.5)]).fit(module, loader())
    assert [type(labels) is not torch.Tensor for _, labels in module.seen] == [True] * 6 + [False] * 6


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), LabelSmoothingLoss(0.1)])
def test_loss_modules_see_the_mixture_and_smooth_once(criterion):
    module = Classifier(criterion)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(callbacks=[MixupCallback(seed=3)], max_epochs=1).fit(module, loader(8))
    plain = Classifier()
    plain.load_state_dict(start)
    x, y = images(8)
    mixed, partner, lam = redraw(x, 0)
    soft = lam[:, None] * F.one_hot(y, CLASSES) + (1 - lam[:, None]) * F.one_hot(y[partner], CLASSES)
    expected = F.cross_entropy(plain.head(plain.backbone(mixed)), 0.9 * soft + 0.1 / CLASSES)
    assert module.losses[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_redraws_the_same_mixtures_without_a_seed(stop):
    whole, parted = Classifier(), Classifier()
    trainer(callbacks=[MixupCallback(alpha=1.0)]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [MixupCallback(alpha=1.0)])
    torch.manual_seed(99)  # the resumed process has another seed; the checkpoint knows the first
    resume(parted, ReplayLoader(), [MixupCallback(alpha=1.0)])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole.seen, parted.seen, strict=True))


def test_seeds_and_batches_differ_and_the_global_stream_is_left_alone():
    def run(seed):
        module = Classifier()
        state = torch.get_rng_state()
        trainer(callbacks=[MixupCallback(alpha=1.0, seed=seed)], max_epochs=2).fit(module, Batches(images(8)))
        assert torch.equal(torch.get_rng_state(), state)
        return [seen for seen, _ in module.seen]

    one, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_it_stops_after_the_fraction_of_the_run():
    module = Classifier()
    trainer(callbacks=[MixupCallback(alpha=1.0, stop_after=0.5)], accumulate_grad_batches=2).fit(module, loader(48))
    mixed = [type(labels) is not torch.Tensor for _, labels in module.seen]
    assert mixed == [True] * 9 + [False] * 9


@pytest.mark.parametrize("count", [1, 3])
def test_odd_batches_and_batches_of_one(count):
    trainer(callbacks=[MixupCallback(cutmix_alpha=1.0)], max_epochs=1).fit(Eval(), Batches(images(count)))


class Eval(Classifier):
    def training_step(self, batch, batch_idx):
        self.backbone.eval()  # BatchNorm refuses a batch of one
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("per_element", [True, False])
def test_images_in_bytes_and_in_channels_last(per_element):
    x = torch.randint(0, 255, (8, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for alphas in ((0.4, 0.0), (0.0, 1.0)):
        mixed, *_ = mix_inputs(x, generator_for(4), *alphas, 1.0, 0.5, per_element)
        assert mixed.dtype == torch.uint8
        assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "data", "told"),
    [
        ({"labels": "y"}, images(8), r"labels='y'\): no part 'y' in a batch of type"),
        ({"inputs": 0, "labels": 2}, images(8), r"labels=2\): no part 2"),
        ({"labels": 0, "inputs": 1}, (torch.tensor(3), images(8)[0]), "labels=0"),
        ({}, (images(8)[0], torch.ones(8, CLASSES) > 0), "found bool labels"),
        ({}, (images(8)[0], ["a"] * 8), "but found list"),
        ({}, (images(8)[0], torch.zeros(4, dtype=torch.int64)), "as many inputs as labels"),
        (
            {"cutmix_alpha": 1.0},
            (torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)),
            r"CutMix cuts a box out of images \(N, ..., H, W\)",
        ),
        ({"targets": "soft"}, images(8), "needs `num_classes`"),
        ({"inputs": 1, "labels": 0}, images(8), "blends floating-point or uint8 inputs, but found torch.int64"),
        (
            {"cutmix_alpha": 1.0},
            (images(8)[0], torch.zeros(8, 8, 8, dtype=torch.int64)),
            "CutMix pastes parts of images",
        ),
    ],
)
def test_batches_it_cannot_mix_are_refused_by_name_before_the_first_step(options, data, told):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[MixupCallback(**options)]).fit(module, Batches(data))
    assert not module.losses


def test_a_fraction_of_an_endless_run_is_refused():
    with pytest.raises(MisconfigurationException, match=r"stop_after=0.5\) is a fraction of the run.*`max_steps`"):
        trainer(callbacks=[MixupCallback(stop_after=0.5)], max_epochs=-1).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"alpha": -0.1}, "`alpha` to be a number of 0 or more, but got -0.1"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"cutmix_alpha": float("inf")}, "`cutmix_alpha`"),
        ({"alpha": 0.0}, "mixes nothing"),
        ({"prob": 1.1}, r"`prob` to be a number in \[0, 1\], but got 1.1"),
        ({"switch_prob": -1.0}, "`switch_prob`"),
        ({"stop_after": float("nan")}, "`stop_after`"),
        ({"targets": "hard"}, "`targets` to be 'labels' or 'soft', but got 'hard'"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"num_classes": float("nan")}, "`num_classes`"),
        ({"seed": 1.5}, "`seed`"),
        ({"labels": None}, "`labels` to be an index, a key or an attribute name, but got None"),
        ({"inputs": "x", "labels": "x"}, "two places in the batch, but got 'x' for both"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        MixupCallback(**arguments)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks there
def test_a_module_with_a_compiled_network_and_a_compiled_loss():
    torch._dynamo.reset()
    plain = Classifier(nn.CrossEntropyLoss())
    compiled = Classifier(torch.compile(nn.CrossEntropyLoss(), backend="eager", fullgraph=True))
    compiled.backbone.load_state_dict(plain.backbone.state_dict())
    compiled.head.load_state_dict(plain.head.state_dict())
    compiled.backbone = torch.compile(compiled.backbone, backend="eager")
    for module in (compiled, plain):
        trainer(callbacks=[MixupCallback(seed=3)], max_epochs=1).fit(module, loader())
    assert compiled.losses == plain.losses
