"""A checkpoint made when a run is over, at its end or by an exception, has what its last step had, and a run goes on from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from small import Interrupted, ReplayLoader, assert_same_weights, weights
from test_every_trick import TRICKS, Setup
from torch.utils._pytree import tree_flatten

# What Lightning says of any fit beside an OnExceptionCheckpoint, and of one that goes on without its ModelCheckpoint.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*was called without a model",
    "ignore:.*there is no last checkpoint",
    "ignore:Be aware that when using `ckpt_path`.*following callbacks. ..ModelCheckpoint[^}]*}...$",
)
CALLBACKS = [name for name, trick in TRICKS.items() if isinstance(trick, type) and issubclass(trick, Callback)]
every_callback = pytest.mark.parametrize("name", CALLBACKS)


class Ends(Callback):
    """Ends a run with the second epoch of three, or in its middle by an exception, with a checkpoint in the last hook or without."""

    def __init__(self, saves: bool, fails: bool) -> None:
        self.saves, self.fails = saves, fails

    def on_train_batch_end(self, trainer, *_):
        if self.fails and trainer.global_step == 6:
            self.save(trainer)
            raise Interrupted

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1

    def on_train_end(self, trainer, pl_module):
        self.save(trainer)

    def save(self, trainer):
        if self.saves:
            trainer.save_checkpoint("at.ckpt")


@pytest.fixture(autouse=True)
def still_clock(monkeypatch):
    """What counts seconds counts none."""
    monkeypatch.setattr("time.monotonic", lambda: 7.0)


def end_early(name, saves=False):
    setup = Setup(name)
    setup.callbacks.append(Ends(saves, fails=False))
    run = setup.trainer()
    run.fit(setup.module, ReplayLoader())
    assert run.current_epoch == 2
    run.save_checkpoint("after.ckpt")
    return "after.ckpt"


def fail(keeper, name, saves=False):
    setup, folder = Setup(name), Path("first" if saves else "second")
    setup.callbacks += [Ends(saves, fails=True), keeper(folder)]
    with pytest.raises(Interrupted):
        setup.trainer(enable_checkpointing=True).fit(setup.module, ReplayLoader())
    (kept,) = folder.iterdir()
    return str(kept)


def assert_same_state(one, other):
    """Compare what two checkpoints hold of the callbacks, beside Lightning's own."""
    (leaves, spec), (others, other_spec) = (
        tree_flatten({key: state for key, state in saved["callbacks"].items() if "Checkpoint" not in key})
        for saved in (torch.load(path, weights_only=True) for path in (one, other))
    )
    assert spec == other_spec
    for leaf, its in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, its, rtol=0, atol=0, equal_nan=True)
        else:
            assert leaf == its


ENDS = {
    "early": end_early,
    "failing, ModelCheckpoint": partial(fail, partial(ModelCheckpoint, save_top_k=0, save_on_exception=True)),
    "failing, OnExceptionCheckpoint": partial(fail, OnExceptionCheckpoint),
}


@pytest.mark.parametrize("end", ENDS)
@every_callback
def test_it_has_the_state_of_the_last_step(name, end):
    ENDS[end](name, saves=True)  # in a run of its own: to save is to ask every trick for its state
    assert_same_state("at.ckpt", ENDS[end](name))


@pytest.mark.parametrize("end", ENDS)
@every_callback
def test_a_run_goes_on_from_it_to_the_same_bits(name, end):
    whole, resumed = Setup(name), Setup(name)
    whole.trainer().fit(whole.module, ReplayLoader())
    resumed.trainer().fit(resumed.module, ReplayLoader(), ckpt_path=ENDS[end](name), weights_only=True)
    assert_same_weights(weights(whole.module), weights(resumed.module))
