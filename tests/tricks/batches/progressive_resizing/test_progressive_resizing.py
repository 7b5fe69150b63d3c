"""The sizes that a real fit sees, and what goes with them: loader, batch size, rate, regularisation, BatchNorm."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import v2

from lightning_speedups import BatchAugmentation, MixupCallback, OneCycleMomentum, ProgressiveResizing, WarmupLRScaler
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    OrderOfEpoch,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    images,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [ProgressiveResizing(multiple=2)]}


LATE = {"grow_from": 0.3, "full_from": 0.8}  # over most of the run


def sides(module):
    return [tuple(inputs.shape[-2:]) for inputs, _ in module.seen]


def expected(batches, full=16, start=0.5, grow_from=0.25, full_from=0.55, multiple=1):
    """The promise, once more: a line between two points, rounded."""
    share = np.interp(np.arange(batches) / batches, [grow_from, full_from], [start, 1.0])
    return [full if one == 1 else multiple * math.floor(full * one / multiple + 0.5) for one in share]


def square(side, count=32, batch_size=8):
    x, y = images(count, side=side)
    return Batches(*((x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, count, batch_size)))


# What the model sees


@pytest.mark.parametrize("multiple", [1, 4])
def test_each_batch_of_a_fit_has_its_size(multiple):
    module = Classifier()
    trainer(callbacks=[ProgressiveResizing(multiple=multiple)], max_epochs=5).fit(module, square(16))
    assert sides(module) == [(side, side) for side in expected(20, multiple=multiple)]
    assert sides(module)[0] == (8, 8)
    assert sides(module)[-4:] == [(16, 16)] * 4
    assert len(set(sides(module))) == (7 if multiple == 1 else 3)


def test_images_are_resized_and_nothing_else_happens_to_them():
    module, data = Classifier(), square(16)
    trainer(callbacks=[ProgressiveResizing()], max_epochs=5).fit(module, data)
    for number, (seen, labels) in enumerate(module.seen):
        x, y = data.batches[number % 4]
        side = seen.shape[-1]
        small = x if side == 16 else F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        torch.testing.assert_close(seen, small, rtol=0, atol=0)
        assert labels is y or torch.equal(labels, y)


def test_oblong_images_keep_their_shape():
    module, (x, y) = Classifier(), images(8, side=16)
    x = torch.cat([x, x], -1)
    trainer(callbacks=[ProgressiveResizing(multiple=2)], max_epochs=10).fit(module, Batches((x, y)))
    assert all(abs(width - 2 * height) <= 2 for height, width in sides(module))
    assert len(set(sides(module))) > 3
    assert sides(module)[0] == (8, 16)


def test_by_epoch_an_epoch_has_one_size():
    module = Classifier()
    callback = ProgressiveResizing(by="epoch", multiple=1, grow_from=0.0, full_from=1.0)
    trainer(callbacks=[callback], max_epochs=4).fit(module, square(16))
    assert sides(module) == [(side, side) for side in (8, 10, 12, 14) for _ in range(4)]


def test_stages_are_a_few_sizes():
    module = Classifier()
    callback = ProgressiveResizing(stages=4, grow_from=0, full_from=0.75, multiple=1, start=0.25)
    trainer(callbacks=[callback], max_epochs=4).fit(module, square(16))
    assert sides(module) == [(side, side) for side in (4, 8, 12, 16) for _ in range(4)]
    module = Classifier()
    trainer(callbacks=[ProgressiveResizing(stages=[6, 1], grow_from=0.5, full_from=0.5, multiple=1)], max_epochs=2).fit(
        module, square(16)
    )
    assert sides(module) == [(6, 6)] * 4 + [(16, 16)] * 4


def test_the_run_may_be_given_in_steps_with_accumulation():
    module = Classifier()
    callback = ProgressiveResizing(multiple=1)
    trainer(callbacks=[callback], max_epochs=None, max_steps=5, accumulate_grad_batches=2).fit(module, square(16))
    assert sides(module) == [(side, side) for side in expected(10)]


def test_growth_by_epochs_needs_their_number_and_says_that_steps_may_end_the_run_before():
    module = Classifier()
    callback = ProgressiveResizing(multiple=1, by="epoch")
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        trainer(callbacks=[callback], max_epochs=None, max_steps=5).fit(module, square(16))
    assert not module.seen
    with pytest.warns(UserWarning, match="`max_steps` may end the run"):
        trainer(callbacks=[callback], max_epochs=3, max_steps=10).fit(module, square(16))
    assert sides(module) == [(side, side) for side in [8] * 4 + [10] * 4 + [16] * 2]


def test_an_endless_run_says_what_to_give():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(*images(16, side=16), strict=True))

    endless = DataLoader(Stream(), batch_size=8)
    for options, arguments, way_out in (
        ({}, {"max_epochs": 2}, 'by="epoch"'),
        ({}, {"max_epochs": -1}, "max_steps"),
        ({"by": "epoch"}, {"max_epochs": -1}, "max_epochs"),
    ):
        module = Classifier()
        with pytest.raises(MisconfigurationException, match=way_out):
            trainer(callbacks=[ProgressiveResizing(**options)], **arguments).fit(module, endless)
        assert not module.seen
    module = Classifier()
    trainer(callbacks=[ProgressiveResizing(by="epoch", multiple=1)], max_epochs=4).fit(module, endless)
    assert sides(module) == [(side, side) for side in (8, 8, 15, 16) for _ in range(2)]


def test_every_kind_of_image_stays_what_it_is():
    class Seer(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.batches = nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.batches.append(batch)
            return self.layer(torch.ones(1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batch = {
        "raw": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
        "views": [torch.randn(4, 3, 16, 16).bfloat16(), torch.randn(4, 3, 16, 16).half()],
        "last": torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last),
        "mask": torch.randint(0, 9, (4, 16, 16)),
        "edges": torch.randint(0, 9, (4, 1, 16, 16)),
    }
    before = torch.utils._pytree.tree_map(torch.clone, batch)
    module = Seer()
    places = ["raw", ("views", 0), ("views", 1), "last"]
    callback = ProgressiveResizing(inputs=places, maps=["mask", "edges"], multiple=2)
    trainer(callbacks=[callback], max_epochs=1).fit(module, Batches(*[batch] * 4))
    small, full = module.batches[0], module.batches[-1]
    assert [small["raw"].dtype, *(view.dtype for view in small["views"])] == [
        torch.uint8,
        torch.bfloat16,
        torch.float16,
    ]
    assert [small["raw"].shape[-1], *(view.shape[-1] for view in small["views"])] == [8, 8, 8]
    assert small["last"].is_contiguous(memory_format=torch.channels_last)
    nearest = F.interpolate(batch["mask"][:, None].double(), (8, 8), mode="nearest-exact")[:, 0].long()
    assert torch.equal(small["mask"], nearest)
    assert small["edges"].shape == (4, 1, 8, 8)
    assert type(small) is dict
    for one, other, kept in zip(*map(torch.utils._pytree.tree_leaves, (batch, full, before)), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, kept)


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 1}, {"val_check_interval": 0.5}])
def test_validation_sees_full_images(options):
    class Module(Classifier):
        def validation_step(self, batch, batch_idx):
            self.validated = [*getattr(self, "validated", []), batch[0].shape[-1]]

    module = Module()
    trainer(callbacks=[ProgressiveResizing()], **options).fit(module, square(16), square(16))
    assert set(module.validated) == {16}
    assert (8, 8) in sides(module)


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"by": "epoch"}, {"fill_batch": True}, {"fill_batch": True, "by": "epoch"}, {"scale_regularization": 0.2}],
)
def test_a_resumed_run_does_the_same(stop, options):
    def callbacks():
        return [ProgressiveResizing(multiple=1, **options), MixupCallback(seed=1)]

    module, again = Classifier(), Classifier()
    again.load_state_dict(module.state_dict())
    trainer(callbacks=callbacks()).fit(module, ReplayLoader())
    fit_interrupted(again, ReplayLoader(), stop, callbacks())
    resume(again, ReplayLoader(), callbacks())
    assert sides(again) == sides(module)
    assert [len(labels) for _, labels in again.seen] == [len(labels) for _, labels in module.seen]
    assert_same_weights(weights(module), weights(again))


# BatchNorm


class Normed(Classifier):
    """Notes the statistics in training and in validation."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def statistics(self):
        return self.backbone[1].running_mean.clone(), self.backbone[1].running_var.clone()

    def on_train_batch_end(self, *_):
        self.trained.append(self.statistics())

    def on_train_batch_start(self, batch, batch_idx):
        if self.trained:  # what the batch before has left behind
            self.between = [*getattr(self, "between", []), (self.trained[-1], self.statistics())]

    def validation_step(self, batch, batch_idx):
        self.validated.append(
            (self.statistics(), self.backbone[0].weight.detach().clone(), self.backbone[0].bias.detach().clone())
        )


