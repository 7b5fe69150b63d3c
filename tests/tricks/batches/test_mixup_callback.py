"""What an unmodified training_step receives, and what its loss makes of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import LabelSmoothingLoss, MixupCallback
from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.core.mixing import Mixture, draw_mixture, mix_values
from lightning_speedups.core.randomness import generator_for
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    ReplayLoader,
    TwoOptimizers,
    fit_interrupted,
    images,
    loader,
    resume,
    trainer,
)


def EXAMPLE():
    return {"callbacks": [MixupCallback(alpha=0.4, cutmix_alpha=1.0, seed=3)]}


def redrawn(inputs, number, *, seed=3, rank=0, alpha=0.2, cutmix_alpha=0.0, **options):
    """What the callback must have drawn for a batch: its number, rank and seed fix it."""
    generator = generator_for(seed, rank, number, BatchOrder.MIX)
    return draw_mixture(inputs.shape, generator, alpha=alpha, cutmix_alpha=cutmix_alpha, **options)


def redraw(inputs, number, **options):
    mixture = redrawn(inputs, number, **options)
    return mix_values(inputs, mixture), mixture.partner, mixture.lam


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


def test_with_both_alphas_cutmix_comes_as_often_as_asked():
    callback, count = MixupCallback(alpha=1.0, cutmix_alpha=1.0, switch_prob=0.3), 800
    batch = torch.randn(4, 1, 8, 8), torch.zeros(4)
    methods = [callback.mix(batch, generator_for(seed))[1].method for seed in range(count)]
    assert set(methods) == {"mixup", "cutmix"}
    assert abs(methods.count("cutmix") / count - 0.3) < 3 * math.sqrt(0.3 * 0.7 / count) + 0.02


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
        (
            lambda x, y: {"views": [x], "target": (SimpleNamespace(kind=y),)},
            lambda b: (b["views"][0], b["target"][0].kind),
            {"inputs": ("views", 0), "labels": ("target", 0, "kind")},
        ),
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


METHODS = {
    "mixup": {"alpha": 1.0},
    "cutmix": {"alpha": 0.0, "cutmix_alpha": 1.0},
    "either": {"alpha": 1.0, "cutmix_alpha": 1.0},
    "both": {"alpha": 1.0, "cutmix_alpha": 1.0, "per_element": True, "prob": 0.8},
}


class Segmenter(Classifier):
    """A class for each pixel; the loss is the user's own cross-entropy."""

    def __init__(self, criterion=None):
        super().__init__(criterion)
        self.backbone, self.head = nn.Conv2d(2, CLASSES, 1), nn.Identity()


