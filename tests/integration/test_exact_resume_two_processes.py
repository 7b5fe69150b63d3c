"""ExactResume in two processes: each goes on with its own samples and its own draws, and all samples come once."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from two_processes import forked

from lightning_speedups import ExactResume
from zoo import Classifier, assert_same_weights, images, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded", "ignore:ExactResume gives workers")
SAMPLES = 32


class Shuffled(Classifier):
    """Draws in each step, in each process otherwise; notes its samples."""

    def __init__(self, seed, shared, **options):
        super().__init__()
        self.seed, self.shared, self.options, self.numbers = seed, shared, options, []

    def on_fit_start(self):
        seed = self.seed + self.trainer.global_rank
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002

    def train_dataloader(self):
        data = TensorDataset(*images(SAMPLES), torch.arange(SAMPLES))
        if not self.shared:
            data = TensorDataset(*(part[self.trainer.global_rank :: 2] for part in data.tensors))
        return DataLoader(data, batch_size=4, shuffle=True, **self.options)

    def training_step(self, batch, batch_idx):
        inputs, labels, numbers = batch
        self.numbers.append(numbers.tolist())
        return super().training_step((F.dropout(inputs, 0.3), labels), batch_idx)


class Keeps(Callback):
    """Saves a checkpoint after each batch, and writes down what each process had."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.seed == 10:  # of the whole run
            trainer.save_checkpoint(f"{trainer.fit_loop.epoch_loop.batch_progress.total.ready}.ckpt")

    def on_train_end(self, trainer, pl_module):
        torch.save((pl_module.numbers, weights(pl_module)), f"rank{trainer.global_rank}.pt")


def run(seed, ckpt_path=None, shared=True, workers=0, **arguments):
    tricks, options = [ExactResume(), Keeps()], {"use_distributed_sampler": shared, **arguments}
    one = trainer(devices=2, strategy=forked(), max_epochs=2, callbacks=tricks, **options)
    one.fit(Shuffled(seed, shared, num_workers=workers), ckpt_path=ckpt_path, weights_only=True)
    return [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_each_process_goes_on_with_its_own_samples_and_draws(shared, workers):
    options = {"shared": shared, "workers": workers}
    whole = run(10, **options)
    for epoch in range(2):
        both = itertools.chain.from_iterable(itertools.chain(*numbers[4 * epoch :][:4]) for numbers, _ in whole)
        assert sorted(both) == list(range(SAMPLES))
    for point in (2, 4, 5):
        rest = run(90, f"{point}.ckpt", **options)
        for (numbers, ends), (left, same) in zip(whole, rest, strict=True):
            assert left == numbers[point:]
            assert_same_weights(ends, same)


def test_an_accumulation_of_several_processes_is_refused_and_the_next_step_is_not():
    options = {"accumulate_grad_batches": 2}
    whole = run(10, **options)
    with pytest.raises(Exception, match="cannot finish the accumulation that the checkpoint falls into"):
        run(90, "1.ckpt", **options)
    for (numbers, ends), (left, same) in zip(whole, run(90, "2.ckpt", **options), strict=True):
        assert left == numbers[2:]
        assert_same_weights(ends, same)
