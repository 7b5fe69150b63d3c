"""The frozen part is computed once for each sample, the weights end as without the cache, and what would be wrong is refused."""

from __future__ import annotations

import pickle
import random
from collections import UserDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_speedups import FeatureCache, FreezeBackboneFinetune, MixupCallback
from lightning_speedups.tensors.feature_store import Kind, bytes_needed
from lightning_speedups.tensors.unloaded import Unloaded
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    FreezesBackbone,
    Manual,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    images,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [FreezesBackbone(), FeatureCache()]}


class CountsConvolutions(TorchDispatchMode):
    """Counts the images that real convolutions have seen."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and not isinstance(args[0], Unloaded):
            self.images += len(args[0])
        return func(*args, **(kwargs or {}))


class Frozen(Classifier):
    """A classifier with a backbone that is frozen from the start."""

    def __init__(self, backbone=None, head=None, **options):
        torch.manual_seed(3)
        super().__init__(**options)
        self.backbone = self.backbone if backbone is None else backbone
        self.head = self.head if head is None else head
        self.backbone.requires_grad_(False)

    def on_train_start(self):
        self.backbone.eval()


def shuffled(samples=32, batch_size=8, dataset=None, **options):
    data = TensorDataset(*images(samples)) if dataset is None else dataset
    generator = torch.Generator().manual_seed(5)
    return DataLoader(data, batch_size, shuffle=True, generator=generator, **options)


def fit(module, data, *callbacks, **arguments):
    """Fit, and return how many images real convolutions have seen."""
    counter = CountsConvolutions()
    with counter:
        trainer(callbacks=list(callbacks), **arguments).fit(module, data)
    return counter.images


def seeded(call, *args, **arguments):
    torch.manual_seed(3)
    return call(*args, **arguments)


def same_as_without(make, data, cache=None, close=False, others=list, **arguments):
    """Train with and without the cache, and return the cache and the images that convolutions saw in both."""
    plain, cached, cache = seeded(make), seeded(make), cache or FeatureCache()
    seen = [seeded(fit, plain, data(), *others(), **arguments)]
    seen.append(seeded(fit, cached, data(), *others(), cache, **arguments))
    one, other = weights(plain), weights(cached)
    if close:
        torch.testing.assert_close(one, other)
    else:
        assert_same_weights(one, other)
    assert plain.losses == pytest.approx(cached.losses, rel=1e-4) if close else plain.losses == cached.losses
    return cache, *seen


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("folder", [None, "features"])
def test_weights_end_as_without_the_cache_and_each_sample_is_computed_once(optimizer, folder):
    cache, plain, cached = same_as_without(
        lambda: Frozen(optimizer=optimizer), shuffled, FeatureCache(folder), max_epochs=5
    )
    assert plain == 5 * 32
    # All samples once, and in the second and the fourth epoch a batch that checks what is kept.
    assert cached == 32 + 2 * 8
    assert (cache.hits, cache.misses) == (14, 6)


class Images(Dataset):
    """Images by index, after a transform."""

    def __init__(self, transform=None, samples=32):
        (self.images, self.labels), self.transform = images(samples), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]


class Timm(Frozen):
    """A timm model, frozen but for its classifier."""

    def __init__(self, name, **options):
        super().__init__(nn.Identity())
        self.net = timm.create_model(name, num_classes=CLASSES, in_chans=2, **options).requires_grad_(False)
        self.net.get_classifier().requires_grad_(True)
        self.head = nn.Identity()

    def on_train_start(self):
        self.net.eval()

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("test_vit", {"img_size": 8, "patch_size": 4}), ("test_efficientnet", {})],
    ids=str,
)
def test_models_of_timm(name, options):
    cache, plain, cached = same_as_without(lambda: Timm(name, **options), shuffled, close=True)
    assert (cache.hits, cache.misses) == (7, 5)
    assert cached * 12 == plain * 5


def conv(of=2, to=6, **options):
    return nn.Conv2d(of, to, 3, padding=1, **options)


class Pool(nn.Module):
    def forward(self, maps):
        return maps.mean((-2, -1))


class TwoHeads(Frozen):
    """One head is given by keyword, in a nest, twice, by another shape; the other takes two stages, one in a list."""

    def __init__(self):
        super().__init__(nn.ModuleList([conv(), nn.GroupNorm(2, 6), conv(6)]), nn.Linear(6, CLASSES))
        self.other = Mixes()

    def training_step(self, batch, batch_idx):
        first = self.backbone[1](self.backbone[0](batch[0])).relu_()
        second = self.backbone[2](first)
        logits = self.head(Pool()(first)) + self.head(input=Pool()(second)) + self.other({"a": [first, 3], "b": second})
        loss = F.cross_entropy(logits, batch[1])
        self.losses.append(loss.item())
        return loss


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, stages):
        return self.layer(Pool()(stages["a"][0].mul_(stages["a"][1]).relu_() + stages["b"]))


class Residual(Frozen):
    """Thawed convolutions between frozen norms, and around them a sum with what is frozen."""

    def __init__(self):
        super().__init__(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True)))
        self.block = nn.ModuleDict({"conv": conv(6), "norm": nn.BatchNorm2d(6).requires_grad_(False)})

    def on_train_start(self):
        super().on_train_start()
        self.block["norm"].eval()

    def training_step(self, batch, batch_idx):
        inner = self.backbone(batch[0])
        outer = self.block["norm"](self.block["conv"](inner)) + inner
        loss = F.cross_entropy(self.head(Pool()(outer.relu_())), batch[1])
        self.losses.append(loss.item())
        return loss


class ByHand(Manual, Frozen):
    pass


class NormalisesAndDropsOut(Frozen):
    """Preprocesses in the step, with a buffer of its own; dropout behind the cut, and between two trainable layers."""

    def __init__(self):
        super().__init__(head=nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, CLASSES)))
        self.register_buffer("mean", torch.full((2, 1, 1), 0.3))
        self.register_buffer("steps", torch.zeros(()))
        self.last = nn.Linear(CLASSES, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        inputs = (batch[0] - self.mean) / batch[0].new_full((1,), 2.0)
        with torch.no_grad():
            features = self.backbone(inputs)
        loss = F.cross_entropy(self.last(self.dropout(self.head(features))), batch[1])
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("make", [TwoHeads, Residual, ByHand, NormalisesAndDropsOut])
def test_all_kinds_of_modules_end_as_without_the_cache(make):
    cache, _, _ = same_as_without(make, shuffled)
    assert (cache.hits, cache.misses) == (7, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
        {"limit_train_batches": 3},
    ],
    ids=str,
)
def test_all_kinds_of_trainers_end_as_without_the_cache(arguments):
    cache, _, _ = same_as_without(Frozen, shuffled, max_epochs=4, **arguments)
    assert cache.hits >= 1


@pytest.mark.parametrize("options", [{"drop_last": True}, {}], ids=str)
def test_samples_that_come_late_are_computed_when_they_come(options):
    cache, plain, cached = same_as_without(Frozen, lambda: shuffled(29, 7, **options), max_epochs=4, close=True)
    assert cache.hits >= 8
    assert cached <= plain * 0.6


class TakesMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, features, labels, scale, queries):
        return self.layer(features * scale) + queries.sum() * labels.view(-1, 1)


class GivesMore(Frozen):
    """Two heads get the same features, the labels, something in one row, and frozen weights in as many as a batch."""

    def __init__(self):
        super().__init__(head=nn.ModuleList([TakesMore(), TakesMore()]))
        self.register_buffer("scale", torch.full((1, 6), 0.5))
        self.queries = nn.Parameter(torch.randn(7, 2), requires_grad=False)

    def training_step(self, batch, batch_idx):
        features, labels = self.backbone(batch[0]), batch[1]
        logits = sum(head(features, labels, self.scale * 2, self.queries) for head in self.head)
        loss = F.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return loss


def test_only_features_are_kept_and_each_once():
    cache = FeatureCache()
    notes = NotesStore(cache)
    same_as_without(GivesMore, lambda: shuffled(29, 7), cache, close=True, others=lambda: [notes], max_epochs=4)
    assert notes.shapes[-1] == [(6,)]
    assert cache.hits > 5


class Leaves(nn.Module):
    """Leaves its features elsewhere, and returns something else."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.ReLU(), Pool())

    def forward(self, inputs):
        self.left = self.layers(inputs)
        return self.left.mean()


