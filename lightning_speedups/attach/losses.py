"""The loss of each sample of a batch, from a ``training_step`` that returns their mean.

``strategy.training_step`` runs under a mode of torch's that sees the losses it computes; under DDP the step runs inside
the wrapper's forward, in the same thread, so that nothing is different there.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.trick import Trick, patch, unpatch
from lightning_speedups.core.sample_losses import SampleLosses


class LossTrick(Trick):
    """A trick that reads, and may weigh, the loss of each sample of a training batch."""

    def samples_in_step(self, trainer: Trainer) -> int:
        """Return how many samples the batch of this step has."""
        raise NotImplementedError

    def weights_in_step(self, trainer: Trainer) -> Tensor | None:
        """Return what each sample of the batch counts, ``(N,)``, on the module's device; None where all count 1."""
        return None

    def take_losses(self, trainer: Trainer, losses: Tensor) -> None:
        """Note the losses of a batch, ``(N,)``, float32, detached, on their device."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand around the training step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        here = trainer.strategy.__dict__.get("training_step")
        if isinstance(here, _Step):
            raise MisconfigurationException(
                f"{here.trick.name} and {self.name} both read the losses of each sample. Use one of them."
            )
        patch(trainer.strategy, "training_step", _Step(trainer, self))

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the step back."""
        super().undo(trainer, pl_module)
        step = trainer.strategy.__dict__.get("training_step")
        if isinstance(step, _Step) and step.trick is self:
            unpatch(trainer.strategy, "training_step", step.original)


class _Step:
    """Stands in for ``strategy.training_step``."""

    def __init__(self, trainer: Trainer, trick: LossTrick) -> None:
        self.trainer, self.trick = trainer, trick
        self.original = trainer.strategy.training_step
        self.has_seen = self.has_warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer, trick = self.trainer, self.trick
        if not trainer.training or not trick.is_active(trainer):
            return self.original(*args, **kwargs)
        seen = SampleLosses(trick.samples_in_step(trainer), trick.weights_in_step(trainer))
        with seen:
            output = self.original(*args, **kwargs)
        if seen.losses is not None:
            self.has_seen = True
            trick.take_losses(trainer, seen.losses)
        elif output is not None or not trainer.lightning_module.automatic_optimization:
            self._miss(seen)
        return output

    def _miss(self, seen: SampleLosses) -> None:
        step = f"{type(self.trainer.lightning_module).__name__}.training_step"
        wanted = f"no loss of torch's with one value for each of the batch's {seen.samples} samples"
        if not self.has_seen:
            raise MisconfigurationException(
                f"{self.trick.name} reads the loss of each sample, but in the first batch it found {wanted} in {step}. "
                "End the step with `lightning_speedups.mean_over_samples(losses)`, where `losses` are yours, "
                "(N, ...), instead of their mean."
            )
        if seen.weights is not None and not self.has_warned:
            self.has_warned = True
            rank_zero_warn(
                f"{self.trick.name} found {wanted} in {step}: this batch counts as it would in a full epoch."
            )
