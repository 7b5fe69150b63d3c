"""Random samples are refused, and others have a fingerprint that changes with them."""

from __future__ import annotations

import random

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_speedups import FeatureCache
from lightning_speedups.tricks.transfer.feature_cache.probe import PROBES, probe
from zoo import Classifier, images, trainer


class Refused(Exception):
    pass


def refuse(what, way_out):
    return Refused(f"{what}. {way_out}")


class Images:
    def __init__(self, transform=None, samples=32):
        self.transform, (self.images, self.labels) = transform, images(samples)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]


def fingerprint(dataset):
    """Look at the data in the first step of a fit."""
    found = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = torch.get_rng_state()
            found.append(probe(trainer, trainer.train_dataloader, refuse))
            assert torch.equal(torch.get_rng_state(), before)

    loader = DataLoader(dataset, 8)
    trainer(callbacks=[FeatureCache(), Looks()], max_steps=1).fit(frozen(), loader)
    return found[0]


def frozen():
    module = Classifier()
    module.backbone.requires_grad_(False)
    module.on_train_start = lambda: module.backbone.eval() and None
    return module


def change(index):
    dataset = Images()
    dataset.images[index] += 1
    return dataset


def test_the_fingerprint_is_that_of_some_samples_and_their_number():
    same = fingerprint(Images())
    assert PROBES == 16
    assert fingerprint(Images()) == same
    assert fingerprint(change(0)) != same
    assert fingerprint(change(31)) != same
    assert fingerprint(change(1)) == same
    assert fingerprint(Images(samples=33)) != same
    assert fingerprint(Images(lambda image: image * 2)) != same


OWN = torch.Generator()


@pytest.mark.parametrize(
    ("transform", "found"),
    [
        (
            v2.RandomErasing(),
            r"(draw random numbers when loaded|when they are loaded twice)\. .* in the dataset \(RandomErasing",
        ),
        (lambda image: image + 0 * random.random(), "samples of the Images draw random numbers when loaded"),
        (lambda image: image + torch.rand(1, generator=OWN), "are different when they are loaded twice"),
    ],
)
def test_random_samples_are_refused(transform, found):
    dataset, one = Images(), trainer(max_steps=1)

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            dataset.transform = transform
            with pytest.raises(Refused, match=found):
                probe(trainer, trainer.train_dataloader, refuse)

    one.callbacks += [FeatureCache(), Looks()]
    one.fit(frozen(), DataLoader(dataset, 8))