class Collects(Frozen):
    def __init__(self):
        super().__init__(Leaves())

    def training_step(self, batch, batch_idx):
        self.backbone(batch[0])
        loss = F.cross_entropy(self.head(self.backbone.left), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.backbone(batch[0])


@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 1}], ids=str)
def test_what_a_frozen_module_leaves_elsewhere_is_of_this_batch(arguments):
    def data():
        return shuffled(28, 7, drop_last=True) if arguments else shuffled(30, 7, drop_last=True)

    plain, cached, cache = seeded(Collects), seeded(Collects), FeatureCache()
    for module, callbacks in ((plain, []), (cached, [cache])):
        validation = DataLoader(TensorDataset(*images(7, seed=9)), 7)
        seeded(trainer(callbacks=callbacks, max_epochs=8, **arguments).fit, module, data(), validation)
    torch.testing.assert_close(weights(plain), weights(cached))
    assert cache.hits > 8


def test_features_have_the_type_in_which_they_come(tmp_path):
    data = shuffled()
    fit(Frozen(), data, FeatureCache(tmp_path / "f"), precision="bf16-mixed")
    (file,) = (tmp_path / "f").glob("*/*.bin")
    assert file.stat().st_size == bytes_needed({"head 0 0": Kind((6,), torch.bfloat16)}, len(data.dataset))


