"""What the benchmarks that train to an accuracy measure of a fit."""

from __future__ import annotations

import math
import time

import torch
from lightning.pytorch import Callback


class Clock(Callback):
    """Seconds of training without those of evaluation, and the accuracy of each evaluation; ends a run at a target."""

    def __init__(self, metric="accuracy", stop_at=math.inf, with_setup=False):
        self.metric, self.stop_at, self.with_setup = metric, stop_at, with_setup
        self.seconds, self.points, self.samples, self.since = 0.0, [], 0, 0.0

    def on_fit_start(self, trainer, *_):
        self.since = time.perf_counter()

    def on_train_start(self, trainer, *_):
        if not self.with_setup:
            self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, *_):
        self.samples += len(batch[1])

    def on_validation_start(self, trainer, *_):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.since

    def on_validation_end(self, trainer, *_):
        self.points.append((round(self.seconds, 3), round(float(trainer.callback_metrics[self.metric]), 6)))
        trainer.should_stop = trainer.should_stop or self.points[-1][1] >= self.stop_at
        self.since = time.perf_counter()
