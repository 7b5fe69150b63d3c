"""Ten kinds of projects, written as people write them, with four or five tricks at once, under either package.

A kind is a file beside this one, with ``project(L)``: what is trained, on what, with which tricks and Trainer arguments, made of the classes of the
package ``L``. ``LOSS`` is the name under which it logs what must fall; ``STRATEGY``, where it is there, what DDP needs.
"""

from __future__ import annotations

import functools
import importlib
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from patches import patched
from torch.multiprocessing import ProcessRaisedException

from lightning_speedups.attach.packages import ROOTS, Callback
from zoo import InterruptAt, Interrupted, assert_same_weights, trainer, weights

KINDS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_"))
every_project = pytest.mark.parametrize(("kind", "package"), [(kind, one) for kind in KINDS for one in ROOTS])

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # another run's, of one test
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),  # with `sync_dist`, which projects forget
]


class InterruptWithin(InterruptAt):
    """Saves a checkpoint within the second epoch, and ends the run."""

    def __init__(self):
        super().__init__(step=0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2 if trainer.world_size == 1 else 0):
            self.step = trainer.global_step
            self.interrupt(trainer)


class Notes(Callback):
    """Notes the loss of each epoch, and the parameters of each process at the end."""

    def __init__(self, loss):
        self.loss, self.losses = loss, []

    def on_train_epoch_start(self, trainer, pl_module):
        if self.loss in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics[self.loss]))

    def on_train_end(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)
        if trainer.world_size > 1:
            parameters = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
            torch.save((self.losses, parameters), f"rank{trainer.global_rank}.pt")


class Project:
    """A project of its kind, made anew, and its Trainer."""

    def __init__(self, kind, package, *more, tricks=True, **arguments):
        L, project = importlib.import_module(package), importlib.import_module(f"projects.{kind}")
        seed_everything(7, verbose=False)
        self.module, self.data, self.tricks, own = project.project(L)
        self.notes = Notes(project.LOSS)
        callbacks = [*own.pop("callbacks", []), *(self.tricks if tricks else []), *more, self.notes]
        if "devices" in arguments:
            options = {"start_method": "fork", "timeout": timedelta(seconds=60), **getattr(project, "STRATEGY", {})}
            arguments["strategy"] = L.strategies.DDPStrategy(**options)
        self.trainer = trainer(L, **(own | arguments), callbacks=callbacks)

    def fit(self):
        self.trainer.fit(self.module, self.data)
        return self

    def resume(self):
        torch.manual_seed(123)  # what has been drawn until then is no help
        self.trainer.fit(self.module, self.data, ckpt_path="at.ckpt", weights_only=False)  # for their hyperparameters
        return self

    def left_behind(self):
        """What a fit leaves on the Trainer and the module."""
        hooks = {name for name, part in self.module.named_modules() if part._forward_hooks or part._forward_pre_hooks}
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        evaluating = {name for name, part in self.module.named_modules() if not part.training}
        strides = {name: parameter.stride() for name, parameter in self.module.named_parameters()}
        return patched(self.trainer), hooks, frozen, evaluating, strides


@functools.cache
def whole(kind, package):
    """A run without interruption."""
    return Project(kind, package).fit()


@functools.cache
def left_by_a_plain_fit(kind, package):
    return Project(kind, package, tricks=False, max_epochs=1, limit_train_batches=1).fit().left_behind()


@every_project
def test_with_its_tricks_a_project_trains_and_nothing_is_left_of_them(kind, package):
    run = whole(kind, package)
    losses = run.notes.losses
    assert len(run.tricks) in (4, 5)
    assert len(losses) == run.trainer.max_epochs
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.95 * losses[0]
    assert run.left_behind() == left_by_a_plain_fit(kind, package)


@every_project
def test_an_interrupted_and_resumed_project_ends_with_the_same_bits(kind, package):
    parted = Project(kind, package, InterruptWithin())
    with pytest.raises(Interrupted):
        parted.fit()
    assert parted.left_behind() == left_by_a_plain_fit(kind, package)
    assert_same_weights(weights(whole(kind, package).module), weights(Project(kind, package).resume().module))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(("kind", "package"), [(kind, ROOTS[i % len(ROOTS)]) for i, kind in enumerate(KINDS)])
def test_two_processes_stay_equal_and_end_with_the_same_bits_after_an_interruption(kind, package):
    def ranks():
        return [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    Project(kind, package, devices=2).fit()
    (losses, one), (_, other) = ranks()
    assert losses[-1] < losses[0]
    assert_same_weights(one, other)
    with pytest.raises(ProcessRaisedException, match="Interrupted"):
        Project(kind, package, InterruptWithin(), devices=2).fit()
    Project(kind, package, devices=2).resume()
    for _, resumed in ranks():
        assert_same_weights(one, resumed)