def test_frozen_modules_are_not_even_called():
    cache, module = FeatureCache(), Frozen()
    calls = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            calls.append(type(batch[0]) is Unloaded and cache.run.cuts.shortcuts.count)

    fit(module, shuffled(), Looks(), cache)
    assert calls == [False] * 6 + [0, 1] + [0, 1, 2, 3]  # in the third epoch not for the first batch either


def test_modules_without_parameters_are_not_called_either():
    class Pool(nn.AvgPool2d):
        calls = 0

        def forward(self, x):
            self.calls += isinstance(x, Unloaded)
            return super().forward(x)

    module = Frozen(nn.Sequential(pool := Pool(2), nn.Flatten(), nn.Linear(32, 6)))
    module.backbone[1].register_forward_hook(lambda *_: None)  # somebody listens: what is around it is called
    fit(module, shuffled(), cache := FeatureCache())
    assert (pool.calls, cache.hits) == (1, 7)


class Validates(Callback):
    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        self.found.append(float(trainer.callback_metrics["val_loss"]))


def test_validation_runs_the_whole_model_in_the_middle_of_an_epoch():
    found = []
    for callbacks in ([], [FeatureCache()]):
        validates = Validates()
        one = trainer(callbacks=[*callbacks, validates], val_check_interval=2)
        one.fit(Frozen(), shuffled(), DataLoader(TensorDataset(*images(16, seed=3)), 8))
        found.append(validates.found)
    assert found[0] == found[1]
    assert len(found[0]) == 6


# Frozen and thawed


class Thaws(Callback):
    """Thaws a part of the backbone at an epoch's start, as a finetuning callback does."""

    def __init__(self, part, epoch):
        self.part, self.epoch = part, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.get_submodule(self.part).requires_grad_(True)


class NotesStore(Callback):
    """Notes how many features are kept for a sample in each step."""

    def __init__(self, cache):
        self.cache, self.kept, self.shapes = cache, [], []

    def on_train_batch_end(self, trainer, *_):
        store = self.cache.run.store
        self.shapes.append(None if store is None else [kind.shape for kind in store.kinds.values()])


def staged():
    return Frozen(nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(conv(6, 6), nn.ReLU(), Pool())))


@pytest.mark.parametrize("order", [1, -1])
def test_thawing_moves_the_cut_or_ends_the_cache(order):
    def others():
        return [Thaws("backbone.1", 2), Thaws("backbone", 5)]

    plain, cached, cache = seeded(staged), seeded(staged), FeatureCache()
    notes = NotesStore(cache)
    fit(plain, shuffled(), *others(), max_epochs=7)
    seen = fit(cached, shuffled(), *[*others(), cache, notes][::order], max_epochs=7)
    assert_same_weights(weights(plain), weights(cached))
    assert notes.shapes == [[(6,)]] * 8 + [[(6, 8, 8)]] * 12 + [None] * 8 if order == 1 else True
    # Two convolutions for 40 samples; then the first one for 40, the second for all and in the trial; and both for all.
    assert seen == 2 * 40 + (40 + 3 * 32 + 8) + 2 * 64
    assert cache.hits == 3 + 7


def test_nothing_is_done_where_nothing_is_frozen_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="FeatureCache finds nothing to do: no parameter is frozen") as caught:
        same_as_without(Classifier, shuffled)
    assert len([one for one in caught if "nothing to do" in str(one.message)]) == 1


