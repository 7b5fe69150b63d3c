"""How long a run is, in batches, steps and epochs, from what its Trainer was given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RunLength:
    """What a run's length follows from.

    Attributes:
        max_epochs: Epochs after which it ends; None for no such limit.
        max_steps: Optimizer steps after which it ends; None for no such limit.
        batches_in: Batches of an epoch, counted from 0; gives None where the loader does not say.
        accumulation: How many batches make one optimizer step in an epoch.

    Example:
        >>> run = RunLength(3, None, lambda epoch: 10, lambda epoch: 4)
        >>> run.batches, run.steps, run.steps_in_epochs(1.5)
        (30, 9, 4)
    """

    max_epochs: int | None
    max_steps: int | None
    batches_in: Callable[[int], int | None]
    accumulation: Callable[[int], int]

    def steps_in_epochs(self, epochs: float) -> int | None:
        """Return the optimizer steps in the run's first epochs, or None where the loader does not know its length.

        Args:
            epochs: How many; a part of an epoch counts in proportion.
        """
        if epochs == 0:
            return 0
        if self.batches_in(0) is None:
            return None
        parts = ((self._steps_in(epoch), min(1.0, epochs - epoch)) for epoch in range(math.ceil(epochs)))
        return round(sum(steps * part for steps, part in parts))

    def _steps_in(self, epoch: int) -> int:
        return math.ceil((self.batches_in(epoch) or 0) / self.accumulation(epoch))

    @property
    def steps(self) -> int | None:
        """The optimizer steps of the whole run, or None when it is open-ended."""
        by_epochs = None if self.max_epochs is None else self.steps_in_epochs(self.max_epochs)
        return min((limit for limit in (by_epochs, self.max_steps) if limit is not None), default=None)

    @property
    def batches(self) -> int | None:
        """The batches of the whole run, or None when it is open-ended."""
        first, steps_left = self.batches_in(0), self.max_steps
        if first is None:
            return None if steps_left is None else steps_left * self.accumulation(0)
        if self.max_epochs is None and (steps_left is None or first == 0):
            return None
        total = 0
        for epoch in itertools.count() if self.max_epochs is None else range(self.max_epochs):
            batches, size = self.batches_in(epoch) or 0, self.accumulation(epoch)
            if steps_left is not None:
                if steps_left * size <= batches:
                    return total + steps_left * size
                steps_left -= self._steps_in(epoch)
            total += batches
        return total