class Regressor(Classifier):
    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return F.mse_loss(self.head(self.backbone(batch[0])), batch[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["classes", "soft", "maps", "floats"])
def test_the_datasets_own_memory_is_never_written(method, kind):
    x, y = images(24)
    y = {"classes": y, "soft": y, "maps": (x[:, 0] > 0).long(), "floats": torch.randn(24, CLASSES)}[kind]
    data = TensorDataset(x, y)
    before = [part.numpy().tobytes() for part in data.tensors]
    module = {"classes": Classifier, "soft": Classifier, "maps": Segmenter, "floats": Regressor}[kind]()
    soft = {"targets": "soft", "num_classes": CLASSES} if kind == "soft" else {}
    slices = Batches(*((x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)))  # the batches are the dataset's memory
    for batches in (slices, DataLoader(data, batch_size=8)):
        trainer(callbacks=[MixupCallback(**METHODS[method], **soft)], max_epochs=2).fit(module, batches)
    assert [part.numpy().tobytes() for part in data.tensors] == before
    assert any(not torch.equal(seen, x[8 * (i % 3) :][:8]) for i, (seen, _) in enumerate(module.seen))


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_cut_and_mixed_with_their_images(method):
    x, _ = images(24, side=6)
    y = torch.randint(0, CLASSES, (24, 6, 6))
    x[:, 0] = y  # each image carries its map
    module, mixup = Segmenter(), MixupCallback(seed=3, **METHODS[method])
    trainer(callbacks=[mixup]).fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    kinds = set()
    for number, (seen, labels) in enumerate(module.seen):
        mixture = redrawn(x[:8], number, **METHODS[method])
        kinds.add(mixture.method)
        if mixture.method == "cutmix":  # hard labels, which nothing needs to read as a mixture
            assert type(labels) is torch.Tensor
            assert torch.equal(seen[:, 0], labels.float())
        else:
            probabilities = F.one_hot(labels, CLASSES) @ torch.arange(4.0)
            torch.testing.assert_close(seen[:, 0], probabilities)
    assert kinds >= {"mixup": {"mixup"}, "cutmix": {"cutmix"}, "either": {"mixup", "cutmix"}, "both": {"both"}}[method]


def test_a_loss_that_knows_no_mixture_may_train_on_pasted_maps_only():
    class ByHand(Segmenter):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return -self.backbone(batch[0]).log_softmax(1).gather(1, batch[1].unsqueeze(1)).mean()

    x, _ = images(8)
    data, module = Batches((x, (x[:, 0] > 0).long())), ByHand()
    trainer(callbacks=[MixupCallback(alpha=0.0, cutmix_alpha=1.0)]).fit(module, data)
    assert len(module.seen) == 3
    with pytest.raises(MisconfigurationException, match="nothing in ByHand"):
        trainer(callbacks=[MixupCallback(alpha=1.0)]).fit(module, data)


def test_soft_maps_are_probabilities_of_each_pixel():
    callback = MixupCallback(alpha=0.0, cutmix_alpha=1.0, targets="soft", num_classes=CLASSES)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, CLASSES, (4, 8, 8))
    (_, soft), _ = callback.mix((x, y), generator_for(1))
    (_, hard), _ = MixupCallback(alpha=0.0, cutmix_alpha=1.0).mix((x, y), generator_for(1))
    assert torch.equal(soft, F.one_hot(hard, CLASSES).movedim(-1, 1).float())


@pytest.mark.parametrize("method", METHODS)
def test_several_inputs_are_mixed_alike(method):
    x, y = images(8)
    twice = torch.nn.functional.interpolate(x, scale_factor=2)
    batch = {"views": [x, twice], "depth": x[:, :1].bfloat16(), "y": y}
    callback = MixupCallback(**METHODS[method], inputs=[("views", 0), ("views", 1), "depth"], labels="y")
    for seed in range(12):
        mixed, mixture = callback.mix(batch, generator_for(seed))
        small, large = mixed["views"]
        assert torch.equal(small, mix_values(x, mixture))
        if mixture.method == "none":
            continue
        assert not torch.equal(small, x)
        # Nearest-neighbour copies: what scales the box by two scales the mixed image.
        torch.testing.assert_close(large, torch.nn.functional.interpolate(small, scale_factor=2))
        assert mixed["depth"].dtype == torch.bfloat16
        torch.testing.assert_close(mixed["depth"].float(), small[:, :1], rtol=0.02, atol=0.02)
    assert torch.equal(batch["views"][0], x)


def test_several_inputs_go_through_a_fit():
    class TwoViews(Classifier):
        def training_step(self, batch, batch_idx):
            views, labels = batch
            assert torch.equal(*views)
            return super().training_step((views[0], labels), batch_idx)

    x, y = images(8)
    module = TwoViews()
    callback = MixupCallback(seed=3, inputs=[(0, 0), (0, 1)], cutmix_alpha=1.0)
    trainer(callbacks=[callback]).fit(module, Batches(((x, x.clone()), y)))
    assert not torch.equal(module.seen[0][0], x)