def test_validation_has_the_statistics_of_full_images_and_training_its_own():
    module, data = Normed(), square(16)
    callback = ProgressiveResizing(**LATE, refresh_batches=3)
    trainer(callbacks=[callback], max_epochs=5).fit(module, data, square(16, 8))
    for (mean, variance), weight, bias in module.validated[:3]:  # in the last two epochs images end full
        outputs = [F.conv2d(x, weight, bias) for x, _ in data.batches[1:]]
        torch.testing.assert_close(mean, torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0))
        torch.testing.assert_close(
            variance, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in outputs]).mean(0)
        )
    for number, epoch in ((3, 3), (4, 4)):
        for fresh, own in zip(module.validated[number][0], module.trained[4 * epoch + 3], strict=True):
            same = torch.equal(fresh, own)
            assert same == (sides(module)[4 * epoch + 3] == (16, 16))
    for before, after in module.between:
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("data", [lambda: square(16), lambda: DataLoader(Pictures(), batch_size=8)])
def test_the_refresh_changes_nothing_in_training(data):
    results = []
    for batches in (0, 2):
        torch.manual_seed(0)
        module = Noisy()
        trainer(callbacks=[ProgressiveResizing(refresh_batches=batches, probe=batches > 0)]).fit(
            module, data(), square(16)
        )
        results.append((weights(module), module.losses))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


