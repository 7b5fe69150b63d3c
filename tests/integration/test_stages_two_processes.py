"""Layers that thaw and freeze one after the other in two processes: ranks stay equal, and only what trains is sent."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from two_processes import CountsTraffic, Notes, Regressor, farthest, size, two

from lightning_speedups import FreezeBackboneFinetune
from zoo import trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def sent_in_each_epoch(rank):
    _, sent = CountsTraffic.read(rank)
    total = Counter()
    for (_, epoch), amount in sent.items():
        total[epoch] += amount
    return total


def test_each_stage_sends_what_trains_in_it_and_ranks_equal_each_other_and_one_process():
    def make():
        return FreezeBackboneFinetune(
            schedule={1: "2", 2: "0", 4: "2"}, refreeze={3: "2"}, lr_decay=0.5, unfreeze_warmup=2
        )

    notes, own = Notes(), Notes("alone")
    two([make(), notes, CountsTraffic()], max_epochs=5).fit(Regressor())
    first, second = notes.read()
    assert [farthest(a, b) for a, b in zip(first["weights"], second["weights"], strict=True)] == [0.0] * 5
    assert first["rates"] == second["rates"]
    alone = Regressor()
    trainer(callbacks=[make(), own], max_epochs=5).fit(alone)
    assert max(farthest(a, b) for a, b in zip(first["weights"], own.weights, strict=True)) < 1e-5
    moved = [
        {name for name in now if not torch.equal(now[name], before[name])}
        for before, now in zip(first["weights"], first["weights"][1:], strict=False)
    ]
    last, earlier = {"backbone.2.weight", "backbone.2.bias"}, {"backbone.0.weight", "backbone.0.bias"}
    assert [names - {"head.weight", "head.bias"} for names in moved] == [last, last | earlier, earlier, last | earlier]
    head, layer0, layer2 = size(alone.head), size(alone.backbone[0]), size(alone.backbone[2])
    for rank in (0, 1):
        sent = sent_in_each_epoch(rank)
        assert sent == {
            0: 4 * head,
            1: 4 * (head + layer2),
            2: 4 * (head + layer2 + layer0),
            3: 4 * (head + layer0),
            4: 4 * (head + layer2 + layer0),
        }


class Logs(Callback):
    """Logs before the callbacks behind it look."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("score", float(-trainer.current_epoch if trainer.global_rank else 1.0), rank_zero_only=False)


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_ranks_whose_metrics_differ_thaw_together():
    notes = Notes()
    finetune = FreezeBackboneFinetune(gradual=True, monitor="score")
    two([Logs(), finetune, notes, CountsTraffic()], max_epochs=4).fit(Regressor())
    first, second = notes.read()
    assert [farthest(a, b) for a, b in zip(first["weights"], second["weights"], strict=True)] == [0.0] * 4
    head, both = size(Regressor().head), size(Regressor().backbone)
    for rank in (0, 1):
        sent = sent_in_each_epoch(rank)
        assert sent[0] == sent[1] == 4 * head
        assert sent[3] == 4 * (head + both)
