"""LengthBatches in two processes: each has its share of one plan, with neighbours in length at the same time."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.utils.rnn import pad_sequence
from tricks.sequences.test_length_batches import BUDGET, COUNT, SEED, Reader, Texts, data
from two_processes import forked

from lightning_speedups import LengthBatches
from zoo import trainer, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]


class Keeps(Callback):
    """Writes down what each process saw, and its weights; saves a checkpoint in the second epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.num_training_batches + 2:
            trainer.save_checkpoint(f"{self.folder}.ckpt")

    def on_train_end(self, trainer, pl_module):
        facts = {"seen": pl_module.seen, "shapes": pl_module.shapes, "told": pl_module.told, "end": weights(pl_module)}
        torch.save(facts, f"{self.folder}-{trainer.global_rank}.pt")


def run(folder, ckpt_path=None, seed=SEED, loader=None, **arguments):
    torch.manual_seed(9)
    one = trainer(
        devices=2,
        strategy=forked(),
        max_epochs=2,
        callbacks=[LengthBatches(max_tokens=BUDGET, seed=seed), Keeps(folder)],
        **arguments,
    )
    one.fit(Reader(), data() if loader is None else loader, ckpt_path=ckpt_path)
    return [torch.load(f"{folder}-{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_share_each_epoch_step_together_and_end_where_a_plain_loop_ends():
    ranks = run("whole")
    steps = [[batch for _, batch in rank["seen"]] for rank in ranks]
    assert len(steps[0]) == len(steps[1]) == ranks[0]["told"][0] == ranks[1]["told"][0]
    texts, in_epoch = Texts(), len(steps[0]) // 2
    for epoch in range(2):
        both = [number for rank in steps for batch in rank[epoch * in_epoch :][:in_epoch] for number in batch]
        assert sorted(both) == [*range(COUNT)]
    waits = [abs(one[1] - two[1]) / max(one[1], two[1]) for one, two in zip(*(r["shapes"] for r in ranks), strict=True)]
    assert sum(waits) / len(waits) < 0.3
    assert max(rows * columns for rank in ranks for rows, columns in rank["shapes"]) <= BUDGET

    by_hand = Reader()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5, momentum=0.9)
    for pair in zip(*steps, strict=True):
        optimizer.zero_grad()
        for batch in pair:
            (by_hand.loss(pad_sequence([texts.texts[number] for number in batch], batch_first=True)) / 2).backward()
        optimizer.step()
    for rank in ranks:
        for name, value in weights(by_hand).items():
            torch.testing.assert_close(rank["end"][name], value)


def test_both_go_on_within_an_epoch_with_the_seed_of_the_checkpoint():
    ranks = run("whole", seed=None)
    torch.manual_seed(0)
    again = run("rest", ckpt_path="whole.ckpt", seed=None)
    for whole, rest in zip(ranks, again, strict=True):
        done = len(whole["seen"]) // 2 + 2
        assert rest["seen"] == whole["seen"][done:]
        assert all(torch.equal(rest["end"][name], value) for name, value in whole["end"].items())


def test_a_sampler_that_shares_nothing_out_is_refused():
    with pytest.raises(Exception, match=r"the sampler is a RandomSampler\. Use a DistributedSampler"):
        run("none", use_distributed_sampler=False)
