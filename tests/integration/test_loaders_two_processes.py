"""Two processes share the samples as they would without workers."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from two_processes import forked

from lightning_speedups import LoaderTuning, PrefetchToDevice, SubsetTraining
from lightning_speedups.tricks.steps import loader_tuning
from zoo import Classifier, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
COUNT = 32


class Writes(Callback):
    """Writes the samples of each process's steps, and its weights, into a file."""

    def __init__(self, name):
        self.name, self.numbers, self.workers = name, [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.numbers.append(batch[2].tolist())

    def on_train_end(self, trainer, pl_module):
        weights = {name: value.detach() for name, value in pl_module.named_parameters()}
        workers = trainer.train_dataloader.num_workers
        torch.save((self.numbers, weights, workers), f"{self.name}{trainer.global_rank}.pt")

    def read(self):
        return [torch.load(f"{self.name}{rank}.pt", weights_only=True) for rank in range(2)]


class Thirds(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def fit(name, *callbacks):
    torch.manual_seed(3)
    writes = Writes(name)
    run = trainer(devices=2, strategy=forked(), callbacks=[*callbacks, writes], max_epochs=3)
    data = TensorDataset(*images(COUNT), torch.arange(COUNT))
    run.fit(Thirds(), DataLoader(data, batch_size=4, shuffle=True))
    return writes.read()


@pytest.mark.parametrize(
    ("tricks", "workers"),
    [
        ([LoaderTuning], 1),
        ([PrefetchToDevice, LoaderTuning], 1),
    ],
)
def test_each_rank_has_its_samples_and_weights_are_equal(tricks, workers, monkeypatch):
    monkeypatch.setattr(loader_tuning, "usable_cpus", lambda processes=1: 2)
    plain, ours = fit("plain"), fit("ours", *(trick() for trick in tricks))
    for (numbers, weights, _), (expected, others, _) in zip(ours, plain, strict=True):
        assert numbers == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert [found for _, _, found in ours] == [workers, workers]
    for epoch in range(3):
        batches = [numbers[4 * epoch : 4 * epoch + 4] for numbers, _, _ in ours]
        assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(COUNT))


def test_cpus_are_shared_between_processes(monkeypatch):
    asked = []

    def usable_cpus(processes=1):
        asked.append(processes)
        torch.save(asked, "asked.pt")
        return 1

    monkeypatch.setattr(loader_tuning, "usable_cpus", usable_cpus)
    ours = fit("ours", LoaderTuning())
    assert torch.load("asked.pt", weights_only=True) == [2]
    assert [found for _, _, found in ours] == [0, 0]


def test_a_subset_is_the_same_with_workers(monkeypatch):
    monkeypatch.setattr(loader_tuning, "usable_cpus", lambda processes=1: 2)
    subset = {"keep": 0.5, "method": "loss", "stop_at": 1.0, "seed": 5}
    plain = fit("plain", SubsetTraining(**subset))
    ours = fit("ours", LoaderTuning(), SubsetTraining(**subset))
    assert [numbers for numbers, _, _ in ours] == [numbers for numbers, _, _ in plain]
