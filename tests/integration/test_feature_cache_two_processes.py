"""FeatureCache in two processes: one store for both, ranks equal, and weights as without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import Notes, farthest, forked

from lightning_speedups import FeatureCache, FreezeBackboneFinetune
from zoo import Classifier, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class Counted(nn.Conv2d):
    """Counts the images that it really saw."""

    seen = 0

    def forward(self, inputs):
        if type(inputs) is torch.Tensor:
            self.seen += len(inputs)
        return super().forward(inputs)


class Shuffled(Classifier):
    """Each process trains on its share of 48 samples, other ones in each epoch."""

    def __init__(self, frozen=True):
        torch.manual_seed(11)
        super().__init__()
        self.backbone = nn.Sequential(Counted(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 6))
        self.backbone.requires_grad_(not frozen)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(48)), batch_size=4, shuffle=True)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        trains = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trains, lr=0.1, momentum=0.9)


class Facts(Callback):
    def __init__(self, folder, cache=None):
        self.folder, self.cache = folder, cache

    def on_train_end(self, trainer, pl_module):
        facts = {"images": pl_module.backbone[0].seen}
        if self.cache is not None:
            facts |= {"hits": self.cache.hits}
        torch.save(facts, f"{self.folder}-{trainer.global_rank}.pt")


def run(folder, cache=None, others=(), frozen=True, epochs=5, **arguments):
    notes = Notes(f"notes-{folder}")
    callbacks = [*others, *([] if cache is None else [cache]), notes, Facts(folder, cache)]
    one = trainer(devices=2, strategy=forked(), max_epochs=epochs, callbacks=callbacks, **arguments)
    one.fit(Shuffled(frozen))
    facts = [torch.load(f"{folder}-{rank}.pt", weights_only=True) for rank in range(2)]
    return facts, [note["weights"] for note in notes.read()]


def assert_equal(plain, cached):
    for theirs, ours in zip(plain, cached, strict=True):
        assert all(farthest(a, b) == 0.0 for a, b in zip(theirs, ours, strict=True))
    assert farthest(cached[0][-1], cached[1][-1]) == 0.0


def test_ranks_share_what_each_computes_and_train_as_without_it():
    plain_facts, plain = run("plain")
    facts, cached = run("cached", FeatureCache("features"))
    assert_equal(plain, cached)
    assert [rank["images"] for rank in plain_facts] == [5 * 24, 5 * 24]
    # Its own share of the first epoch, and in the second and the fourth a batch that checks what is kept, most of which
    # the other one may know.
    assert [rank["images"] for rank in facts] == [24 + 2 * 4] * 2
    assert [rank["hits"] for rank in facts] == [4 * 6 - 2] * 2

    facts, again = run("second", FeatureCache("features"))
    assert_equal(plain, again)
    assert [rank["images"] for rank in facts] == [3 * 4] * 2  # in the first epoch too


def test_a_thaw_in_the_middle():
    def others():
        return [FreezeBackboneFinetune("backbone", unfreeze_at_epoch=3)]

    _, plain = run("plain", None, others(), frozen=False, epochs=5)
    facts, cached = run("cached", FeatureCache("features"), others(), frozen=False, epochs=5)
    assert_equal(plain, cached)
    assert [rank["images"] for rank in facts] == [24 + 4 + 2 * 24] * 2
    assert farthest(plain[0][2], plain[0][4]) > 1e-3


def test_features_in_memory_are_refused():
    told = r"FeatureCache\(folder=None\) keeps features in memory, which the run's 2 processes do not share. Give a"
    with pytest.raises((MisconfigurationException, torch.multiprocessing.ProcessRaisedException), match=told):
        trainer(devices=2, strategy=forked(), callbacks=[FeatureCache()]).fit(Shuffled())
