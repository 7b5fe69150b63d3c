"""InMemory in two processes: each sample is trained on once an epoch, as without it, and the ranks stay equal."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import Notes, farthest, forked

from lightning_speedups import InMemory
from zoo import trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
COUNT = 12


class Seer(LightningModule):
    """Keeps the numbers that its steps receive."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def train_dataloader(self):
        data = TensorDataset(torch.arange(float(COUNT)).view(-1, 1), torch.arange(COUNT))
        return DataLoader(data, 3, shuffle=True)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


def run(folder, *tricks):
    notes = Notes(folder)
    trainer(devices=2, strategy=forked(), max_epochs=3, callbacks=[*tricks, notes]).fit(Seer())
    return notes.read()


def test_ranks_share_the_samples_of_each_epoch_as_without_it(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    plain, ours = run("plain"), run("ours", InMemory())
    orders = [torch.cat(rank["inputs"]).flatten().split(COUNT // 2) for rank in ours]
    for epoch in range(3):
        assert sorted(torch.cat([order[epoch] for order in orders]).tolist()) == [*range(COUNT)]
    assert len({str(order[epoch].tolist()) for order in orders for epoch in range(3)}) == 6
    for one, other in zip(plain, ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["inputs"], other["inputs"], strict=True))
        assert all(farthest(a, b) == 0 for a, b in zip(one["weights"], other["weights"], strict=True))
    assert farthest(ours[0]["weights"][-1], ours[1]["weights"][-1]) == 0
