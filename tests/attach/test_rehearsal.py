"""A rehearsed step is a training step, and nothing is different after it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_speedups.attach import rehearsal as module
from lightning_speedups.attach.copies import NoCopyError
from lightning_speedups.attach.rehearsal import (
    first_inputs,
    fresh_statistics,
    norms_of,
    rehearsal,
    step_seconds,
    swap_statistics,
)
from zoo import Classifier, Manual, images, loader, trainer, weights


class During(Callback):
    """Calls a function in the second training batch, or in the first validation."""

    def __init__(self, function, when="train"):
        self.function, self.when, self.result = function, when, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.when == "train" and batch_idx == 1:
            self.result = self.function(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module):
        if self.when == "validation":
            self.result = self.function(trainer, pl_module)


class Traces(Classifier):
    """Leaves as many traces as a step can."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen_so_far", torch.zeros(()))
        self.count, self.last = 0, None

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.head(self.dropout(self.backbone(x + 0.1 * torch.randn_like(x))))
        self.last = F.cross_entropy(scores, y)  # with its graph
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy)
        self.log_dict({"loss": self.last, "noise": random.random() + np.random.rand()})  # noqa: NPY002
        self.logger.log_metrics({"own": self.last.item()})
        self.count += len(x)
        self.seen_so_far += len(x)
        self.losses.append(self.last.item())
        if not torch.is_grad_enabled():
            self.trainer.should_stop = True
        return self.last


def run(function, module, when="train", **arguments):
    during = During(function, when)
    logger = CSVLogger(".", name=when)
    one = trainer(callbacks=[during], max_epochs=2, logger=logger, log_every_n_steps=1, **arguments)
    one.fit(module, loader(), loader())
    return during.result, one, logger


@pytest.mark.parametrize("when", ["train", "validation"])
def test_a_rehearsal_leaves_no_trace(when):
    def rehearse(trainer, pl_module):
        with rehearsal(trainer, pl_module) as (_, step):
            for _ in range(3):
                step(tuple(images(8)))

    results = []
    for function in (lambda *_: None, rehearse):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module = Traces()
        _, one, logger = run(function, module, when)
        results.append(
            (
                weights(module),
                module.losses,
                module.count,
                one.callback_metrics,
                (Path(logger.log_dir) / "metrics.csv").read_text(),
            )
        )
    for plain, rehearsed in zip(*results, strict=True):
        assert str(plain) == str(rehearsed)


@pytest.mark.parametrize("when", ["train", "validation"])
def test_the_step_is_that_of_training_without_a_gradient(when):
    def rehearse(trainer, pl_module):
        modes = []
        with rehearsal(trainer, pl_module) as (twin, step):
            step(tuple(images(8)))
            modes.append((twin.backbone.training, twin.head.training))
            return (
                twin.losses[-1],
                modes,
                [p is q for p, q in zip(twin.parameters(), pl_module.parameters(), strict=True)],
            )

    module = Classifier()
    module.on_train_batch_start = lambda *_: module.head.eval() and None
    (loss, modes, same), *_ = run(rehearse, module, when)
    assert modes == [(True, False)]
    assert all(same)
    assert torch.isfinite(torch.tensor(loss))


def test_the_precision_is_that_of_training():
    class Seer(Classifier):
        def training_step(self, batch, batch_idx):
            self.kinds = [*getattr(self, "kinds", []), self.backbone(batch[0]).dtype]
            return super().training_step(batch, batch_idx)

    def rehearse(trainer, pl_module):
        with rehearsal(trainer, pl_module) as (twin, step):
            step(tuple(images(8)))
            return twin.kinds

    kinds, *_ = run(rehearse, Seer(), precision="bf16-mixed")
    assert set(kinds) == {torch.bfloat16}


