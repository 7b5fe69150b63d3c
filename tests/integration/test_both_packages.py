"""Modules and Trainers of `lightning.pytorch` and of `pytorch_lightning`, in one process."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import AutoMicroBatch, ChannelsLast, ExactResume, MixupCallback, OneCycleMomentum
from lightning_speedups.attach.packages import package_of
from zoo import CLASSES, assert_same_weights, images, trainer, weights

PACKAGES = (lightning.pytorch, pytorch_lightning)
BOTH = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)


def net(package):
    """The same module, whichever package it comes from."""

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    return Net()


def data():
    return DataLoader(TensorDataset(*images(64)), 8, shuffle=True)


def test_the_same_tricks_train_either_packages_module_to_the_same_bits():
    tricks = [
        OneCycleMomentum(max_lr="auto"),
        MixupCallback(seed=0),
        AutoMicroBatch(4),
        ChannelsLast(),
        ExactResume(),
    ]
    ends = []
    for package in (*PACKAGES, *PACKAGES):
        module, run = net(package), trainer(package, callbacks=tricks)
        start = weights(module)
        torch.manual_seed(1)
        run.fit(module, data())
        assert package_of(run) == package_of(run.strategy) == package.__name__
        assert not torch.equal(start["net.0.weight"], module.net[0].weight)
        ends.append(weights(module))
    for end in ends[1:]:
        assert_same_weights(ends[0], end)
