"""How long a run is, in batches, steps and epochs, from what its Trainer was given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RunLength:
    """What a run's length follows from.

    Attributes:
        max_epochs: Epochs after which it ends; None for no such limit.
        max_steps: Optimizer steps after which it ends; None for no such limit.
        batches_in: Batches of an epoch, counted from 0; gives None where the loader does not say.
        accumulation: How many batches make one optimizer step in an epoch.
        epoch: The epoch under way, or the next one between two.
        before: Optimizer steps that were done before it, as it turned out; epochs that are over may have been longer or
            shorter than the loader says now.

    Example:
        >>> run = RunLength(3, None, lambda epoch: 10, lambda epoch: 4)
        >>> run.batches, run.steps, run.steps_in_epochs(1.5)
        (30, 9, 4)
        >>> RunLength(3, None, lambda epoch: 10, lambda epoch: 4, epoch=1, before=1).steps
        7
    """

    max_epochs: int | None
    max_steps: int | None
    batches_in: Callable[[int], int | None]
    accumulation: Callable[[int], int]
    epoch: int = 0
    before: int = 0

    def steps_in_epochs(self, epochs: float) -> int | None:
        """Return the optimizer steps in the run's first epochs, or None where the loader does not know its length.

        Args:
            epochs: How many; a part of an epoch counts in proportion.
        """
        if epochs == 0:
            return 0
        if self.batches_in(0) is None:
            return None
        past = self._told(0, self.epoch)
        over = past if epochs >= self.epoch else self._told(0, epochs)
        return round(over * (self.before / past if past else 1) + self._told(self.epoch, epochs))

    def _told(self, begin: int, end: float) -> float:
        """Return the steps from one epoch to another by what the loader says now."""
        return sum(self.steps_in(epoch) * min(1.0, end - epoch) for epoch in range(begin, math.ceil(end)))

    def steps_in(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch by what the loader says now; 0 where it does not know."""
        return math.ceil((self.batches_in(epoch) or 0) / self.accumulation(epoch))

    @property
    def steps(self) -> int | None:
        """The optimizer steps of the whole run, or None when it is open-ended."""
        left = self.steps_left()
        return None if left is None else self.before + left

    @property
    def told(self) -> int | None:
        """The same if all epochs were as the loader says now, also those that are over."""
        return replace(self, epoch=0, before=0).steps

    def steps_left(self, share: float = 1.0) -> int | None:
        """Return the optimizer steps from the present epoch's start on, or None when the run is open-ended.

        Args:
            share: How many of its steps an epoch really has.

        Example:
            >>> RunLength(3, None, lambda epoch: 10, lambda epoch: 1, epoch=1, before=4).steps_left(0.4)
            8
        """
        limits = []
        if self.max_epochs == 0 or (self.max_epochs is not None and self.batches_in(0) is not None):
            limits.append(round(self._told(self.epoch, self.max_epochs) * share))
        if self.max_steps is not None:
            limits.append(self.max_steps - self.before)
        return min(limits, default=None)

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
                steps_left -= self.steps_in(epoch)
            total += batches
        return total