class TrainsOnInputs(Frozen):
    def __init__(self):
        super().__init__(head=nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(batch[0]), batch[1]) + self.backbone(batch[0]).mean()


def test_where_only_inputs_come_to_what_trains_there_is_nothing_to_do():
    module, cache = TrainsOnInputs(), FeatureCache()
    with pytest.warns(UserWarning, match="nothing to do: nothing that comes to the trainable modules is frozen"):
        trainer(callbacks=[cache]).fit(module, shuffled())
    assert (cache.hits, cache.misses) == (0, 1)


class TwoBranches(Frozen):
    """One head takes the inputs themselves, and writes into them; the other takes features."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, CLASSES))

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0])
        loss = F.cross_entropy(self.head(features) + self.stem(batch[0][:, :]), batch[1])
        self.losses.append(loss.item())
        return loss


def test_a_trainable_module_that_takes_the_inputs_themselves_gets_them():
    cache, _, cached = same_as_without(TwoBranches, shuffled)
    assert cached == 40
    assert (cache.hits, cache.misses) == (7, 5)


class Changes(Callback):
    """Changes something at the start of an epoch."""

    def __init__(self, epoch, change):
        self.epoch, self.change = epoch, change

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                self.change(trainer, pl_module)


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer, module: module.backbone[0].weight.mul_(1.01),
        lambda trainer, module: module.backbone[1].running_mean.add_(0.01),
        lambda trainer, module: setattr(module.backbone[0].weight, "data", module.backbone[0].weight * 2),
        lambda trainer, module: module.backbone[0].weight.data.mul_(3),
    ],
)
def test_features_are_computed_anew_when_frozen_weights_change(change):
    _, _, cached = same_as_without(Frozen, shuffled, max_epochs=6, others=lambda: [Changes(3, change)])
    assert cached == 2 * 40


def test_what_changes_in_a_later_epoch_and_shows_nowhere_is_found_out():
    class Grows(Frozen):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.head(self.backbone(batch[0]) * (1 + (self.current_epoch >= 3))), batch[1])
            self.losses.append(loss.item())
            return loss

    fit(Grows(), shuffled(), FeatureCache("features"))
    for cache in (FeatureCache(), FeatureCache("features")):  # these were right until now
        message = refused(Grows(), shuffled(), steps=3 * 4 + 1, max_epochs=5, cache=cache)
        assert "makes something else of the same samples" in message


@dataclass
class Pair:
    images: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize(
    ("kind", "place"), [(lambda *pair: UserDict(zip("xy", pair, strict=True)), "x"), (Pair, "images")]
)
def test_batches_that_are_objects(kind, place):
    class Unpacks(Frozen):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                [*(batch.values() if isinstance(batch, UserDict) else vars(batch).values())], 0
            )

    def data():
        return shuffled(collate_fn=lambda samples: kind(*torch.utils.data.default_collate(samples)))

    _, _, cached = same_as_without(Unpacks, data, FeatureCache(inputs=place))
    assert cached == 40


class Reads(Frozen):
    """Reads the inputs in some steps, and its callback in all."""

    def __init__(self):
        super().__init__()
        self.read = []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step % 3 == 2:
            picture = (batch[0][:2, :, ::2] - batch[0].min()) / 2
            self.read.append(picture.clamp(0, 1).cpu().numpy())
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.read.append(batch[0].mean().item())


def test_the_inputs_themselves_can_be_read():
    read = []
    for callbacks in ([], [FeatureCache()]):
        module = seeded(Reads)
        seeded(fit, module, shuffled(), *callbacks)
        read.append(module.read)
    assert all(np.array_equal(one, other) for one, other in zip(*read, strict=True))


class Closures(Frozen):
    """Its optimizer asks for several steps on each batch."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.head.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


def test_an_optimizer_that_asks_for_several_steps():
    message = refused(Closures(), shuffled())
    assert "LBFGS runs `training_step` several times in each. Use another optimizer, or leave out" in message


class TakesMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, features, mixer):
        return self.layer(features) * mixer.mean()


class GivesMixer(Frozen):
    def __init__(self):
        super().__init__(head=TakesMixer())

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.backbone(batch[0]), torch.eye(8) * 2), batch[1])
        self.losses.append(loss.item())
        return loss


def test_a_constant_with_as_many_rows_as_a_batch():
    message = refused(GivesMixer(), shuffled(29, 8), steps=4)
    assert "nothing but features have as many rows as the first batch" in message


