"""Micro-batches in two processes: memory that runs out in one of them keeps none waiting, and weights end as with enough."""

import pytest
import torch
from torch import nn
from two_processes import CountsTraffic, Notes, Regressor, farthest, two

from lightning_speedups import AutoMicroBatch

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class Short(Regressor):
    """One process runs out of memory with more than two of its four samples."""

    def __init__(self, rank=1, where="forward", norm=False, spare=False):
        super().__init__()
        self.rank, self.where = rank, where
        if norm:
            self.backbone[1] = nn.BatchNorm1d(7)
        if spare:  # is never used
            self.spare = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        lacks = self.trainer.global_rank == self.rank and len(inputs) > 2
        features = self.backbone(inputs)
        if lacks and self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if lacks and self.where == "backward":
            features.register_hook(self.lack)
        loss = ((self.head(features) - targets) ** 2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def lack(self, _):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Sizes(Notes):
    """Notes the size of micro-batches and the logged loss, too."""

    def __init__(self, folder, micro):
        super().__init__(folder)
        self.micro = micro

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        facts = {"size": self.micro.size, "loss": float(trainer.callback_metrics["loss_epoch"])}
        torch.save(facts, self.folder / f"facts{trainer.global_rank}.pt")

    def facts(self):
        return [torch.load(self.folder / f"facts{rank}.pt", weights_only=True) for rank in range(2)]


def fitted(folder, module, micro=None, options=None, **arguments):
    """The last weights of both processes, and what else they noted."""
    micro = micro or AutoMicroBatch()
    notes = Sizes(folder, micro)
    two([*([] if folder == "whole" else [micro]), notes], options, max_epochs=2, **arguments).fit(module)
    return [rank["weights"][-1] for rank in notes.read()], notes.facts()


@pytest.mark.parametrize(
    ("rank", "where", "arguments"),
    [
        (1, "forward", {}),
        (0, "backward", {"accumulate_grad_batches": 2}),
        (1, "backward", {"options": {"find_unused_parameters": True}}),
        (
            0,
            "forward",
            {"options": {"gradient_as_bucket_view": True}, "accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        ),
    ],
    ids=["forward", "backward, accumulated", "backward, unused parameters", "forward, in buckets"],
)
def test_memory_that_runs_out_in_one_process_splits_batches_in_both(rank, where, arguments):
    spare = "find_unused_parameters" in arguments.get("options", {})
    whole, (plain, _) = fitted("whole", Short(rank=None, spare=spare), **arguments)
    split, facts = fitted("split", Short(rank, where, spare=spare), **arguments)
    start = {name: p.detach() for name, p in Short(spare=spare).named_parameters()}
    assert [one["size"] for one in facts] == [2, 2]
    assert farthest(*split) == 0.0
    assert farthest(split[0], whole[0]) < 1e-6 < 1e-3 < farthest(split[0], start)
    assert [one["loss"] for one in facts] == pytest.approx([plain["loss"]] * 2, rel=1e-5)


def test_buffers_that_are_sent_before_a_forward_pass_keep_nobody_waiting():
    split, facts = fitted("split", Short(1, "forward", norm=True))
    assert [one["size"] for one in facts] == [2, 2]
    assert farthest(*split) == 0.0


def test_gradients_are_sent_once_a_step():
    sent = []
    for tricks in ([], [AutoMicroBatch(start=1)]):
        two([*tricks, CountsTraffic()], max_epochs=2, accumulate_grad_batches=2).fit(Short(rank=None))
        sent.append([CountsTraffic.read(rank) for rank in range(2)])
    assert sent[0] == sent[1]


class ScarceOnce(torch.optim.SGD):
    """Has no memory for its first step in one process."""

    def step(self, closure=None):
        loss = closure()
        if self.lacks:
            self.lacks = False
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().step()
        return loss


class ShortStep(Short):
    def configure_optimizers(self):
        optimizer = ScarceOnce(self.parameters(), lr=0.1, momentum=0.9)
        optimizer.lacks = self.trainer.global_rank == self.rank
        return optimizer


def test_an_optimizer_that_runs_out_in_one_process_tries_again_there():
    whole, _ = fitted("whole", ShortStep(rank=None, where="step"))
    again, facts = fitted("again", ShortStep(1, "step"))
    assert [one["size"] for one in facts] == [None, None]
    assert farthest(again[0], whole[0]) == farthest(again[1], whole[1]) == 0.0
