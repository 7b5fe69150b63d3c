"""Says so when the optimizer itself takes a large part of the first steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip, Trick

LARGE = 1 / 3
WATCHED = 5
"""Steps that are timed, after the first one, which warms up."""


class StepShare(Grip):
    """Times the first steps on a CPU, and says so once if the optimizer takes more than a third of them.

    On other devices no time is known without waiting for them, and nothing is said.

    Args:
        trick: Who brings the optimizer.
        way_out: What the user can do, as sentences.
    """

    def __init__(self, trick: Trick, way_out: str) -> None:
        super().__init__(trick)
        self.way_out = way_out
        self.steps, self.computing, self.optimizing = 0, 0.0, 0.0

    def join(self, trainer: Trainer) -> None:
        """Stand around the first steps."""
        self.steps, self.computing, self.optimizing = 0, 0.0, 0.0
        if trainer.strategy.root_device.type == "cpu":
            # Further in than who may leave steps out.
            Station.of(trainer.strategy, "optimizer_step").join(self, partial(self.step, trainer), order=-1)

    def leave(self, trainer: Trainer) -> None:
        """Stand there no more."""
        Station.of(trainer.strategy, "optimizer_step").leave(self)

    def step(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        optimizer: Any,
        closure: Callable[[], Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Step, and look at the clock before and after, and around the closure that computes the gradients.

        Batches that are gathered for a step count as much as the one in it.
        """
        computing = 0.0

        def timed() -> Any:
            nonlocal computing
            begun = time.perf_counter()
            result = closure()
            computing += time.perf_counter() - begun
            return result

        begun = time.perf_counter()
        result = original(optimizer, timed, *args, **kwargs)
        if self.steps > 0:
            self.optimizing += time.perf_counter() - begun - computing
            self.computing += computing * trainer.accumulate_grad_batches
        self.steps += 1
        if self.steps > WATCHED:
            self.leave(trainer)
            self.say()
        return result

    def say(self) -> None:
        """Say so if the part is large."""
        share = self.optimizing / (self.optimizing + self.computing or 1.0)
        if share > LARGE:
            rank_zero_info(f"{self.trick.name}: the optimizer took {share:.0%} of the first steps. {self.way_out}")