class TwoDropouts(Frozen):
    """Two heads with dropout before their first layer."""

    def __init__(self):
        super().__init__(head=nn.Sequential(nn.Dropout(0.2), nn.Linear(6, CLASSES)))
        self.other = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, CLASSES))

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0])
        loss = F.cross_entropy(self.head(features) + self.other(features), batch[1])
        self.losses.append(loss.item())
        return loss


def test_dropout_in_several_heads():
    cache, _, _ = same_as_without(TwoDropouts, shuffled)
    assert (cache.hits, cache.misses) == (7, 5)


def test_weights_that_are_swapped_and_come_back_cost_one_batch():
    def swap(trainer, module):
        module.backbone[0].weight.copy_(module.backbone[0].weight.clone())

    _, _, cached = same_as_without(Frozen, shuffled, max_epochs=6, others=lambda: [Changes(3, swap)])
    assert cached == 40 + 8


def test_features_are_computed_anew_when_the_preprocessing_changes():
    def change(trainer, module):
        trainer.train_dataloader.dataset.transform = lambda image: image * 2

    with pytest.warns(UserWarning, match="its preprocessing is not what it was"):
        _, _, cached = same_as_without(
            Frozen, lambda: shuffled(dataset=Images()), max_epochs=6, others=lambda: [Changes(3, change)]
        )
    assert cached == 2 * 40


# Folder


def test_a_second_run_finds_the_features_of_the_first():
    first, second, plain = FeatureCache("features"), FeatureCache("features"), Frozen()
    fit(Frozen(), shuffled(), first)
    module = Frozen()
    assert fit(module, shuffled(), second) == 2 * 8  # in the first two epochs a batch that checks
    fit(plain, shuffled())
    assert_same_weights(weights(plain), weights(module))
    assert (second.hits, second.misses) == (10, 2)


def other_weights(module, data):
    with torch.no_grad():
        module.backbone[0].weight[0, 0, 0, 0] += 1e-6


def other_mean(module, data):
    module.backbone[1].running_mean[0] += 1e-6


def other_preprocessing(module, data):
    data.dataset.transform = lambda image: image + 0.01


def other_structure(module, data):
    module.backbone[1].eps = 1e-3


def other_length(module, data):
    data.dataset.labels = data.dataset.labels[:24]
    data.batch_sampler.sampler.data_source.labels = data.dataset.labels


def other_hook(module, data):
    module.on_after_batch_transfer = lambda batch, dataloader_idx: [batch[0] * 2, batch[1]]


@pytest.mark.parametrize(
    "change",
    [other_weights, other_mean, other_preprocessing, other_structure, other_length, other_hook],
)
def test_another_run_with_other_weights_or_data_has_features_of_its_own(change, tmp_path):
    fit(Frozen(), shuffled(dataset=Images()), FeatureCache(tmp_path / "features"))
    module, data, cache = Frozen(), shuffled(dataset=Images()), FeatureCache(tmp_path / "features")
    change(module, data)
    fit(module, data, cache)
    assert cache.misses == len(data) + 1
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_features_in_a_folder_that_are_wrong_are_found_out(tmp_path):
    fit(Frozen(), shuffled(), FeatureCache(tmp_path / "features"))
    (file,) = (tmp_path / "features").glob("*/*.bin")
    file.write_bytes(bytes([64]) * (file.stat().st_size - 32) + file.read_bytes()[-32:])
    message = refused(Frozen(), shuffled(), steps=1, cache=FeatureCache(tmp_path / "features"))
    assert "makes something else of the same samples than what is kept" in message
    assert "delete a `folder` of other samples" in message


def test_a_second_run_finds_them_beside_what_moves_in_each_step():
    first, second = FeatureCache("features"), FeatureCache("features")
    fit(NormalisesAndDropsOut(), shuffled(), first)
    module = NormalisesAndDropsOut()
    module.steps += 7
    fit(module, shuffled(), second)
    assert (second.hits, second.misses) == (10, 2)


def test_the_limit():
    size = 32 + 32 * 6 * 4 + 32
    same_as_without(Frozen, shuffled, FeatureCache(max_gib=(size + 1) / 2**30))
    with pytest.warns(UserWarning, match=r"features of 32 samples, \(6,\) for `head`, need .* GiB.*max_gib") as caught:
        cache, plain, cached = same_as_without(Frozen, shuffled, FeatureCache(max_gib=700 / 2**30))
    assert plain == cached
    assert cache.hits == 0
    assert len([one for one in caught if "max_gib" in str(one.message)]) == 1


