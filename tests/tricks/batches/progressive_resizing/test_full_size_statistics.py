"""The statistics that BatchNorm gets, and what it costs: nothing."""

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_speedups import ProgressiveResizing
from lightning_speedups.attach.rehearsal import swap_statistics
from lightning_speedups.tricks.batches.progressive_resizing.full_size_statistics import give_statistics
from zoo import Classifier, ReplayLoader, images, trainer


class Gives(Callback):
    """Asks for the statistics of some batches before the first step, and gives them back."""

    def __init__(self, trick, batches):
        self.trick, self.batches = trick, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        norm = pl_module.backbone[1]
        before, states = (norm.running_mean.clone(), norm.running_var.clone()), torch.get_rng_state()
        own = give_statistics(trainer, self.trick, self.batches)
        self.same_randomness = torch.equal(states, torch.get_rng_state())
        self.fresh = (norm.running_mean.clone(), norm.running_var.clone())
        self.names = list(own)
        swap_statistics(pl_module, own)
        after = (norm.running_mean, norm.running_var)
        self.is_put_back = all(map(torch.equal, before, after))
        self.weights = [pl_module.backbone[0].weight.detach().clone(), pl_module.backbone[0].bias.detach().clone()]


def given(batches, module=None):
    trick = ProgressiveResizing()
    noted = Gives(trick, batches)
    trainer(callbacks=[trick, noted], max_steps=1).fit(module or Classifier(), ReplayLoader())
    return noted


def test_they_are_the_mean_over_the_batches_and_nothing_else_changes():
    batches = [(x[:8], y[:8]) for x, y in (images(seed=1, side=12), images(seed=2, side=12))]

    def drawing(batch):
        torch.rand(3)  # as a dataset may
        return batch

    noted = given([lambda batch=batch: drawing(batch) for batch in batches])
    outputs = [F.conv2d(x, *noted.weights) for x, _ in batches]
    torch.testing.assert_close(noted.fresh[0], torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0))
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in outputs])
    torch.testing.assert_close(noted.fresh[1], variances.mean(0))
    assert noted.names == ["backbone.1"]
    assert noted.is_put_back
    assert noted.same_randomness


def test_without_batches_they_stay():
    noted = given([])
    assert noted.names == []
    assert noted.is_put_back


def test_without_batchnorm_nothing_is_loaded():
    module = Classifier()
    module.backbone[1] = nn.BatchNorm2d(6, track_running_stats=False)

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.own = give_statistics(trainer, None, [lambda: 1 / 0])

    looks = Looks()
    trainer(callbacks=[looks], max_steps=1).fit(module, ReplayLoader())
    assert looks.own == {}
