"""Two processes with batches of their own make the step of one process with all of them, and exchange gradients once for it."""

import pytest
import torch
from two_processes import SAMPLES, CountsTraffic, Notes, Regressor, farthest, regression, size, two

from lightning_speedups import EffectiveBatchSize
from zoo import Batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
CUTS = {  # of each step's sixteen samples: the batches of each process
    "one batch": [[(0, 5)], [(5, 16)]],
    "two batches": [[(0, 5), (5, 8)], [(8, 10), (10, 16)]],
}


class Uneven(Regressor):
    """Processes have batches of different sizes; a mask may leave out some of the samples."""

    def __init__(self, cuts, masked):
        super().__init__()
        self.cuts, self.masked = cuts, masked

    def train_dataloader(self):
        own = self.cuts[self.trainer.global_rank] if self.trainer.world_size > 1 else [(0, 16)]
        parts = (*regression().tensors, (torch.arange(SAMPLES) % 3 != 1).float())
        batches = Batches(*(tuple(part[at + a : at + b] for part in parts) for at in (0, 16) for a, b in own))
        batches.batch_size = 8 // len(own)  # on average, so that sixteen samples are a step
        return batches

    def training_step(self, batch, batch_idx):
        inputs, targets, mask = batch
        errors = ((self.head(self.backbone(inputs)) - targets) ** 2).squeeze(1)
        return (errors * mask).sum() / mask.sum() if self.masked else errors.mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_processes_with_unequal_batches_make_the_step_of_a_single_one(name, masked):
    alone, together, plain = Notes("alone"), Notes("together"), Notes("plain")
    cuts, batches = CUTS[name], len(CUTS[name][0])
    trainer(callbacks=[alone]).fit(Uneven(cuts, masked))
    trick = EffectiveBatchSize(16, count=(lambda batch: batch[2].sum()) if masked else None)
    two([trick, together]).fit(Uneven(cuts, masked))
    two([plain], accumulate_grad_batches=batches).fit(Uneven(cuts, masked))
    (whole,), (first, second) = alone.read(1), together.read()
    for one, other, want in zip(first["weights"], second["weights"], whole["weights"], strict=True):
        assert farthest(one, other) == 0.0
        assert farthest(one, want) < 2e-6
    assert len(whole["weights"]) == 3
    assert farthest(plain.read()[0]["weights"][-1], whole["weights"][-1]) > 1e-3


def test_only_the_last_batch_of_a_step_exchanges_gradients():
    module = Regressor(batch_size=8)  # of four batches in each process
    two([EffectiveBatchSize({0: 16, 1: 8}), CountsTraffic()], max_epochs=2).fit(module)
    for rank in range(2):
        assert CountsTraffic.read(rank) == (1, {(0, 0): 2 * size(module), (0, 1): 4 * size(module)})


def test_a_size_that_the_processes_do_not_make_together_is_refused():
    with pytest.raises(Exception, match=r"\(a batch of 4 × 2 processes\): 8 or 16, but got 12"):
        two([EffectiveBatchSize(12)], max_epochs=1).fit(Regressor(batch_size=8))