def test_a_step_without_an_index_is_called_without_one():
    class NoIndex(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    def rehearse(trainer, pl_module):
        with rehearsal(trainer, pl_module) as (twin, step):
            step(tuple(images(8)))
            return len(twin.losses) - len(pl_module.losses)

    assert run(rehearse, NoIndex())[0] == 1


def test_buffers_are_put_back_also_where_a_function_holds_on_to_the_module():
    module = Classifier()
    module.again = lambda x: module.backbone(x)

    def rehearse(trainer, pl_module):
        before = weights(pl_module)
        with rehearsal(trainer, pl_module) as (twin, _), torch.no_grad():
            twin.again(images(8)[0])
        return [name for name, value in weights(pl_module).items() if not torch.equal(value, before[name])]

    assert run(rehearse, module)[0] == []


def test_statistics_are_the_mean_over_the_batches_of_each_modules_input():
    batches = [tuple(part[8 * i : 8 * i + 8] for part in images(24, seed=5)) for i in range(3)]

    def rehearse(trainer, pl_module):
        return fresh_statistics(trainer, pl_module, batches), weights(pl_module)

    (statistics, state), *_ = run(rehearse, Classifier(), "validation")
    inputs = [F.conv2d(x, state["backbone.0.weight"], state["backbone.0.bias"]) for x, _ in batches]
    (mean, variance) = statistics.pop("backbone.1")
    assert not statistics
    torch.testing.assert_close(mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(variance, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0))


def test_frozen_and_unused_norms_keep_theirs():
    class TwoNorms(Classifier):
        def __init__(self):
            super().__init__()
            self.unused, self.stateless = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)

    def rehearse(trainer, pl_module):
        return list(fresh_statistics(trainer, pl_module, [tuple(images(8))])), list(norms_of(pl_module))

    (fresh, norms), *_ = run(rehearse, TwoNorms(), "validation")
    assert (fresh, norms) == (["backbone.1"], ["backbone.1", "unused"])
    frozen = Classifier()
    frozen.on_train_batch_start = lambda *_: frozen.backbone.eval() and None
    assert run(rehearse, frozen, "validation")[0] == ([], ["backbone.1"])


def test_statistics_are_swapped_and_swapped_back():
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    before = weights(module)
    own = swap_statistics(module, {"1": (torch.ones(2), torch.full((2,), 3.0))})
    assert module[1].running_mean.tolist() == [1, 1]
    assert module[1].running_var.tolist() == [3, 3]
    assert torch.equal(module[0].running_mean, before["0.running_mean"])
    swap_statistics(module, own)
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())


class Uncopied(Classifier):
    def __init__(self):
        super().__init__()
        self.stream = (i for i in range(3))


@pytest.mark.parametrize(("module", "reason"), [(Manual, "optimizes manually"), (Uncopied, "cannot be copied")])
def test_what_cannot_be_rehearsed_says_why(module, reason):
    def rehearse(trainer, pl_module):
        with pytest.raises(NoCopyError, match=reason), rehearsal(trainer, pl_module):
            pass
        return True

    assert run(rehearse, module())[0]


def test_first_inputs_are_what_a_part_is_given_and_the_rest_of_the_step_is_not_run():
    module, reached = Traces(), []
    module.head.register_forward_pre_hook(lambda head, _: reached.append(head))

    def look(trainer, pl_module):
        before, count = weights(pl_module), len(reached)
        batch = (images(8)[0], images(8)[1])
        torch.manual_seed(4)
        seen = first_inputs(trainer, pl_module, batch, pl_module.backbone[1])
        same = torch.random.get_rng_state().equal(torch.manual_seed(4).get_state())
        torch.manual_seed(4)
        expected = pl_module.backbone[0](batch[0] + 0.1 * torch.randn_like(batch[0]))
        unchanged = all(torch.equal(value, before[name]) for name, value in weights(pl_module).items())
        return torch.equal(seen, expected), same, unchanged, len(reached) - count

    result, _, _ = run(look, module)
    assert result == (True, True, True, 0)


def test_a_part_that_the_step_does_not_call_has_no_first_inputs():
    def look(trainer, pl_module):
        pl_module.spare = nn.Linear(2, 2)
        with pytest.raises(NoCopyError, match=r"Classifier\.training_step does not call `spare`"):
            first_inputs(trainer, pl_module, images(8), pl_module.spare)
        return True

    assert run(look, Classifier())[0]


def test_a_step_takes_about_three_forward_passes(monkeypatch):
    monkeypatch.setattr(module.timeit, "repeat", lambda forward, number, repeat: [forward() or 0.5, 0.25, 0.75])
    found = []

    class Times(Classifier):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled():
                found.append("rehearsed")
            elif not found:
                found.append(step_seconds(self.trainer, batch))
            return super().training_step(batch, batch_idx)

    trainer(max_steps=1).fit(Times(), loader())
    assert found[-1] == 0.75
