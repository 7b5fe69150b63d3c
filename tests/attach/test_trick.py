"""The life of a run: what belongs to it begins with it, and everything is put back at its end."""

import pydoc
from abc import ABC
from dataclasses import dataclass, field

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from patches import patched

from lightning_speedups.attach.trick import Grip, Trick
from zoo import Classifier, loader, trainer


class Counts(Trick):
    def __init__(self):
        super().__init__()
        self.undone = 0
        self.active = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.active.append(self.is_active(trainer))

    def undo(self, trainer, pl_module):
        super().undo(trainer, pl_module)
        self.undone += 1


def test_undo_runs_after_a_fit_and_after_an_exception():
    trick = Counts()
    one = trainer(max_epochs=1, callbacks=[trick])
    one.fit(Classifier(), loader())
    assert trick.undone == 1
    assert trick.active == [True] * 4
    with pytest.raises(ZeroDivisionError):
        one.fit(Fails(), loader())
    assert trick.undone == 2
    assert patched(one) == set()
    assert not trick.is_active(trainer())


class Fails(Classifier):
    def configure_optimizers(self):
        raise ZeroDivisionError


@dataclass
class Counted:
    batches: int = 0
    seen: list[int] = field(default_factory=list)


@dataclass
class Held:
    last: object = None


class Remembers(Trick):
    saved_as, run_as = Counted, Held

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.saved.batches += 1
        self.saved.seen.append(batch_idx)
        self.run.last = batch


def state(path):
    return torch.load(path, weights_only=True)["callbacks"]["Remembers"]


def test_what_is_saved_outlives_the_run_until_the_next_one_begins():
    trick = Remembers()
    one = trainer(callbacks=[trick], max_epochs=2)
    one.fit(Classifier(), loader())
    assert trick.run == Held()
    one.save_checkpoint("after.ckpt")
    assert state("after.ckpt") == {"batches": 8, "seen": [0, 1, 2, 3] * 2}
    trainer(callbacks=[trick], max_steps=3).fit(Classifier(), loader())
    assert trick.saved == Counted(3, [0, 1, 2])


class FailsAtBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            raise ZeroDivisionError


def test_a_checkpoint_that_is_saved_after_an_exception_has_it():
    trick = Remembers()
    checkpoint = ModelCheckpoint(".", filename="failed", save_on_exception=True, every_n_epochs=5)
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[trick, FailsAtBatch(), checkpoint], enable_checkpointing=True).fit(Classifier(), loader())
    assert trick.run == Held()
    (path,) = (name for name in __import__("pathlib").Path().iterdir() if name.suffix == ".ckpt")
    assert state(path) == {"batches": 2, "seen": [0, 1]}


def test_a_resumed_run_goes_on_and_a_checkpoint_shares_nothing_with_the_trick():
    trick = Remembers()
    trainer(callbacks=[trick], max_steps=2).fit(Classifier(), loader())
    saved = trick.state_dict()
    other = Remembers()
    other.load_state_dict({**saved, "of another version": 3})
    assert other.saved == trick.saved
    assert other.resumed
    other.saved.seen.append(9)
    assert saved["seen"] == trick.saved.seen == [0, 1]
    older = Remembers()
    older.load_state_dict({"batches": 5})
    assert older.saved == Counted(5, [])


class Notes(Grip):
    def __init__(self, trick, notes):
        super().__init__(trick)
        self.notes = notes

    def join(self, trainer):
        self.notes.append("join")

    def on_fit_start(self, trainer):
        self.notes.append("fit")

    def on_train_start(self, trainer):
        self.notes.append("train")

    def on_train_epoch_start(self, trainer):
        self.notes.append("epoch")

    def leave(self, trainer):
        self.notes.append("leave")


def test_grips_follow_the_trick_through_a_fit():
    trick, notes = Remembers(), []
    trick.grips = (Notes(trick, notes),)
    one = trainer(callbacks=[trick], max_epochs=2)
    one.fit(Classifier(), loader())
    assert notes == ["join", "fit", "train", "epoch", "epoch", "leave"]
    one.validate(Classifier(), loader(), verbose=False)
    assert notes[6:] == ["leave"]  # which says nothing where nobody has joined


def test_every_hook_of_a_grip_is_passed_on():
    hooks = {name for name in vars(Grip) if hasattr(Callback, name) and not name.startswith("_")}
    assert hooks <= vars(Trick).keys()
    assert {"on_fit_start", "on_train_start", "on_train_epoch_start"} <= hooks


class Documented(Trick, ABC):
    """Has something of its own.

    Attributes:
        seen: What came.

    Methods:
        again: Once more.

    Raises:
        hidden: Is no attribute.
    """

    seen = 0
    hidden = 0

    def again(self):
        """Once more."""


def test_help_lists_what_the_docstring_names():
    assert [name for name in dir(Documented) if not name.startswith("_")] == ["again", "seen"]
    shown = pydoc.render_doc(Documented, renderer=pydoc.plaintext)
    assert "again(self)" in shown
    assert "is_active" not in shown
    assert "on_fit_start" not in shown
    assert "is_active" in dir(Documented())  # the package's own ways are all there
