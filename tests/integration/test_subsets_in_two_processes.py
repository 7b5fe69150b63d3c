"""SubsetTraining in two processes: each on its own share, all with the same losses, and resumable."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset
from two_processes import Notes, farthest, forked

from lightning_speedups import OneCycleMomentum, SubsetTraining
from zoo import Classifier, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class Shuffled(Classifier):
    """Notes the numbers of its samples, and their losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.shown = []

    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(48), torch.arange(48)), batch_size=4, shuffle=True)

    def training_step(self, batch, batch_idx):
        inputs, labels, numbers = batch
        loss = F.cross_entropy(scores := self.head(self.backbone(inputs)), labels)
        own = F.cross_entropy(scores.detach(), labels, reduction="none")
        self.shown.append((self.trainer.current_epoch, numbers, own))
        return loss


class Keeps(Callback):
    """Writes down what each process saw and believes."""

    def __init__(self, folder, subset):
        self.folder, self.subset, self.losses = folder, subset, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(self.subset.state_dict()["losses"].clone())
        trainer.save_checkpoint(f"{self.folder}-epoch{trainer.current_epoch}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (2, 6, 8):
            trainer.save_checkpoint(f"{self.folder}-step{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, pl_module):
        facts = {
            "losses": self.losses, "shown": pl_module.shown, "steps": trainer.global_step,
            "saved": self.subset.samples_saved, "mean": self.subset.mean_loss,
        }  # fmt: skip
        torch.save(facts, f"{self.folder}-{trainer.global_rank}.pt")


def run(folder, ckpt_path=None, **options):
    subset, notes = SubsetTraining(**{"keep": 0.7, "seed": 3, **options}), Notes(f"notes-{folder}")
    one = trainer(
        devices=2,
        strategy=forked(),
        max_epochs=4,
        callbacks=[subset, OneCycleMomentum(max_lr=0.1), notes, Keeps(folder, subset)],
    )
    one.fit(Shuffled(), ckpt_path=ckpt_path)
    return [torch.load(f"{folder}-{rank}.pt", weights_only=True) for rank in range(2)], notes.read()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_each_has_its_share_all_know_every_loss_and_a_resumed_run_ends_alike():
    facts, notes = run("whole")
    # 24 samples each: 6 batches, then twice 17 in 5, then 6.
    for rank in facts:
        assert [sum(len(n) for e, n, _ in rank["shown"] if e == epoch) for epoch in range(4)] == [24, 17, 17, 24]
        assert rank["steps"] == 22
    assert facts[0]["saved"] == facts[1]["saved"] == 2 * 2 * 7
    assert facts[0]["mean"] == facts[1]["mean"]
    known = torch.full((48,), torch.nan)
    for epoch in range(4):
        both = [torch.cat([n for e, n, _ in rank["shown"] if e == epoch]) for rank in facts]
        assert len(set(torch.cat(both).tolist())) == sum(map(len, both))  # shares without overlap
        for rank in facts:
            for shown, numbers, own in rank["shown"]:
                if shown == epoch:
                    known[numbers] = own
        for rank in facts:
            torch.testing.assert_close(rank["losses"][epoch], known)
        assert torch.equal(facts[0]["losses"][epoch], facts[1]["losses"][epoch])
    assert farthest(notes[0]["weights"][-1], notes[1]["weights"][-1]) == 0.0
    assert notes[0]["rates"] == notes[1]["rates"]
    assert notes[0]["rates"][-1][0] < 1e-4

    for epoch in (0, 1):
        again, resumed = run("rest", f"whole-epoch{epoch}.ckpt", seed=3)
        for rank, other, one, two in zip(facts, again, notes, resumed, strict=True):
            assert torch.equal(rank["losses"][-1], other["losses"][-1])
            assert farthest(one["weights"][-1], two["weights"][-1]) == 0.0
            assert other["saved"] == 28


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_what_all_processes_saw():
    facts, _ = run("whole")
    for step, epoch, first in ((2, 0, 0), (6, 0, 0), (8, 1, 6)):
        state = torch.load(f"whole-step{step}.ckpt", weights_only=True)["callbacks"]["SubsetTraining"]
        total = torch.zeros(48)
        for rank in facts:
            for shown, numbers, own in rank["shown"][first:step]:
                assert shown == epoch
                total[numbers] = own
        torch.testing.assert_close(state["total"], total)
        assert int(state["count"].sum()) == 2 * 4 * (step - first)
    again, _ = run("rest", "whole-step6.ckpt")  # behind the last batch of the first epoch
    assert torch.equal(again[0]["losses"][-1], facts[0]["losses"][-1])
    assert torch.equal(again[1]["losses"][-1], facts[1]["losses"][-1])
