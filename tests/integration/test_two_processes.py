"""The tricks in two processes: right on every rank, equal where they must be, and resumable."""

import math

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import Notes, Regressor, farthest, two

from lightning_speedups import FreezeBackboneFinetune, MixupCallback, OneCycleMomentum, WarmupLRScaler
from zoo import Callback, Classifier, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class SameDataEverywhere(Classifier):
    """All ranks get the same batches, so that what differs is the mixture."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(*images(16)), batch_size=4)


def mixtures(folder, **options):
    notes = Notes(folder)
    mixup = MixupCallback(alpha=1.0, **options)
    two([mixup, notes], max_epochs=2).fit(SameDataEverywhere())
    return [notes["inputs"] for notes in notes.read()]


@pytest.mark.parametrize(
    "options",
    [{"seed": 5}, {"seed": None}, {"seed": 5, "cutmix_alpha": 1.0, "per_element": True, "log": True}],
    ids=str,
)
def test_ranks_draw_different_mixtures_and_a_second_run_the_same(options):
    first, again = mixtures("first", **options), mixtures("again", **options)
    for one, other in zip(first, again, strict=True):
        assert len(one) == 2 * 4
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # No two are equal, so that no stream is the other's, shifted.
    assert not any(torch.equal(a, b) for a in first[0] for b in first[1])


def test_another_seed_draws_other_mixtures():
    one, other = mixtures("five", seed=5), mixtures("six", seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_a_single_process_draws_what_rank_0_draws():
    together = mixtures("together", seed=5)[0]
    notes = Notes("alone")
    trainer(max_epochs=2, callbacks=[MixupCallback(alpha=1.0, seed=5), notes]).fit(SameDataEverywhere())
    alone = notes.read(1)[0]["inputs"]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_effective_batch_counts_processes_and_accumulation(accumulate):
    notes = Notes()
    scaler = WarmupLRScaler(base_batch_size=4, warmup_steps=3)
    two([scaler, notes], max_epochs=2, accumulate_grad_batches=accumulate).fit(Regressor(batch_size=8))
    full = 8 * accumulate / 4  # 4 a process
    expected = [0.1 * (1 + (full - 1) * min(step, 3) / 3) for step in range(2 * 4 // accumulate)]
    for rank in notes.read():
        assert [rates for (rates,) in rank["rates"]] == pytest.approx(expected, rel=1e-9)


def test_warm_up_in_epochs_takes_each_processs_own_steps():
    notes = Notes()
    two([WarmupLRScaler(scale=3.0, warmup_epochs=1.5), notes], max_epochs=2).fit(Regressor(batch_size=8))
    expected = [0.1 * (1 + 2 * min(step, 6) / 6) for step in range(8)]
    for rank in notes.read():
        assert [rates for (rates,) in rank["rates"]] == pytest.approx(expected, rel=1e-9)


def test_one_cycle_is_torchs_on_every_rank():
    notes = Notes()
    two([OneCycleMomentum(max_lr=0.3), notes], max_epochs=3).fit(Regressor())
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 12:
            schedule.step()
    for rank in notes.read():
        assert [rates for (rates,) in rank["rates"]] == pytest.approx(expected, rel=1e-9)
    first, second = notes.read()
    assert farthest(first["weights"][-1], second["weights"][-1]) == 0.0


class SavesEachEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"epoch{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("saved_after", [0, 1, 2])
def test_a_run_resumed_before_at_or_past_the_unfreezing_ends_as_the_whole_one(saved_after):
    def tricks(folder):
        freeze = FreezeBackboneFinetune(unfreeze_at_epoch=2, backbone_lr_ratio=0.5)
        return [freeze, WarmupLRScaler(scale=1.5, warmup_steps=7), Notes(folder)]

    whole = tricks("whole")
    two([*whole, SavesEachEpoch()], max_epochs=4).fit(Regressor())
    rest = tricks("rest")
    two(rest, max_epochs=4).fit(Regressor(), ckpt_path=f"epoch{saved_after}.ckpt")
    expected, (first, second) = whole[-1].read()[0]["weights"][saved_after + 1 :], rest[-1].read()
    assert len(expected) == 3 - saved_after
    for one, other, want in zip(first["weights"], second["weights"], expected, strict=True):
        assert farthest(one, other) == 0.0
        assert farthest(one, want) == 0.0
    if saved_after == 0:
        assert farthest(expected[0], expected[1]) > 1e-3


def test_mixup_resumed_in_two_processes_ends_as_the_whole_run():
    def tricks(folder):
        return [MixupCallback(alpha=1.0), Notes(folder)]

    whole, rest = tricks("whole"), tricks("rest")
    two([*whole, SavesEachEpoch()], max_epochs=3).fit(SameDataEverywhere())
    seed_everything(12345, verbose=False)  # the checkpoint knows better
    two(rest, max_epochs=3).fit(SameDataEverywhere(), ckpt_path="epoch0.ckpt")
    for long, short in zip(whole[-1].read(), rest[-1].read(), strict=True):
        assert len(short["inputs"]) == 2 * 4
        assert all(torch.equal(a, b) for a, b in zip(long["inputs"][4:], short["inputs"], strict=True))
        assert farthest(long["weights"][-1], short["weights"][-1]) == 0.0


def test_all_tricks_together_keep_the_ranks_equal():
    notes = Notes()
    tricks = [
        MixupCallback(alpha=1.0, seed=0),
        FreezeBackboneFinetune(unfreeze_at_epoch=1),
        WarmupLRScaler(scale=2.0, warmup_steps=5),
        OneCycleMomentum(max_lr=0.1),
    ]
    two([*tricks, notes], max_epochs=3).fit(SameDataEverywhere())
    first, second = notes.read()
    assert first["rates"] == second["rates"]
    assert len(first["rates"]) == 12
    assert all(math.isclose(backbone, head * 0.1) for backbone, head in first["rates"]) or all(
        math.isclose(head * 0.1, backbone) for head, backbone in first["rates"]
    )
    assert all(farthest(a, b) == 0.0 for a, b in zip(first["weights"], second["weights"], strict=True))