def test_a_file_that_cannot_be_opened(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("unable to open file")

    monkeypatch.setattr("torch.from_file", fails)
    with pytest.warns(UserWarning, match="unable to open file"):
        _, plain, cached = same_as_without(Frozen, shuffled, FeatureCache(tmp_path / "features"))
    assert plain == cached


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 10}))
    with pytest.warns(UserWarning, match="disk of .* has 10 bytes left"):
        _, plain, cached = same_as_without(Frozen, shuffled, FeatureCache(tmp_path / "features"))
    assert plain == cached


# Resume


@pytest.mark.parametrize("folder", [None, "features"])
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_run_ends_as_the_whole_one(stop, folder):
    def run():
        return Frozen(optimizer="adam"), ReplayLoader(), [FeatureCache(folder)]

    whole, data, callbacks = run()
    fit(whole, data, *callbacks, max_epochs=4)
    parted, data, callbacks = run()
    fit_interrupted(parted, data, stop, callbacks, max_epochs=4)
    rest, data, callbacks = run()
    counter = CountsConvolutions()
    with counter:
        resume(rest, data, callbacks, max_epochs=4)
    assert_same_weights(weights(whole), weights(rest))
    assert counter.images <= (3 * 8 if folder else 16 + 32 + 2 * 8)


def test_it_pickles_without_features_and_frees_them():
    cache = FeatureCache()
    before = len(pickle.dumps(cache))
    fit(Frozen(), shuffled(), cache)
    assert len(pickle.dumps(cache)) <= before + 20
    assert cache.run.store is None


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": 3}, "`folder` to be a path or None, but got 3"),
        ({"folder": ""}, "`folder` to be a path or None, but got ''"),
        ({"max_gib": -1}, "`max_gib` to be a number of 0 or more"),
        ({"inputs": None}, "`inputs` to be an index"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureCache(**arguments)


def refused(module, data, *callbacks, steps=0, cache=None, **arguments):
    """Return the error of a fit, which ran no more steps than it may."""
    with pytest.raises(MisconfigurationException) as error:
        trainer(callbacks=[cache or FeatureCache(), *callbacks], **arguments).fit(module, data)
    assert len(module.losses) == steps
    return str(error.value)


def test_a_trick_that_changes_inputs():
    message = refused(Frozen(), shuffled(), MixupCallback())
    assert "FeatureCache" in message
    assert "MixupCallback" in message


def test_a_compiled_module():
    module = Frozen()
    module.backbone.compile(backend="eager")
    assert "`backbone` (Sequential) is compiled" in refused(module, shuffled())
    module = Frozen()
    module.head = torch.compile(module.head, backend="eager")
    assert "`head` (OptimizedModule) is compiled" in refused(module, shuffled())


def python_noise(image):
    return image + random.random()


def numpy_noise(image):
    return image + float(np.random.rand())  # noqa: NPY002


OWN = torch.Generator()


def hidden_noise(image):
    return image + torch.rand(1, generator=OWN)


def collate_noise(samples):
    inputs, labels = torch.utils.data.default_collate(samples)
    return inputs + torch.rand(1), labels


@pytest.mark.parametrize(
    ("transform", "found"),
    [
        (v2.RandomHorizontalFlip(), "RandomHorizontalFlip"),
        (v2.Compose([v2.ToDtype(torch.float32), v2.RandomErasing(p=0.01)]), "RandomErasing"),
        (python_noise, "Images"),
        (numpy_noise, "Images"),
        (hidden_noise, "different when they are loaded twice"),
    ],
)
def test_augmentation_in_the_dataset(transform, found):
    message = refused(Frozen(), shuffled(dataset=Images(transform)))
    assert found in message
    assert "Leave out random augmentation" in message


def test_augmentation_in_the_collate_function():
    assert "collate_fn" in refused(Frozen(), shuffled(collate_fn=collate_noise))


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_augmentation_in_a_transfer_hook(hook):
    module = Frozen()
    setattr(module, hook, lambda batch, dataloader_idx: [batch[0] + torch.rand(1), batch[1]])
    assert "transfer hooks" in refused(module, shuffled())


class DropPath(nn.Module):
    def forward(self, values):
        return values * torch.rand(len(values), 1, 1, 1).round() if self.training else values


def training(module):
    """Leave the backbone in training mode."""
    module.on_train_start = lambda: None
    return module


def frozen_with(*layers):
    return training(Frozen(nn.Sequential(conv(), *layers, Pool())))


class BetweenThem(Frozen):
    """Dropout between the frozen and the trainable part, in neither."""

    def __init__(self, functional):
        super().__init__()
        self.between = F.dropout if functional else nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        self.losses.append(0.0)
        return F.cross_entropy(self.head(self.between(self.backbone(batch[0]))), batch[1])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: frozen_with(nn.Dropout2d(0.1)), "`backbone.1` (Dropout2d)"),
        (lambda: frozen_with(DropPath()), "`backbone.1` (DropPath)"),
        (lambda: frozen_with(timm.layers.DropPath(0.1)), "`backbone.1` (DropPath)"),
        (lambda: BetweenThem(True), "`head` (Linear)"),
    ],
)
def test_something_random_in_the_frozen_part(make, found):
    module = make()
    message = refused(module, shuffled(), steps=isinstance(module, BetweenThem))
    assert found in message
    assert "something random" in message


