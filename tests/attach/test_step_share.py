"""What is said of an optimizer's part in the first steps, by a clock of the test's own."""

import logging
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_speedups.attach import step_share
from lightning_speedups.attach.step_share import StepShare
from lightning_speedups.attach.trick import Trick
from zoo import Classifier, loader, trainer


class Watched(Trick):
    def __init__(self):
        super().__init__()
        self.grips = (StepShare(self, "Do less."),)


@pytest.mark.parametrize("gathers", ["trainer", "callback"])
@pytest.mark.parametrize("seconds", [0.4, 0.2])
def test_an_optimizer_that_takes_a_large_part_of_the_step_is_told_of_once(seconds, gathers, caplog, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(step_share, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    module = Classifier()
    own = module.training_step

    def training_step(batch, batch_idx):
        clock.now += 1 - seconds
        return own(batch, batch_idx)

    def passes(optimizer, *_):
        clock.now += seconds * 2  # of two batches

    module.training_step = training_step
    make = module.configure_optimizers

    def configure_optimizers():
        optimizer = make()
        optimizer.register_step_post_hook(passes)
        optimizer.register_step_post_hook(lambda *_: standing.append("optimizer_step" in vars(run.strategy)))
        return optimizer

    module.configure_optimizers = configure_optimizers
    standing = []
    arguments = {"callbacks": [Watched()], "accumulate_grad_batches": 2}
    if gathers == "callback":
        arguments = {"callbacks": [GradientAccumulationScheduler({0: 2}), Watched()]}
    run = trainer(**arguments, max_epochs=6)
    with caplog.at_level(logging.INFO):
        run.fit(module, loader())
    assert standing == [True] * 6 + [False] * 6
    told = [record.message for record in caplog.records if "of the first steps" in record.message]
    assert len(told) == (seconds > 1 / 3)
    assert all("Watched: the optimizer took 40% of the first steps. Do less." in message for message in told)
