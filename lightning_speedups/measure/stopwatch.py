"""Measures a fit from outside: training seconds without evaluation, and what every epoch brought."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_speedups.attach.packages import Callback


@dataclass(frozen=True)
class Point:
    """What was measured at the end of one epoch.

    Attributes:
        epoch: Epochs trained so far, from 1.
        seconds: Training seconds so far, without evaluation.
        samples: Samples trained on so far; of texts tokens.
        accuracy: Test accuracy, a fraction.
        test_loss: Cross-entropy on the test images.
        train_loss: Mean training loss of the epoch, as the arm defines it.
    """

    epoch: int
    seconds: float
    samples: int
    accuracy: float
    test_loss: float
    train_loss: float


class Stopwatch(Callback):
    """Measures a fit from outside: training seconds without evaluation, and a `Point` after every epoch.

    It runs from the start of training to its end, hooks of every callback and the Trainer's own work included, and
    stands still during validation. It must come first in the Trainer's list of callbacks, so that it starts before
    and stops after the hooks of the others.

    Args:
        on_batch: Called after every training batch with the number of its labels: of its samples, or of texts tokens.
        on_point: Called with every new point, while the clock stands still.
        clock: Seconds from an arbitrary start.
    """

    def __init__(
        self,
        on_batch: Callable[[int], object] = lambda samples: None,
        on_point: Callable[[Point], object] = lambda point: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.points: list[Point] = []
        self._on_batch, self._on_point, self._clock = on_batch, on_point, clock
        self._seconds, self._started = 0.0, math.nan
        self._samples = 0
        self._losses: list[Tensor] = []

    def _now(self, trainer: Trainer) -> float:
        """The clock's seconds, once the device has done all that it was given."""
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize(trainer.strategy.root_device)
        return self._clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = self._now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the labels; the loss stays on the device."""
        samples = batch[1].numel()
        self._samples += samples
        self._losses.append(outputs["loss"].detach())
        self._on_batch(samples)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds += self._now(trainer) - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was measured, and start the clock again."""
        metrics = trainer.callback_metrics
        point = Point(
            epoch=trainer.current_epoch + 1,
            seconds=self._seconds,
            samples=self._samples,
            accuracy=round(float(metrics["test_accuracy"]), 6),  # 0.9 in float32 is below 0.9
            test_loss=float(metrics["test_loss"]),
            train_loss=float(torch.stack(self._losses).mean()),
        )
        self._losses.clear()
        self.points.append(point)
        self._on_point(point)
        self._started = self._now(trainer)
