"""The loss of each sample of a batch, from a ``training_step`` that returns their mean.

``strategy.training_step`` runs under a mode of torch's that sees the losses it computes; under DDP the step runs inside
the wrapper's forward, in the same thread, so that nothing is different there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.packages import MisconfigurationException
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip
from lightning_speedups.core.counts import counted
from lightning_speedups.tensors.sample_losses import SampleLosses


class ReadsLosses(Protocol):
    """A trick that reads, and may weigh, the loss of each sample of a training batch."""

    @property
    def name(self) -> str:
        """The trick's name in messages."""

    def is_active(self, trainer: Trainer) -> bool:
        """Tell whether the Trainer runs this trick."""

    def samples_in_step(self, trainer: Trainer) -> int:
        """Return how many samples the batch of this step has."""

    def weights_in_step(self, trainer: Trainer) -> Tensor | None:
        """Return what each sample of the batch counts, ``(N,)``, on the module's device; None where all count 1."""

    def take_losses(self, trainer: Trainer, losses: Tensor) -> None:
        """Note the losses of a batch, ``(N,)``, float32, detached, on their device."""


class LossGrip(Grip):
    """A trick's hold on the training step.

    Args:
        trick: Whose.
    """

    trick: ReadsLosses  # type: ignore[assignment]

    def join(self, trainer: Trainer) -> None:
        """Stand around the training step."""
        station = Station.of(trainer.strategy, "training_step")
        if other := station.find(LossGrip):
            raise MisconfigurationException(
                f"{other.trick.name} and {self.trick.name} both read the losses of each sample. Use one of them."
            )
        self.has_seen = self.has_warned = False
        station.join(self, partial(self.see, trainer))

    def leave(self, trainer: Trainer) -> None:
        """Give the step back."""
        Station.of(trainer.strategy, "training_step").leave(self)

    def see(self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step, and take the losses that it computes."""
        trick = self.trick
        if not trainer.training or not trick.is_active(trainer):
            return step(*args, **kwargs)
        seen = SampleLosses(trick.samples_in_step(trainer), trick.weights_in_step(trainer), args)
        with seen:
            output = step(*args, **kwargs)
        if seen.losses is not None:
            self.has_seen = True
            trick.take_losses(trainer, seen.losses)
        elif output is not None or not trainer.lightning_module.automatic_optimization:
            self._miss(f"{type(trainer.lightning_module).__name__}.training_step", seen)
        return output

    def _miss(self, step: str, seen: SampleLosses) -> None:
        wanted = f"no loss of torch's with one value for each of the batch's {counted(seen.samples, 'sample')}"
        if not self.has_seen:
            raise MisconfigurationException(
                f"{self.trick.name} reads the loss of each sample, but in the first batch it found {wanted} in {step}. "
                "Give torch's loss the samples first and nothing flattened, scores (N, C, ...), targets (N, ...), or "
                "end the step with `lightning_speedups.mean_over_samples(losses)`, where `losses` are yours, (N, ...)."
            )
        if seen.weights is not None and not self.has_warned:
            self.has_warned = True
            rank_zero_warn(
                f"{self.trick.name} found {wanted} in {step}: this batch counts as it would in a full epoch."
            )