class Encoder(nn.Module):
    """As a BERT is built: dropout in the embeddings, in attention, and behind each sum."""

    def __init__(self):
        super().__init__()
        self.words, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, 0.2, batch_first=True) for _ in range(2))

    def forward(self, inputs):
        found = self.dropout(self.words(inputs.flatten(1, 2)))
        for layer in self.layers:
            found = layer(found)
        return found[:, 0]


class Encodes(Classifier):
    """Dropout in what is frozen, and in the head."""

    def __init__(self, backbone=None):
        torch.manual_seed(3)
        super().__init__()
        self.backbone = backbone or Encoder()
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, CLASSES))


def small_vit():
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 2, "in_chans": 2}
    rates = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.3)
    return timm.models.VisionTransformer(**options, **rates, num_classes=0)


@pytest.mark.parametrize("backbone", [Encoder, small_vit])
def test_dropout_rests_in_what_freeze_backbone_finetune_freezes(backbone):
    def others():
        return [FreezeBackboneFinetune(unfreeze_at_epoch=None)]

    cache, _, _ = same_as_without(lambda: Encodes(backbone()), shuffled, others=others, close=True, max_epochs=5)
    assert (cache.hits, cache.misses) == (14, 6)
    by_hand = Encodes(backbone())
    by_hand.backbone.requires_grad_(False)
    assert "something random goes into it" in refused(by_hand, shuffled(), steps=0)
    assert all(part.training for part in by_hand.modules())


@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_before_a_layer_that_thaws_gets_the_features(in_place):
    def make():
        net = nn.Sequential(conv(), nn.Dropout(0.2, in_place), conv(6), nn.Dropout(0.2), Pool(), nn.Linear(6, 8))
        return Encodes(net)

    def others():
        return [FreezeBackboneFinetune(schedule={0: "head", 2: "2"})]

    cache, plain, cached = same_as_without(make, shuffled, others=others, close=True, max_epochs=5)
    assert (cache.hits, cache.misses) == (10, 10)
    assert plain == 5 * 2 * 32
    assert cached == plain - 3 * 2 * 8 - 7 * 8 + 8  # three batches without both convolutions, then without one; a trial


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Dropout(0.0), nn.Dropout(1.0)], ids=str)
def test_dropout_between_what_is_frozen_and_what_trains_gets_the_features(drop):
    def make():
        module = BetweenThem(False)
        module.between = drop
        return module

    cache, plain, cached = same_as_without(make, shuffled, close=True, max_epochs=5)
    assert (cache.hits, cache.misses) == (14, 6)
    assert (plain, cached) == (5 * 32, 32 + 2 * 8)


def test_random_numbers_that_are_drawn_in_a_later_step_only():
    class Later(Frozen):
        def training_step(self, batch, batch_idx):
            if self.losses:
                torch.rand(1)
            return super().training_step(batch, batch_idx)

    assert "something random" in (message := refused(Later(), shuffled(), steps=1))
    assert "generator of torch" in message


def test_random_numbers_of_python():
    class Sometimes(Frozen):
        def training_step(self, batch, batch_idx):
            random.random()
            return super().training_step(batch, batch_idx)

    assert "generator of Python" in refused(Sometimes(), shuffled())