class Noisy(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx)


def test_statistics_are_put_back_after_an_exception_in_validation():
    class Failing(Normed):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[ProgressiveResizing()]).fit(module, square(16), square(16))
    assert all(map(torch.equal, module.trained[-1], module.statistics()))


def test_a_step_that_cannot_be_rehearsed_trains_on_with_a_warning():
    class Penalty(Classifier):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled():
                raise RuntimeError("no gradient, no penalty")
            return super().training_step(batch, batch_idx)

    module = Penalty()
    with pytest.warns(UserWarning, match="no gradient, no penalty") as caught:
        trainer(callbacks=[ProgressiveResizing()]).fit(module, square(16), square(16))
    assert len([one for one in caught if "BatchNorm" in str(one.message)]) == 1
    assert len(module.seen) == 12


def test_soft_targets_reach_the_rehearsed_step():
    class Soft(Normed):
        def training_step(self, batch, batch_idx):
            assert batch[1].is_floating_point()
            return super().training_step(batch, batch_idx)

    module = Soft()
    mixup = MixupCallback(targets="soft", num_classes=CLASSES)
    trainer(callbacks=[mixup, ProgressiveResizing(**LATE)], max_epochs=2).fit(module, square(16), square(16, 8))
    assert not any(map(torch.equal, module.validated[0][0], module.trained[3]))


# The model's sizes


class Vision(Classifier):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def vit(**options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=2, num_classes=CLASSES, embed_dim=12, depth=1, num_heads=2, **options
    )  # fmt: skip


def test_a_vision_transformer_of_any_size_trains():
    module = Vision(vit(dynamic_img_size=True))
    trainer(callbacks=[ProgressiveResizing()], max_epochs=2).fit(module, square(16))
    assert sides(module)[0] == (8, 8)
    assert sides(module)[-1] == (16, 16)


@pytest.mark.parametrize(
    ("model", "options", "size"),
    [
        (vit, {}, "8 × 8"),
        (lambda: vit(dynamic_img_size=True), {"multiple": 2}, "10 × 10"),  # the second size fits no patch
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 16 * 16, CLASSES)), {}, "8 × 8"),
    ],
)
def test_a_model_that_does_not_take_the_sizes_is_refused_before_the_first_step(model, options, size):
    module = Vision(model())
    with pytest.raises(MisconfigurationException, match=f"not of {size} .*dynamic_img_size=True.*multiple=") as error:
        trainer(callbacks=[ProgressiveResizing(**options)]).fit(module, square(16))
    assert not module.seen
    assert error.value.__cause__ is not None


def test_an_error_that_is_none_of_the_sizes_is_the_users_own():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(callbacks=[ProgressiveResizing()]).fit(Broken(), square(16))