@pytest.mark.parametrize("method", METHODS)
def test_multi_label_and_regression_targets_are_blended_by_the_share_really_kept(method):
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 8, 12)  # a pixel tells whose it is
    several = (torch.rand(8, CLASSES) > 0.5).float()
    for labels in (several, several[:, 0], several.bfloat16(), several.half()):
        for seed in range(6):
            (_, targets), mixture = MixupCallback(**METHODS[method]).mix((x, labels), generator_for(seed))
            assert targets.dtype == labels.dtype
            if mixture.method == "none":
                continue
            lam = mixture.lam.double().view(-1, *[1] * (labels.ndim - 1))
            expected = lam * labels.double() + (1 - lam) * labels[mixture.partner].double()
            torch.testing.assert_close(
                targets.double(), expected, rtol=0, atol=1e-6 if labels.dtype == torch.float32 else 0.005
            )


def test_multi_label_training_sees_the_blend():
    class MultiLabel(Classifier):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return F.binary_cross_entropy_with_logits(self.head(self.backbone(batch[0])), batch[1])

    x, y = images(8)[0], (torch.rand(8, CLASSES) > 0.5).float()
    module = MultiLabel()
    trainer(callbacks=[MixupCallback(seed=3, cutmix_alpha=1.0)], max_epochs=3).fit(module, Batches((x, y)))
    for number, (_, targets) in enumerate(module.seen):
        _, partner, lam = redraw(x, number, cutmix_alpha=1.0)
        torch.testing.assert_close(targets, lam * y + (1 - lam) * y[partner])


def test_several_integer_labels_of_a_sample_are_mixed_by_share():
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, CLASSES, (6, 2))
    for options in METHODS.values():
        (_, labels), mixture = MixupCallback(**options).mix((x, y), generator_for(0))
        lam = mixture.lam.view(-1, 1, 1)
        expected = lam * F.one_hot(y, CLASSES) + (1 - lam) * F.one_hot(y[mixture.partner], CLASSES)
        torch.testing.assert_close(F.one_hot(labels, CLASSES), expected)


class Notes(Callback):
    def __init__(self, mixup):
        self.mixup, self.seen, self.logged = mixup, [], []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(self.mixup.last)

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name})


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_mixture_is_kept_and_logged_if_asked(method, log):
    mixup = MixupCallback(seed=3, stop_after=0.75, log=log, **METHODS[method])
    notes, module, x = Notes(mixup), Classifier(), images(32)[0]
    assert mixup.last is None
    trainer(callbacks=[notes, mixup], max_epochs=2).fit(module, loader(32))
    assert len(notes.seen) == 8
    for number, (last, logged) in enumerate(zip(notes.seen, notes.logged, strict=True)):
        own = x[8 * (number % 4) :][:8]
        expected = Mixture("none") if number >= 6 else redrawn(own, number, **METHODS[method])
        assert (last.method, last.boxes, last.frame) == (expected.method, expected.boxes, expected.frame)
        assert torch.equal(module.seen[number][0], mix_values(own, last))
        kept, cut = 1.0, 0.0
        if expected.lam is not None:
            assert torch.equal(last.lam, expected.lam)
            assert torch.equal(last.partner, expected.partner)
            kept = expected.lam.double().mean().item()
            cut = sum(box != (0, 0, 0, 0) for box in expected.boxes) / max(1, len(expected.boxes))
        assert logged == ({"mixup/lam": pytest.approx(kept), "mixup/cutmix": pytest.approx(cut)} if log else {})
    trainer(callbacks=[mixup], max_epochs=0).fit(module, loader(32))
    assert mixup.last is None


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_strength_is_the_share_of_batches_that_are_mixed(method):
    mixup = MixupCallback(seed=3, **METHODS[method])
    batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for strength in (0.0, 0.3, 1.0):
        mixup.strength = strength
        mixed = [mixup.mix(batch, generator_for(i))[1].method == method for i in range(1000)]
        assert sum(mixed) / 1000 == pytest.approx(strength, abs=0.05 * (0 < strength < 1))
    mixup.strength = 0.0
    assert mixup.mix(batch, generator_for(0))[0] is batch


