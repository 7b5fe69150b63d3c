"""Waits are what Lightning's loop waits for its batches, and nothing else, on a clock that the test drives."""

from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.attach import data_wait as module
from lightning_speedups.attach.data_wait import DataWait
from lightning_speedups.attach.trick import Trick
from zoo import Classifier, images, trainer

WAIT, STEP = 3.0, 1.0


class Waits(Trick):
    def __init__(self):
        super().__init__()
        self.told = []
        self.wait = DataWait(self, lambda *told: self.told.append(told))
        self.grips = (self.wait,)


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


class Slow(Dataset):
    def __init__(self, clock):
        self.clock, self.samples = clock, [*zip(*images(10), strict=True)]

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.clock.now += WAIT
        return self.samples[index]


class Works(Classifier):
    def training_step(self, batch, batch_idx):
        self.clock.now += STEP
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        (9, (50 * WAIT, 50 * (WAIT + STEP))),
        (3, (10 * WAIT, 10 * (WAIT + STEP) + STEP)),
        (2, (0.0, 0.0)),
        (1, (0.0, 0.0)),
    ],
)
def test_the_first_batches_after_those_that_were_ready_count(epochs, told, monkeypatch):
    clock, trick, module_ = Clock(), Waits(), Works()
    module_.clock = clock
    monkeypatch.setattr(module, "time", clock)
    for _ in range(2):
        trick.told.clear()
        run = trainer(callbacks=[trick], max_epochs=epochs)
        run.fit(module_, DataLoader(Slow(clock), batch_size=1))
        trick.wait.end()
        assert trick.told == [told]
    assert not {"_on_before_fetch", "_on_after_fetch"} & {*vars(run.fit_loop.epoch_loop)}


def test_devices_are_waited_for_as_long_as_it_counts(monkeypatch):
    waited = []
    monkeypatch.setattr(module.torch.accelerator, "synchronize", lambda: waited.append(1))
    wait = Waits().wait
    wait.batches = 0
    device = SimpleNamespace(strategy=SimpleNamespace(root_device=SimpleNamespace(type="cuda")))
    wait._before(device, lambda: None)
    wait.batches = module.LAST
    wait._before(device, lambda: None)
    assert waited == [1]
