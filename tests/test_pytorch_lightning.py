"""Modules and Trainers of `lightning.pytorch` and of `pytorch_lightning`, in one process; and a sample of the contract of
every trick under the second name. All of it: `LIGHTNING_PACKAGE=pytorch_lightning pytest tests/test_every_trick.py`.
"""

import os
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_speedups
import lightning_speedups.pytorch_lightning
from lightning_speedups import AutoMicroBatch, ChannelsLast, ExactResume, LRRangeTest, MixupCallback, OneCycleMomentum
from lightning_speedups.attach.packages import MisconfigurationException, package_of
from lightning_speedups.attach.trick import Trick
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


@BOTH
def test_a_trick_and_its_refusal_are_of_both_packages(package):
    assert isinstance(Trick(), package.Callback)
    with pytest.raises(package.utilities.exceptions.MisconfigurationException, match="no end"):
        raise Trick().refusal("has no end", "Give one.")


@pytest.mark.slow
def test_messages_go_under_the_name_that_was_imported_first():
    code = "import lightning.pytorch, lightning_speedups; from lightning_utilities.core import rank_zero as it; print(it.log.name)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("lightning.pytorch.")


@BOTH
def test_the_range_test_serves_either_package_and_says_what_is_of_the_other(package):
    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return data()

    (other,) = set(PACKAGES) - {package}
    module, test = net(package), LRRangeTest(1e-3, 100.0)
    start = weights(module)
    assert 1e-3 < test.run(trainer(package), module, Data()).suggestion < 10
    assert_same_weights(start, weights(module))
    theirs = (
        f"`{other.__name__}`.*Net is a LightningModule of `{package.__name__}`.*`from {other.__name__} import Light"
    )
    with pytest.raises(MisconfigurationException, match=theirs):
        test.run(trainer(other), module, data())
    with pytest.raises(MisconfigurationException, match="Data is a LightningDataModule of"):
        test.run(trainer(other), net(other), Data())


NAMESPACES = [lightning_speedups, lightning_speedups.pytorch_lightning]


def test_the_namespace_has_all_names_and_other_modules_only():
    one, other = NAMESPACES
    assert one.__all__ == other.__all__
    different = {name for name in one.__all__ if getattr(one, name) is not getattr(other, name)}
    modules = {name for name in one.__all__ if hasattr(getattr(one, name), "load_from_checkpoint")}
    assert different == modules == {"TransferClassifier"}


def test_a_ready_module_is_the_same_in_either_package():
    ends = []
    for package, names in zip(PACKAGES, NAMESPACES, strict=True):
        kind = names.TransferClassifier
        assert issubclass(kind, package.LightningModule)
        assert "When not to use it" in pydoc.render_doc(kind)
        torch.manual_seed(0)
        module = kind("test_resnet", CLASSES, weights=None, in_chans=2)
        one = trainer(package, max_epochs=1, callbacks=[OneCycleMomentum(max_lr=0.01)])
        one.fit(module, data())
        assert_same_weights(weights(pickle.loads(pickle.dumps(module))), weights(module))
        one.save_checkpoint("at.ckpt")
        loaded = kind.load_from_checkpoint("at.ckpt", weights_only=True)
        assert type(loaded) is kind
        assert loaded.hparams == module.hparams
        assert_same_weights(weights(loaded), weights(module))
        ends.append(weights(module))
    assert_same_weights(*ends)


SAMPLE = " or ".join(
    (
        "two_steps_train",
        "resumed_run_ends_with_the_same_bits and 6",
        "put_back_also_after_an_exception and True",
        "all_tricks_together_keep_the_ranks_equal",
        "gradients_are_sent_once_a_step",
        "test_stack",
    )
)


@pytest.mark.slow
def test_every_trick_serves_pytorch_lightning():
    here = Path(__file__).parent
    two = [f"integration/test_{name}two_processes.py" for name in ("", "micro_batches_")]
    files = ["test_every_trick.py", "recipes/test_stack.py", *two]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", SAMPLE]
        + [str(here / file) for file in files],
        env=os.environ | {"LIGHTNING_PACKAGE": "pytorch_lightning"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
