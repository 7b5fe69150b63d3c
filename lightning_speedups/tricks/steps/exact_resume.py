"""Runs that were interrupted and go on with the very samples and draws that came next.

A checkpoint that lacks the reader's place trains samples twice and others never (Eisenman et al., arXiv:2010.08679).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.places import PlaceGrip
from lightning_speedups.attach.trick import Trick, callbacks_of


@dataclass
class Places:
    """What a checkpoint holds; in a run that goes on from it empty as soon as it has done so.

    Attributes:
        places: The place of each rank.
        gradients: Those of an unfinished accumulation, by the parameters' names; of several processes none.
    """

    places: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def gradients_of(pl_module: LightningModule) -> dict[str, Tensor]:
    """Return copies of a module's gradients, by the parameters' names.

    Args:
        pl_module: The module, without a wrapper.

    Returns:
        Tensors on the CPU, of those parameters that have a gradient.

    Example:
        >>> import torch
        >>> module = LightningModule()
        >>> module.layer = torch.nn.Linear(1, 1)
        >>> module.layer(torch.ones(1)).backward()
        >>> gradients_of(module)
        {'layer.weight': tensor([[1.]]), 'layer.bias': tensor([1.])}
    """
    found = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
    return {name: grad.detach().to("cpu", copy=True) for name, grad in found.items() if grad is not None}


class ExactResume(Trick):
    """Lets a run that goes on from a checkpoint end with the same bits as one that was never interrupted.

    Lightning brings back the module, optimizers and counters, but begins the training loader anew with other random
    states: within an epoch some samples come twice and others not at all. This adds to each checkpoint, for every rank,
    the random states of Python, NumPy and torch, and within an epoch its samples in their order. A resumed run goes on
    with those that it has not had, and loads no others. The gradients of an unfinished accumulation are saved and put
    back too. A run without interruption is left as it is, but for samplers that draw as they go, or with a generator of
    their own: these draw exactly an epoch's order, at its beginning, and may so come to others.

    Loaders that keep their place themselves, such as ``InMemoryLoader`` and torchdata's ``StatefulDataLoader``, are
    left to do so, and given the order that they had.

    What stays different: random numbers that workers draw for the samples of an interrupted epoch, of which it warns (a
    ``StatefulDataLoader`` keeps what its dataset's ``state_dict`` holds: ``torch.get_rng_state()``, say), gradients
    that manual optimization gathers over batches, and states that a sampler, a dataset or a callback holds in another
    way than as a ``torch.Generator`` of the loader or its sampler. What Lightning leaves out of a resumed run stays
    out: the validation that was due when a checkpoint was saved at the end of a batch, and what a metric or a logged
    average had gathered of the epoch. A checkpoint of the middle of a step, such as OnExceptionCheckpoint's, brings the
    samples back, but not the same draws.

    When not to use it: where a resumed run may see an epoch's samples in another order. Checkpoints hold the random
    states of each rank, within an epoch 8 bytes for each of its samples, and the gradients where they fall into an
    accumulation.

    Raises:
        MisconfigurationException: At fit start, if the loader is no DataLoader over a map-style dataset that torch's
            BatchSampler cuts into batches, if loaders are made anew in the middle of a run, if ``training_step``
            fetches its own batches, or beside a ``GradientAccumulationScheduler``; in the first batch, if samples are
            not numbered. On resume, if there is another number of processes, if the epoch has another number of
            batches, if the checkpoint falls into an accumulation of several processes, each of which has gradients of
            its own, or if it was saved at the end of an epoch and the Trainer has ``max_steps``, whereupon Lightning
            trains a batch too many.

    Source:
        Eisenman et al., arXiv:2010.08679.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()])
    """

    saved_as = Places

    def __init__(self) -> None:
        super().__init__()
        self._place = PlaceGrip(self)
        self.grips = (self._place,)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would make batches in another way after a resume."""
        super().on_fit_start(trainer, pl_module)
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            what = f"counts batches, but {type(pl_module).__name__}.training_step takes `dataloader_iter`"
            raise self.refusal(what, "Write it as `training_step(self, batch, batch_idx)`.")
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            what = "needs one training loader, but `reload_dataloaders_every_n_epochs` makes it anew"
            raise self.refusal(what, "Let its sampler or dataset follow the epoch, by `set_epoch`.")
        if any(is_a(callback, "GradientAccumulationScheduler") for callback in callbacks_of(trainer)):
            what = "cannot go beside GradientAccumulationScheduler, which a resume within an epoch sets back to 1"
            raise self.refusal(what, "Use `Trainer(accumulate_grad_batches=...)`.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the checkpoint's run stood."""
        super().on_train_start(trainer, pl_module)
        if not self.saved.places:
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    f"The checkpoint has no place of {self.name}, which was not there, or could not ask all processes: "
                    "the run goes on with other random states, and within an epoch with other samples."
                )
            return
        batches = self.saved.places[trainer.global_rank]["batches"]
        if trainer.max_steps != -1 and not trainer.fit_loop.restarted_mid_epoch:
            what = "cannot go on from an epoch's end with `max_steps`, where Lightning trains a batch too many"
            raise self.refusal(what, "Give `max_epochs` alone, or use a checkpoint saved within an epoch.")
        if batches % trainer.accumulate_grad_batches and not self.saved.gradients:
            what = "cannot finish the accumulation that the checkpoint falls into: each process had its own gradients"
            raise self.refusal(what, "Use a checkpoint saved after an optimizer step, or take the callback away.")
        if batches and self._place.loader.num_workers:
            rank_zero_warn(
                f"{self.name} gives workers the samples that come next, but does not hold their random states: if they "
                "draw random numbers for samples, these are others until the epoch ends."
            )
        parameters = dict(pl_module.named_parameters())
        for name, grad in self.saved.gradients.items():
            parameters[name].grad = grad.to(parameters[name].device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Know the order of the epoch's batches."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._place.begin_batch()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the places of all ranks into the checkpoint."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._place.is_under_way:
            checkpoint["callbacks"][self.state_key] = vars(self._now(trainer, pl_module))

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the place for checkpoints saved after the fit or its failure, which of several processes one may have
        alone.
        """
        with suppress(RuntimeError):  # after some failures a GPU answers no more
            if self._place.is_under_way and trainer.world_size == 1:
                self.saved = self._now(trainer, pl_module)
        super().undo(trainer, pl_module)

    def _now(self, trainer: Trainer, pl_module: LightningModule) -> Places:
        if self.saved.places:  # the run has not gone on yet
            return self.saved  # type: ignore[no-any-return]
        accumulates = self._place.batches_done() % trainer.accumulate_grad_batches != 0
        gradients = gradients_of(pl_module) if accumulates and trainer.world_size == 1 else {}
        return Places(self._place.places(), gradients)