@pytest.mark.parametrize(
    ("layer", "in_training", "found"),
    [
        (nn.BatchNorm2d, True, "`backbone.1` (BatchNorm2d) normalises by the statistics of the batch"),
        (partial(nn.BatchNorm2d, track_running_stats=False), False, "`backbone.1` (BatchNorm2d) normalises by"),
        (partial(nn.InstanceNorm2d, track_running_stats=True), True, "backbone.1.running_mean, backbone.1.running_var"),
    ],
    ids=str,
)
def test_norms_that_depend_on_the_batch(layer, in_training, found):
    module = Frozen(nn.Sequential(conv(), layer(6), Pool()))
    message = refused(training(module) if in_training else module, shuffled(), steps=int("running_mean" in found))
    assert found in message
    assert "evaluation mode" in message


class UsesValues(Frozen):
    def __init__(self, use):
        super().__init__()
        self.use = use

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return self.use(self, self.backbone(batch[0]), loss)


def logs(module, features, loss):
    module.log("mean", features.mean())
    return loss + 0 * features.mean().item()


@pytest.mark.parametrize(
    ("use", "found"),
    [
        (logs, "_local_scalar_dense"),
        (lambda module, features, loss: loss + features.mean(), "mixes them with what trains"),
        (lambda module, features, loss: loss * float(features.detach().numpy().sum() > 0), "numpy"),
        (lambda module, features, loss: loss + torch.zeros(8, 6).copy_(features).mean(), "writes them into another"),
        (
            lambda module, features, loss: loss + module.head(features.t().reshape(8, 6)[:4]).sum(),
            "`head` needs a tensor",
        ),
    ],
)
def test_what_needs_values_is_found_out_after_the_first_step(use, found):
    message = refused(UsesValues(use), shuffled(), steps=1)
    assert found in message
    assert "leave out FeatureCache" in message


class LooksBack(Frozen):
    """Its head gets the features of the batch before."""

    def training_step(self, batch, batch_idx):
        own = self.backbone(batch[0])
        self.before = own.clone() if batch_idx == 0 else self.before
        loss = F.cross_entropy(self.head(own) + self.head(self.before), batch[1])
        self.before = own
        self.losses.append(loss.item())
        return loss


def test_features_of_an_earlier_step():
    data = DataLoader(TensorDataset(*images(32)), 8)
    assert "what an earlier step had made" in refused(LooksBack(), data, steps=4 + 2)


class Memorises(Images):
    """Its samples are others in each epoch, but for those that are looked at."""

    def __init__(self):
        super().__init__(samples=64)
        self.shown = 0

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        self.shown += 1
        return (image if index % 63 in (0,) or index in self.looked_at else image * (1 + self.shown // 100)), label

    looked_at = ()


def test_data_that_changes_from_epoch_to_epoch_where_nobody_looks():
    from lightning_speedups.tensors.feature_store import evenly_spaced

    data = Memorises()
    data.looked_at = evenly_spaced(16, 64)
    message = refused(Frozen(), shuffled(dataset=data), steps=9)
    assert "makes something else of the same samples" in message


def test_inputs_elsewhere():
    class Named(Frozen):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["views"][0], batch["label"]), batch_idx)

    def data():
        return shuffled(dataset=[{"label": y, "views": [x, x]} for x, y in zip(*images(), strict=True)])

    _, _, cached = same_as_without(Named, data, FeatureCache(inputs=("views", 0)))
    assert cached == 40


def test_the_wrong_place_and_batches_of_other_samples():
    assert "no part 'image'" in refused(Frozen(), shuffled(), cache=FeatureCache(inputs="image"))
    message = refused(Frozen(), shuffled(collate_fn=lambda s: torch.utils.data.default_collate(s[1:])))
    assert "one row for each of the batch's 8 samples" in message


def test_inputs_of_several_sizes():
    class Grows(Images):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image[:, : 4 + index // 8], label

    module = Frozen(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(Pool(), nn.Linear(6, CLASSES)))
    data = DataLoader(
        Grows(),
        8,
        collate_fn=lambda s: (
            nn.utils.rnn.pad_sequence([x.transpose(0, 1) for x, _ in s], True).transpose(1, 2),
            torch.stack([y for _, y in s]),
        ),
    )
    assert "all inputs have one size" in refused(module, data, steps=2)


def test_a_loader_whose_samples_are_not_known():
    assert "FeatureCache needs one training loader" in refused(Frozen(), Batches(list(images(8))))
