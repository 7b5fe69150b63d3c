"""Layers that freeze in two processes: equal on both, after every step, and as in a single one; resumable."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from two_processes import Notes, Regressor, farthest, two

from lightning_speedups import FreezeProgressively
from zoo import trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class Deep(Regressor):
    """Three layers and a head, one optimizer step in each batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Sequential(nn.Linear(7 if i else 5, 7), nn.Tanh()) for i in range(3)]
        self.backbone, self.head = nn.Sequential(*layers), nn.Linear(7, 1)


class EachStep(Callback):
    """Writes down what each process has after every batch, and what DDP waits for; saves on the way."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.weights, self.frozen, self.reduced = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.frozen.append([name for name, p in pl_module.named_parameters() if not p.requires_grad])
        if trainer.world_size > 1:
            sizes = trainer.strategy.model._get_ddp_logging_data()["bucket_sizes"]
            self.reduced.append(sum(int(size) for size in sizes.split(",")))
        if trainer.global_step in (3, 5, 6):
            trainer.save_checkpoint(f"step{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(exist_ok=True)
        facts = {"weights": self.weights, "frozen": self.frozen, "reduced": self.reduced}
        torch.save(facts, self.folder / f"steps{trainer.global_rank}.pt")

    def read(self, processes=2):
        return [torch.load(self.folder / f"steps{rank}.pt", weights_only=True) for rank in range(processes)]


def callbacks(folder):
    return [FreezeProgressively(start=0.25, until=0.75), EachStep(folder), Notes(folder)]


def run(folder, ckpt_path=None, **arguments):
    tricks = callbacks(folder)
    two(tricks, max_epochs=2, **arguments).fit(Deep(), ckpt_path=ckpt_path)
    return tricks[1].read(), tricks[2].read()


def test_ranks_stay_equal_through_all_freezings_and_exchange_no_frozen_gradient():
    (first, second), notes = run("both")
    alone = callbacks("alone")
    trainer(callbacks=alone, max_epochs=2).fit(Deep())
    (single,) = alone[1].read(1)
    # Of 8 steps: the layers at 2, 4 and 6.
    frozen = [2 * i for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    for facts in (first, second, single):
        assert [len(names) for names in facts["frozen"]] == frozen
        for step in range(1, 8):
            for name in facts["frozen"][step]:
                assert torch.equal(facts["weights"][step][name], facts["weights"][step - 1][name])
    for one, other, by_itself in zip(first["weights"], second["weights"], single["weights"], strict=True):
        assert farthest(one, other) == 0.0
        assert farthest(one, by_itself) < 1e-6
    assert farthest(first["weights"][6], first["weights"][7]) > 1e-4  # the head goes on
    assert notes[0]["rates"] == notes[1]["rates"] == alone[2].read(1)[0]["rates"]
    sizes = {name: 4 * weight.numel() for name, weight in first["weights"][0].items()}
    expected = [sum(size for name, size in sizes.items() if name not in names) for names in first["frozen"]]
    assert first["reduced"] == second["reduced"] == expected


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_resumed_just_before_or_after_a_freezing_it_ends_as_the_whole_run():
    whole, _ = run("whole")
    for step in (3, 5, 6):
        rest, _ = run("rest", ckpt_path=f"step{step}.ckpt")
        for long, short in zip(whole, rest, strict=True):
            assert farthest(rest[0]["weights"][-1], rest[1]["weights"][-1]) == 0.0
            assert long["frozen"][-1] == short["frozen"][-1]


def test_ranks_stay_equal_with_accumulation():
    (first, second), _ = run("both", accumulate_grad_batches=2)
    # Of 4 steps: the layers at 1, 2 and 3.
    assert [len(names) for names in first["frozen"]] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert farthest(first["weights"][-1], second["weights"][-1]) == 0.0