def test_the_probe_can_be_left_out():
    module = Vision(nn.Sequential(nn.Flatten(), nn.Linear(2 * 16 * 16, CLASSES)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(callbacks=[ProgressiveResizing(probe=False)]).fit(module, square(16))


# The loader


class Pictures(Dataset):
    """Makes images at the size that its transform or its own ``size`` says, and notes which."""

    def __init__(self, transform="resize", size=None, count=32):
        self.pictures, self.labels = images(count, side=24)
        self.transform = v2.RandomResizedCrop(16, antialias=True) if transform == "resize" else transform
        if size is not None:
            self.size = size
        self.made = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        picture = self.pictures[index]
        if hasattr(self, "size"):
            picture = v2.functional.resize(picture, [self.size, self.size])
        if self.transform is not None:
            picture = self.transform(picture)
        self.made.append(picture.shape[-1])
        return picture, self.labels[index]


class Made(Classifier):
    """Notes the size that left the loader, before the device resized it."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if self.trainer.training:
            self.loaded.append(batch[0].shape[-1])
        return batch


def pipeline():
    return v2.Compose([v2.Resize(18), v2.RandomCrop(16), v2.RandomHorizontalFlip()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"by": "epoch"}])
def test_the_loader_makes_the_largest_size_of_the_epoch_and_the_device_the_rest(options, workers):
    if workers and options:
        pytest.skip("once is enough")
    module, dataset = Made(), Pictures(pipeline())
    arguments = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    trainer(callbacks=[ProgressiveResizing(multiple=1, **options)], max_epochs=5).fit(
        module, DataLoader(dataset, batch_size=8, **arguments)
    )
    if not options:
        assert sides(module) == [(side, side) for side in expected(20)]
    largest = [max(side for side, _ in sides(module)[4 * epoch : 4 * epoch + 4]) for epoch in range(5)]
    assert module.loaded == [side for side in largest for _ in range(4)]
    assert largest[0] < largest[-1] == 16
    resize, crop, _ = dataset.transform.transforms
    assert (resize.size, list(crop.size)) == ([18], [16, 16])


def test_a_datasets_own_size_is_used_and_given_back_also_after_an_exception():
    module, dataset = Made(), Pictures(None, size=16)
    trainer(callbacks=[ProgressiveResizing(**LATE)], max_epochs=1).fit(
        module, DataLoader(Subset(dataset, range(16)), batch_size=8)
    )
    assert module.loaded == [12, 12]  # the second batch of two stands in the middle of the growth
    assert dataset.size == 16
    module.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[ProgressiveResizing(grow_from=0.9, full_from=1)]).fit(
            module, DataLoader(dataset, batch_size=8)
        )
    assert dataset.made[-1] == 8
    assert dataset.size == 16


@pytest.mark.parametrize(
    ("dataset", "arguments", "options", "reason"),
    [
        (lambda: Pictures(None), {}, {}, "nothing in Pictures"),
        (lambda: Pictures(lambda x: v2.functional.resize(x, [16, 16])), {}, {}, "what function does"),
        (lambda: Pictures(None, size=16), {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}, {}, "persistent_workers"),
        (lambda: Pictures(v2.Resize((16, 16))), {"collate_fn": lambda samples: [torch.zeros(8, 2, 20, 20), torch.arange(8) % 4]}, {}, "the dataset gave"),
    ],
)  # fmt: skip
def test_a_loader_that_cannot_be_changed_says_why_and_the_device_resizes(dataset, arguments, options, reason, caplog):
    module = Made()
    data = DataLoader(dataset(), batch_size=8, **arguments)
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[ProgressiveResizing(**options)]).fit(module, data)
    messages = [record.message for record in caplog.records if "on the device only" in record.message]
    assert len(messages) == 1
    assert reason in messages[0]
    assert len(set(module.loaded)) == 1
    assert module.loaded[0] in (16, 20, 24)
    assert sides(module)[0][0] in (8, 12)
    with pytest.raises(MisconfigurationException, match=reason):
        trainer(callbacks=[ProgressiveResizing(in_loader=True, **options)]).fit(Made(), data)


def test_the_loader_is_left_alone_when_asked():
    module = Made()
    trainer(callbacks=[ProgressiveResizing(in_loader=False)]).fit(module, DataLoader(Pictures(), batch_size=8))
    assert set(module.loaded) == {16}
    assert sides(module)[0] == (8, 8)


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("share", ["dataset", "transform"])
def test_what_validation_shares_is_not_changed(share, sanity, caplog):
    class Module(Made):
        def validation_step(self, batch, batch_idx):
            self.validated = [*getattr(self, "validated", []), batch[0].shape[-1]]

    dataset = Pictures()
    if share == "dataset":
        train, val = (Subset(dataset, part) for part in (range(16), range(16, 32)))
    else:
        train, val = dataset, Pictures(dataset.transform, count=16)
    module = Module()
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[ProgressiveResizing()], num_sanity_val_steps=sanity).fit(
            module, DataLoader(train, batch_size=8), DataLoader(val, batch_size=8)
        )
    assert "validation uses the same RandomResizedCrop" in caplog.text
    assert set(module.validated) == {16}
    assert set(module.loaded) == {16}
    assert sides(module)[0] == (8, 8)


def test_a_hook_that_changes_images_after_the_loader_keeps_it_as_it_is(caplog):
    class Cropping(Made):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0][..., :12, :12], batch[1]]

    module = Cropping()
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[ProgressiveResizing(multiple=2)]).fit(module, DataLoader(Pictures(), batch_size=8))
    assert "what `on_after_batch_transfer` does" in caplog.text
    assert set(module.loaded) == {16}
    assert (sides(module)[0], sides(module)[-1]) == ((6, 6), (12, 12))


def test_several_loaders_are_resized_on_the_device():
    class Two(Made):
        def training_step(self, batch, batch_idx):
            assert batch["a"][0].shape == batch["b"][0].shape
            return super().training_step(batch["a"], batch_idx)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.loaded += [batch["a"][0].shape[-1], batch["b"][0].shape[-1]]
            return batch

    module, datasets = Two(), (Pictures(), Pictures())
    places = [("a", 0), ("b", 0)]
    trainer(callbacks=[ProgressiveResizing(inputs=places)]).fit(
        module, dict(zip("ab", (DataLoader(one, batch_size=8) for one in datasets), strict=True))
    )
    assert set(module.loaded) == {16}
    assert sides(module)[0] == (8, 8)


def test_the_loader_makes_full_images_for_the_statistics():
    class Module(Normed, Made):
        pass

    dataset = Pictures(v2.Resize((16, 16), antialias=True))
    module = Module()
    trainer(callbacks=[ProgressiveResizing(**LATE, refresh_batches=2)], max_epochs=5).fit(
        module, DataLoader(dataset, batch_size=8), square(16, 8)
    )
    assert module.loaded[0] == 8
    x = torch.stack([dataset[index][0] for index in range(16, 32)])
    (mean, variance), weight, bias = module.validated[0]
    outputs = [F.conv2d(part, weight, bias) for part in x.split(8)]
    torch.testing.assert_close(mean, torch.stack([part.mean((0, 2, 3)) for part in outputs]).mean(0))
    torch.testing.assert_close(
        variance, torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in outputs]).mean(0)
    )
    assert module.loaded[4:8] == [8, 8, 8, 8]


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_reloaded_loaders_are_made_small_too():
    class Data(LightningDataModule):
        def __init__(self):
            super().__init__()
            self.datasets = []

        def train_dataloader(self):
            self.datasets.append(Pictures())
            return DataLoader(self.datasets[-1], batch_size=8)

    module, data = Made(), Data()
    trainer(callbacks=[ProgressiveResizing(**LATE)], reload_dataloaders_every_n_epochs=1).fit(module, datamodule=data)
    assert module.loaded == [8] * 4 + [12] * 4 + [16] * 4
    assert [tuple(one.transform.size) for one in data.datasets] == [(16, 16)] * 3


# Batches that are filled


class Sizes(Callback):
    """Notes samples and side of each batch."""

    def __init__(self):
        self.sizes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append((len(batch[0]), batch[0].shape[-1]))


def whole(count=64, side=16, batch_size=4):
    x, y = images(count, side=side)
    return DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch_size, sampler=OrderOfEpoch(count))


@pytest.mark.parametrize(("optimizer", "power"), [("sgd", 1.0), ("adam", 0.5)])
def test_small_images_come_in_larger_batches_at_a_higher_rate(optimizer, power):
    module, noted = Classifier(lr=0.01, optimizer=optimizer), Sizes()
    callback = ProgressiveResizing(
        fill_batch=True, by="epoch", stages=[0.5, 0.75, 1.0], multiple=4, grow_from=0, full_from=0.6
    )
    one = trainer(callbacks=[callback, noted], max_epochs=4)
    one.fit(module, whole())
    by_epoch = {0.0: 8, 0.25: 8, 0.5: 12, 0.75: 16}
    expected_sizes, ratios = [], []
    for side in by_epoch.values():
        samples = 4 * 16 * 16 // (side * side)
        counts = [samples] * (64 // samples) + ([64 % samples] if 64 % samples else [])
        expected_sizes += [(count, side) for count in counts]
        ratios += [samples / 4] * len(counts)
    assert noted.sizes == expected_sizes
    assert one.global_step == len(expected_sizes) == 4 + 4 + 10 + 16
    rates = [step[0]["lr"] for step in module.values]
    np.testing.assert_allclose(rates, [0.01 * ratio**power for ratio in ratios], rtol=1e-9)
    assert one.optimizers[0].param_groups[0]["lr"] == 0.01


def test_a_growing_epoch_is_filled_for_its_largest_size():
    module, noted = Classifier(), Sizes()
    one = trainer(
        callbacks=[ProgressiveResizing(fill_batch=True, multiple=1, grow_from=0, full_from=1), noted], max_epochs=4
    )
    one.fit(module, whole())
    largest = [10, 12, 14, 16]
    samples = [4 * 16 * 16 // (side * side) for side in largest]
    begin = 0
    for epoch, count in enumerate(samples):
        batches = math.ceil(64 / count)
        seen = noted.sizes[begin : begin + batches]
        begin += batches
        assert {size for size, _ in seen[:-1]} == {count}
        shares = [(epoch + i / batches) / 4 for i in range(batches)]
        assert [side for _, side in seen] == [math.floor(16 * (0.5 + share / 2) + 0.5) for share in shares]
    assert begin == len(noted.sizes) == one.global_step


def test_schedules_know_how_long_the_epochs_are():
    module = Classifier()
    callbacks = [
        ProgressiveResizing(fill_batch=True, rule="sqrt"),
        OneCycleMomentum(0.4),
        WarmupLRScaler(base_batch_size=2, warmup_epochs=0),
    ]
    one = trainer(callbacks=callbacks, max_epochs=4)
    one.fit(module, whole())
    assert callbacks[1].steps_done == [one.global_step]
    rates = [step[0]["lr"] for step in module.values]
    assert rates[-1] == pytest.approx(2 * 0.4 / 25 / 1e4)  # the end of the cycle
    assert rates[0] > 2 * 0.4 / 25  # the beginning, with a larger batch


def test_filled_batches_need_epochs_and_a_loader_that_can_be_changed():
    for data, arguments, reason in (
        (whole(), {"max_epochs": -1, "max_steps": 5}, "max_epochs"),
        (square(16), {}, "one training loader"),
    ):
        module = Classifier()
        with pytest.raises(MisconfigurationException, match=reason):
            trainer(callbacks=[ProgressiveResizing(fill_batch=True)], **arguments).fit(module, data)
        assert not module.seen
    with pytest.warns(UserWarning, match="max_steps"):
        trainer(callbacks=[ProgressiveResizing(fill_batch=True)], max_epochs=3, max_steps=2).fit(Classifier(), whole())


def test_loader_and_batch_size_go_together():
    module, dataset, noted = Made(), Pictures(), Sizes()
    trainer(callbacks=[ProgressiveResizing(fill_batch=True, by="epoch", grow_from=0, full_from=0.6), noted]).fit(
        module, DataLoader(dataset, batch_size=4)
    )
    assert noted.sizes == [(16, 8)] * 2 + [(7, 12)] * 4 + [(4, 12)] + [(4, 16)] * 8
    assert module.loaded == [side for _, side in noted.sizes]
    assert tuple(dataset.transform.size) == (16, 16)


def test_the_rate_is_not_scaled_twice_where_the_loader_has_a_batch_sampler_of_its_own():
    data = torch.utils.data.TensorDataset(*images(32, side=16))
    batches = BatchSampler(OrderOfEpoch(32), 4, drop_last=False)
    module = Classifier(lr=0.01)
    callbacks = [
        ProgressiveResizing(fill_batch=True, by="epoch"),
        WarmupLRScaler(base_batch_size=2, warmup_epochs=0),
    ]
    trainer(callbacks=callbacks, max_epochs=2).fit(module, DataLoader(data, batch_sampler=batches))
    assert module.seen[0][0].shape == (16, 2, 8, 8)
    assert module.values[0][0]["lr"] == pytest.approx(0.01 * 2 * 4)
    assert batches.batch_size == 4


@pytest.mark.parametrize("fill_batch", [False, True])
def test_a_range_test_before_the_run_sweeps_and_leaves_the_loader_alone(fill_batch):
    module, dataset = Classifier(), Pictures()
    callbacks = [OneCycleMomentum(max_lr="auto"), ProgressiveResizing(fill_batch=fill_batch, by="epoch")]
    trainer(callbacks=callbacks).fit(module, DataLoader(dataset, batch_size=8))  # of four, the sweep shows no rate
    assert sides(module)[0] == (8, 8)
    assert sides(module)[-1] == (16, 16)
    assert tuple(dataset.transform.size) == (16, 16)


# Regularisation


class Dropping(Classifier):
    def __init__(self):
        super().__init__()
        self.dropout, self.strengths = nn.Dropout(0.4), []

    def training_step(self, batch, batch_idx):
        mixup = next(one for one in self.trainer.callbacks if isinstance(one, MixupCallback))
        if torch.is_grad_enabled():
            self.strengths.append((self.dropout.p, mixup.strength))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("failing", [False, True])
def test_regularization_grows_with_the_side_and_is_given_back(failing):
    module, mixup = Dropping(), MixupCallback(seed=1)
    if failing:
        module.on_train_batch_end = lambda outputs, batch, batch_idx: (
            1 / 0 if module.trainer.global_step == 12 else None
        )
    one = trainer(callbacks=[mixup, ProgressiveResizing(scale_regularization=0.5, multiple=1)], max_epochs=5)
    if failing:
        with pytest.raises(ZeroDivisionError):
            one.fit(module, square(16))
    else:
        one.fit(module, square(16))
    shares = np.interp([side for side, _ in sides(module)], [8, 16], [0.5, 1.0])
    np.testing.assert_allclose(module.strengths, np.stack([0.4 * shares, shares], 1))
    assert module.strengths[0] == (0.2, 0.5)
    assert module.dropout.p == 0.4
    assert mixup.strength == 1.0
    assert "strength" not in vars(mixup)


def test_regularization_follows_the_side_across_epochs_of_different_lengths():
    module = Dropping()
    callback = ProgressiveResizing(scale_regularization=0.5, multiple=1, fill_batch=True, grow_from=0, full_from=1)
    trainer(callbacks=[MixupCallback(seed=1), callback], max_epochs=4).fit(module, whole())
    shares = np.interp([side for side, _ in sides(module)], [8, 16], [0.5, 1.0])
    np.testing.assert_allclose(module.strengths, np.stack([0.4 * shares, shares], 1))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_the_regularization_of_filled_batches_goes_on_in_the_middle_of_an_epoch(stop):
    def callbacks():
        callback = ProgressiveResizing(
            scale_regularization=0.2, multiple=1, fill_batch=True, grow_from=0, full_from=1, in_loader=False
        )
        return [BatchAugmentation(seed=2), MixupCallback(seed=1), callback]

    module, again = Dropping(), Dropping()
    again.load_state_dict(module.state_dict())
    trainer(callbacks=callbacks()).fit(module, ReplayLoader())
    fit_interrupted(again, ReplayLoader(), stop, callbacks())
    resume(again, ReplayLoader(), callbacks())
    assert again.strengths == module.strengths
    assert_same_weights(weights(module), weights(again))


def test_nothing_to_regularize_warns():
    with pytest.warns(UserWarning, match="found nothing to scale"):
        trainer(callbacks=[ProgressiveResizing(scale_regularization=0.5)]).fit(Classifier(), square(16))


# What does nothing


@pytest.mark.parametrize(
    "options",
    [
        {"start": 1}, {"start": 1.0, "fill_batch": True}, {"stages": 1}, {"stages": [1.0]}, {"stages": [64, 128]}, {"multiple": 64},
        {"grow_from": 0, "full_from": 0}, {"start": 1.0, "stages": 3}, {"start": 0.95, "multiple": 8},
    ],
)  # fmt: skip
def test_settings_and_images_that_leave_nothing_to_shrink_run_as_without_it_and_are_told(options):
    def data():
        return DataLoader(torch.utils.data.TensorDataset(*images(32, side=16)), 8)

    plain, module = Classifier(), Classifier()
    module.load_state_dict(plain.state_dict())
    trainer(max_epochs=2).fit(plain, data())
    with pytest.warns(UserWarning, match=r"finds nothing to do: images of 16 × 16 pixels are full") as told:
        trainer(callbacks=[ProgressiveResizing(**options)], max_epochs=2).fit(module, data())
    assert len([one for one in told if "nothing to do" in str(one.message)]) == 1
    assert_same_weights(weights(plain), weights(module))


@pytest.mark.parametrize(
    "options", [{"scale_regularization": 1.0}, {"refresh_batches": 0}, {"maps": None, "multiple": 1}]
)
def test_neutral_settings_of_its_parts_are_no_errors(options):
    module = Dropping()
    trainer(callbacks=[MixupCallback(seed=1), ProgressiveResizing(**options)], max_epochs=2).fit(module, square(16))
    assert module.strengths == [(0.4, 1.0)] * 8
    assert sides(module)[0] == (8, 8)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"start": 0}, "start"), ({"start": 1.1}, "start"), ({"grow_from": -0.1}, "grow_from"), ({"grow_from": 0.5, "full_from": 0.4}, "full_from"),
        ({"full_from": 1.1}, "full_from"), ({"multiple": 0}, "multiple"), ({"multiple": 1.5}, "multiple"), ({"stages": 0}, "stages"),
        ({"stages": []}, "stages"), ({"stages": [0.5, 0.4]}, "stages"), ({"stages": [0.5, 64]}, "stages"), ({"stages": "4"}, "stages"),
        ({"scale_regularization": 2}, "scale_regularization"), ({"by": "batch"}, "by"), ({"rule": "cubic"}, "rule"),
        ({"in_loader": "yes"}, "in_loader"), ({"inputs": []}, "inputs"), ({"inputs": None}, "inputs"), ({"inputs": [0, 0]}, "inputs"),
        ({"maps": 1.5}, "maps"), ({"refresh_batches": -1}, "refresh_batches"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_at_once(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        ProgressiveResizing(**arguments)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": "image"}, "no part 'image'"),
        ({"inputs": 1}, r"\(N, ..., H, W\)"),
        ({"maps": 1}, r"maps=1"),
        ({"inputs": [0, 2]}, "no part 2"),
    ],
)
def test_wrong_places_are_named(options, reason):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=reason):
        trainer(callbacks=[ProgressiveResizing(**options)]).fit(module, square(16))
    assert not module.seen


def test_maps_among_the_inputs_are_refused():
    x, y = images(8, side=16)
    with pytest.raises(MisconfigurationException, match="maps="):
        trainer(callbacks=[ProgressiveResizing()]).fit(Classifier(), Batches((x.long(), y)))


class Segmenter(LightningModule):
    """A loss for each pixel, and an assertion without words."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Conv2d(2, 3, 3, padding=1), []

    def training_step(self, batch, batch_idx):
        scores = self.net(batch["image"])
        if scores.shape[2:] != batch["mask"].shape[-2:]:
            raise AssertionError
        self.seen.append(scores.shape[-1])
        return F.cross_entropy(scores, batch["mask"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Scenes(Dataset):
    """The loader can make small images of it, and masks that are always full."""

    size = 16

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"image": torch.randn(2, self.size, self.size), "mask": torch.zeros(16, 16).long()}


@pytest.mark.parametrize("in_loader", ["auto", False])
def test_forgotten_maps_are_told_instead_of_a_network_that_takes_any_size(in_loader):
    def fit(**options):
        module, trick = Segmenter(), ProgressiveResizing(inputs="image", in_loader=in_loader, **options)
        trainer(callbacks=[trick], max_epochs=3).fit(module, DataLoader(Scenes(), 8))
        return module.seen

    told = r"not of 8 × 8, while what is at 'mask' keeps its size \(AssertionError\(\)\)\. .*name it: `maps='mask'`\.$"
    with pytest.warns(UserWarning, match="`maps='mask'`"), pytest.raises(MisconfigurationException, match=told):
        fit()
    assert {8, 16} <= set(fit(maps="mask"))


def test_who_resizes_nothing_is_not_told_of_maps():
    with pytest.warns(UserWarning, match="finds nothing to do") as told:
        trainer(callbacks=[ProgressiveResizing(1, inputs="image")], max_epochs=1).fit(
            Segmenter(), DataLoader(Scenes(), 8)
        )
    assert not [one for one in told if "maps" in str(one.message)]


def test_an_error_without_words_is_named():
    class Picky(Classifier):
        def training_step(self, batch, batch_idx):
            if batch[0].shape[-1] != 16:
                raise AssertionError
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"not of 8 × 8 \(AssertionError\(\)\)\. Make it take any size"):
        trainer(callbacks=[ProgressiveResizing()]).fit(Picky(), square(16))


def test_places_in_a_nest_are_shown_to_who_names_none():
    x, y = images(8, side=16)
    there = r"`inputs=`: the batch has tensors at \(0, 0\) of shape \(8, 2, 16, 16\), \(0, 1\) of shape \(8,\)\."
    with pytest.raises(MisconfigurationException, match=there):
        trainer(callbacks=[ProgressiveResizing()]).fit(Classifier(), [Batches((x, y))])