def test_strength_that_grows_in_a_run_is_that_of_each_batch():
    class Grows(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            mixup.strength = 1.0

    module, mixup, (x, _) = Classifier(), MixupCallback(alpha=1.0, seed=3), images(32)
    mixup.strength = 0.0
    trainer(callbacks=[mixup, Grows()], max_epochs=1).fit(module, loader(32))
    assert torch.equal(module.seen[0][0], x[:8])
    assert torch.equal(module.seen[1][0], redraw(x[8:16], 1, alpha=1.0)[0])


def test_mixing_without_a_trainer_is_what_a_fit_does():
    x, y = images(8)
    options = {"alpha": 1.0, "cutmix_alpha": 1.0, "per_element": True}
    module, batch = Classifier(), (x, y)
    trainer(callbacks=[MixupCallback(seed=3, **options)], max_epochs=1).fit(module, Batches(batch))
    callback = MixupCallback(**options)
    (inputs, labels), mixture = callback.mix(batch, generator_for(3, 0, 0, BatchOrder.MIX))
    assert torch.equal(inputs, module.seen[0][0])
    assert torch.equal(F.one_hot(labels, CLASSES), F.one_hot(module.seen[0][1], CLASSES))
    assert mixture.method == "both"
    assert callback.last is None
    assert callback.mix(batch, None)[0] is batch


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 30, 4), (5, 3, 4, 30), (3, 1, 1, 1), (2, 1, 7, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one_and_images_of_any_shape(method, shape):
    x, y = torch.randn(shape), torch.arange(shape[0])
    for seed in range(10):
        (inputs, labels), mixture = MixupCallback(**METHODS[method]).mix([x, y], generator_for(seed))
        assert inputs.shape == x.shape
        assert labels.shape == y.shape
        if len(x) == 1:
            torch.testing.assert_close(inputs, x)
            assert F.one_hot(labels, 2).tolist() == [[1.0, 0.0]]
        assert all(0 <= t <= b <= shape[2] and 0 <= le <= r <= shape[3] for t, b, le, r in mixture.boxes)


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


def test_manual_optimization_with_two_optimizers_stops_mixing_at_the_same_batch():
    module = TwoOptimizers(every=1)
    trainer(callbacks=[MixupCallback(stop_after=0.5)]).fit(module, loader())
    assert [type(labels) is not torch.Tensor for _, labels in module.seen] == [True] * 6 + [False] * 6


TOKENS, LENGTH = 5, 7


class Speech(LightningModule):
    """Tells the token of each frame of padded spectrograms (N, T, F)."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(2)
        self.net, self.loss, self.seen, self.losses = nn.Linear(6, TOKENS), loss, [], []

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.seen.append(batch)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def speech(ignored, count=8):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(count, LENGTH, 6, generator=generator), torch.randint(1, TOKENS, (count, LENGTH)))
    padding = torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    return TensorDataset(x.masked_fill(padding.unsqueeze(2), 0.0), y.masked_fill(padding, ignored))


def of_tokens(ignored, smoothing):
    smoothed, torchs = (
        LabelSmoothingLoss(smoothing, ignore_index=ignored),
        nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=smoothing),
    )
    yield from (lambda s, y, loss=loss: loss(s.transpose(1, 2), y) for loss in (smoothed, torchs))
    yield from (lambda s, y, loss=loss: loss(s.view(-1, TOKENS), y.view(-1)) for loss in (smoothed, torchs))
    if not smoothing:
        yield lambda s, y: F.nll_loss(s.log_softmax(2).flatten(0, 1), y.flatten(), ignore_index=ignored)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_of_padded_sequences_of_tokens_each_partner_counts_where_it_is_not_ignored(ignored, smoothing, per_element):
    data = speech(ignored)
    mixture = redrawn(data.tensors[0], 0, alpha=1.0, per_element=per_element)
    kept, partner = mixture.lam.expand(8).tolist(), mixture.partner.tolist()
    for loss in of_tokens(ignored, smoothing):
        module = Speech(loss)
        mixup = MixupCallback(alpha=1.0, per_element=per_element, seed=3)
        trainer(callbacks=[mixup], max_epochs=1).fit(module, DataLoader(data, 8))
        x, y = data.tensors
        total = mass = 0.0
        for i, (lam, j) in enumerate(zip(kept, partner, strict=True)):
            torch.testing.assert_close(module.seen[0][0][i], lam * x[i] + (1 - lam) * x[j])
            logs = module.net(lam * x[i] + (1 - lam) * x[j]).log_softmax(1).tolist()
            for t in range(LENGTH):
                for share, label in ((lam, int(y[i, t])), (1 - lam, int(y[j, t]))):
                    if label != ignored:
                        total -= share * ((1 - smoothing) * logs[t][label] + smoothing / TOKENS * sum(logs[t]))
                        mass += share
        assert module.losses[0] == pytest.approx(total / mass, rel=1e-5)
        assert module.seen[0][1].dtype == torch.int64


def test_boxes_of_sequences_have_no_share_of_their_tokens_and_are_refused():
    for data in (speech(-100), TensorDataset(speech(-100).tensors[0].mT, speech(-100).tensors[1])):
        with pytest.raises(MisconfigurationException, match=r"labels of each place .*\(8, 7\).*`cutmix_alpha=0`"):
            trainer(callbacks=[MixupCallback(cutmix_alpha=1.0)]).fit(Speech(None), DataLoader(data, 8))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("method", METHODS)
def test_type_and_memory_format_of_the_inputs_are_kept(method, dtype):
    class Looks(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].contiguous(memory_format=torch.channels_last), batch[1]

        def training_step(self, batch, batch_idx):
            self.formats = {*getattr(self, "formats", ()), (batch[0].dtype, batch[0].stride())}
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    x, y = images(16)
    module = Looks()
    trainer(callbacks=[MixupCallback(**METHODS[method])]).fit(module, Batches(((x.abs() * 30).to(dtype), y)))
    assert module.formats == {(dtype, (128, 1, 16, 2))}


@pytest.mark.parametrize(
    ("options", "data", "told"),
    [
        ({"labels": "y"}, images(8), r"labels='y'\) found no part 'y' in a batch of type"),
        ({"inputs": 0, "labels": 2}, images(8), r"labels=2\) found no part 2"),
        ({"labels": 0, "inputs": 1}, (torch.tensor(3), images(8)[0]), "labels=0"),
        ({}, (images(8)[0], torch.ones(8, CLASSES) > 0), "found bool labels"),
        ({}, (images(8)[0], ["a"] * 8), "but found list"),
        ({}, (images(8)[0], torch.zeros(4, dtype=torch.int64)), "as many inputs as labels"),
        (
            {"cutmix_alpha": 1.0},
            (torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)),
            r"cutmix_alpha=1.0\) cuts a box out of images \(N, ..., H, W\)",
        ),
        ({"targets": "soft"}, images(8), "needs `num_classes`"),
        ({"inputs": 1, "labels": 0}, images(8), "blends floating-point or uint8 inputs, but found torch.int64"),
        (
            {"labels": (1, "y")},
            images(8),
            r"labels=\(1, 'y'\)\) found no part 'y' in the batch's part \(1,\) of type Tensor",
        ),
        (
            {"inputs": [0, (1, 0)], "labels": 2},
            (images(8)[0], [torch.randn(4, 1)], images(8)[1]),
            r"inputs=\(1, 0\)\) exp",
        ),
        (
            {"inputs": [0, 2], "cutmix_alpha": 1.0},
            (*images(8), torch.randn(8, 5)),
            r"MixupCallback\(inputs=2, .* cuts a box .* but found the shape \(8, 5\)",
        ),
    ],
)
def test_batches_it_cannot_mix_are_refused_by_name_before_the_first_step(options, data, told):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[MixupCallback(**options)]).fit(module, Batches(data))
    assert not module.losses


def test_labels_that_are_mixed_already_are_refused():
    callback = MixupCallback(alpha=1.0)
    once, _ = callback.mix(images(8), generator_for(0))
    with pytest.raises(MisconfigurationException, match=r"labels=1\) found labels that are mixed already"):
        callback.mix(once, generator_for(0))


def test_a_fraction_of_an_endless_run_is_refused():
    with pytest.raises(MisconfigurationException, match=r"stop_after=0.5\) is a fraction of the run.*`max_steps`"):
        trainer(callbacks=[MixupCallback(stop_after=0.5)], max_epochs=-1).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"alpha": -0.1}, "`alpha` to be a number of 0 or more, but got -0.1"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"cutmix_alpha": float("inf")}, "`cutmix_alpha`"),
        ({"prob": 1.1}, r"`prob` to be a number in \[0, 1\], but got 1.1"),
        ({"switch_prob": -1.0}, "`switch_prob`"),
        ({"stop_after": float("nan")}, "`stop_after`"),
        ({"targets": "hard"}, "`targets` to be 'labels' or 'soft', but got 'hard'"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"num_classes": float("nan")}, "`num_classes`"),
        ({"seed": 1.5}, "`seed`"),
        ({"labels": None}, r"`labels` to be an index, a key, an attribute name or a path .*, but got None"),
        ({"labels": [1]}, r"`labels` to be an index, .* but got \[1\]"),
        ({"inputs": [0, None]}, "`inputs` to be an index, .* but got None"),
        ({"inputs": ()}, "`inputs` to be an index"),
        ({"inputs": []}, r"at least one place in the batch, but got \[\]"),
        ({"inputs": "x", "labels": "x"}, "different places in the batch, but got 'x' and 'x'"),
        ({"inputs": "x", "labels": ("x",)}, "different places in the batch"),
        ({"inputs": [0, 0]}, "different places in the batch"),
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


class WithLoss(Classifier):
    """Any loss of scores and labels."""

    def __init__(self, loss, epochs=1):
        super().__init__()
        self.loss = loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.head(self.backbone(batch[0])), batch[1], self)
        self.losses.append(loss.item())
        return loss


def by_masks(scores, labels, _=None):
    return -(torch.stack([labels == c for c in range(CLASSES)], 1) * scores.log_softmax(1)).sum(1).mean()


def by_scatter(scores, labels, _=None):
    hot = torch.zeros_like(scores).scatter_(1, labels.unsqueeze(1), 1)
    return F.cross_entropy(scores - 0.3 * hot, labels)


@pytest.mark.parametrize("options", [{}, {"per_element": True}, {"alpha": 0.0, "cutmix_alpha": 1.0}])
@pytest.mark.parametrize(
    ("loss", "through"),
    [
        (lambda s, y, _: F.cross_entropy(s, y) + F.multi_margin_loss(s, y), "`multi_margin_loss`"),
        (lambda s, y, _: F.cross_entropy(s, y) + 0.1 * by_masks(s, y), "`mul`"),
        (by_scatter, "`sub`"),
    ],
)
@pytest.mark.parametrize("manual", [False, True])
def test_a_loss_that_sees_half_of_the_mixture_stops_in_the_first_step(loss, through, options, manual):
    class Manual(WithLoss):
        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))

    module = (Manual if manual else WithLoss)(loss)
    module.automatic_optimization = not manual
    told = rf"a part of the loss in .*\.training_step used the dominant labels only \(through {through}\)"
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[MixupCallback(**{"alpha": 1.0, **options})]).fit(module, loader(16))
    assert len(module.losses) == 1


@pytest.mark.parametrize("later", [by_masks, lambda s, y, _: F.multi_margin_loss(s, y)])
def test_a_later_step_that_does_not_see_the_mixture_warns_once(later):
    module = WithLoss(lambda s, y, self: F.cross_entropy(s, y) if self.current_epoch < 2 else later(s, y, self))
    with pytest.warns(UserWarning, match=r"From epoch 2 on: MixupCallback\(labels=1\).* the dominant labels") as told:
        trainer(callbacks=[MixupCallback(alpha=1.0)], max_epochs=4).fit(module, loader(16))
    assert len([one for one in told if "MixupCallback" in str(one.message)]) == 1
    assert len(module.losses) == 8


class Watched(Classifier):
    """A loss that reads the mixture, and everything beside it that may look at labels."""

    def __init__(self):
        super().__init__()
        self.metrics = torchmetrics.MetricCollection(
            {
                "accuracy": torchmetrics.Accuracy("multiclass", num_classes=CLASSES),
                "f1": torchmetrics.F1Score("multiclass", num_classes=CLASSES, average="macro"),
                "hinge": torchmetrics.HingeLoss("multiclass", num_classes=CLASSES),
            }
        )
        self.auroc = torchmetrics.AUROC("multiclass", num_classes=CLASSES)
        self.register_buffer("counts", torch.zeros(CLASSES))
        self.hits = []

    def training_step(self, batch, batch_idx):
        scores, labels = self.head(self.backbone(batch[0])), batch[1]
        self.log_dict(self.metrics(scores, labels), on_step=True)
        self.auroc.update(scores, labels)
        each = F.cross_entropy(scores, labels, reduction="none")
        for c in range(CLASSES):
            self.log(f"loss_{c}", each[labels == c].sum())
        self.hits.append(scores.argmax(1) == labels)
        self.counts[labels] += 1
        self.losses.append(labels.cpu().tolist())
        return {"loss": each.mean(), "hits": self.hits[-1], "labels": labels}

    def on_train_epoch_end(self):
        self.log("auroc", self.auroc.compute())
        self.auroc.reset()


@pytest.mark.parametrize("options", [{}, {"per_element": True, "prob": 0.5}, {"prob": 0.0}, {"alpha": 1e-3}])
def test_looks_at_labels_beside_the_loss_do_not_stop_a_run(options):
    module, run = Watched(), trainer(callbacks=[MixupCallback(**{"alpha": 1.0, "seed": 3, **options})], max_epochs=3)
    run.fit(module, loader(24))
    assert type(module.counts) is torch.Tensor
    assert module.counts.sum() > 0
    assert len(torch.cat(module.hits)) == 72
    assert type(torch.cat(module.hits)) is torch.Tensor
    assert all(type(state) is torch.Tensor for state in run.model.state_dict().values())


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"alpha": 1e-6}, {"stop_after": 0.0}])
def test_a_run_that_mixes_nothing_takes_any_loss(options):
    module = WithLoss(by_masks)
    trainer(callbacks=[MixupCallback(**{"alpha": 1.0, "seed": 1, **options})], max_epochs=2).fit(module, loader(16))
    assert len(module.losses) == 4


def test_a_trick_of_no_mixing_looks_for_no_labels():
    class Unlabelled(Classifier):
        def training_step(self, batch, batch_idx):
            return self.head(self.backbone(batch)).square().mean()

    trainer(callbacks=[MixupCallback(alpha=0.0, labels="y")], max_epochs=1).fit(Unlabelled(), Batches(images(8)[0]))


def test_a_step_that_reads_no_labels_is_told_so():
    module = WithLoss(lambda s, y, _: s.square().mean() + 0 * len(y))
    with pytest.raises(
        MisconfigurationException, match=r"reads no labels at all\. Name the place.*`mix_values`"
    ) as told:
        trainer(callbacks=[MixupCallback()]).fit(module, loader(8))
    assert "dominant" not in str(told.value)


def test_what_was_written_into_is_plain_again_after_an_exception():
    def fails(scores, labels, module):
        module.counts.index_add_(0, labels, torch.ones(len(labels)))
        assert type(module.counts) is not torch.Tensor
        raise KeyError("x")

    module = WithLoss(fails)
    module.register_buffer("counts", torch.zeros(CLASSES))
    with pytest.raises(KeyError):
        trainer(callbacks=[MixupCallback()]).fit(module, loader(8))
    assert type(module.counts) is torch.Tensor


@pytest.mark.parametrize(
    "cast",
    [
        lambda y, x: y.view(-1, 1).type_as(x),
        lambda y, x: y.unsqueeze(1).float(),
        lambda y, x: y.float()[:, None],
        lambda y, x: y.to(x)[:, None],
    ],
)
def test_integers_of_yes_and_no_are_blended_in_a_binary_loss(cast):
    x, y = images(8)[0], torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    seen = []

    def binary(scores, labels, module):
        scores = scores[:, :1]
        loss = F.binary_cross_entropy_with_logits(scores, cast(labels, scores))
        seen.append(((scores > 0).squeeze(1) == labels, scores.detach()))
        return loss

    module = WithLoss(binary)
    trainer(callbacks=[MixupCallback(alpha=1.0, seed=3)], max_epochs=3).fit(module, Batches((x, y)))
    for number, loss in enumerate(module.losses):
        _, partner, lam = redraw(x, number, alpha=1.0)
        blend = (lam * y + (1 - lam) * y[partner]).unsqueeze(1)
        assert loss == pytest.approx(F.binary_cross_entropy_with_logits(seen[number][1], blend).item(), rel=1e-5)


def as_classes(kind):
    labels = torch.arange(24) % 2 * 2.0
    return labels if kind == "labels" else labels.view(24, 1, 1, 1).expand(24, 1, 8, 8).clone()


@pytest.mark.parametrize("kind", ["labels", "maps"])
@pytest.mark.parametrize("classes", [lambda y: y.long(), lambda y: y.to(torch.uint8).long(), lambda y: y.int().long()])
def test_classes_in_floating_point_are_refused_where_the_blend_is_cast(kind, classes):
    def loss(scores, labels, _):
        return F.cross_entropy(scores, classes(labels.squeeze(1) if kind == "maps" else labels))

    module = WithLoss(loss)
    if kind == "maps":
        module.backbone, module.head = nn.Conv2d(2, CLASSES, 1), nn.Identity()
    data = DataLoader(TensorDataset(images(24)[0], as_classes(kind)), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"makes classes of them .*`cross_entropy`.*as integers"):
        trainer(callbacks=[MixupCallback(alpha=1.0, seed=3)]).fit(module, data)
    assert len(module.losses) == 1


def test_maps_in_floating_point_that_are_only_pasted_stay_classes():
    module = WithLoss(lambda s, y, _: F.cross_entropy(s, y.squeeze(1).long()))
    module.backbone, module.head = nn.Conv2d(2, CLASSES, 1), nn.Identity()
    data = DataLoader(TensorDataset(images(24)[0], as_classes("maps")), batch_size=8)
    trainer(callbacks=[MixupCallback(alpha=0.0, cutmix_alpha=1.0, seed=3)]).fit(module, data)
    assert len(module.losses) == 9


def test_regression_on_whole_numbers_is_blended_and_may_count_exact_hits():
    ages = torch.randint(0, 90, (8,)).float()
    seen = []

    def loss(scores, targets, module):
        known = targets > 0
        module.log("exact", (scores[:, 0].round().long() == targets.long()).float().mean())
        seen.append(targets * 1)
        return F.mse_loss(scores[known, 0], targets[known])

    x = images(8)[0]
    trainer(callbacks=[MixupCallback(alpha=1.0, seed=3)], max_epochs=4).fit(WithLoss(loss), Batches((x, ages)))
    for number, targets in enumerate(seen):
        _, partner, lam = redraw(x, number, alpha=1.0)
        torch.testing.assert_close(targets, lam * ages + (1 - lam) * ages[partner])


@pytest.mark.parametrize("wrong", [255, -1, CLASSES])
def test_a_label_that_soft_targets_have_no_place_for_is_named(wrong):
    labels = torch.tensor([0, 1, wrong, 2])
    callback = MixupCallback(targets="soft", num_classes=CLASSES)
    for generator in (None, generator_for(1)):
        with pytest.raises(MisconfigurationException, match=rf"num_classes=4\) .* 0 to 3, .* but got {wrong}\."):
            callback.mix((torch.randn(4, 2), labels), generator)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks there
def test_a_compiled_loss_of_dominant_labels_stops_the_run():
    torch._dynamo.reset()
    picked = torch.compile(lambda s, y: -s.log_softmax(1).gather(1, y.unsqueeze(1)).mean(), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"nothing in WithLoss\.training_step read"):
        trainer(callbacks=[MixupCallback(alpha=1.0)]).fit(WithLoss(lambda s, y, _: picked(s, y)), loader(16))
