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
        >>> replace(run, epoch=1, before=1).steps
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
        whole = sum(self.steps_in(epoch) for epoch in range(begin, math.floor(end)))
        rest = max(0.0, end - max(begin, math.floor(end)))
        return whole + (rest and self.steps_in(math.floor(end)) * rest)

    def steps_in(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch by what the loader says now; 0 where it does not know."""
        return math.ceil((self.batches_in(epoch) or 0) / self.accumulation(epoch))

    @property
    def steps(self) -> int | None:
        """The optimizer steps of the whole run, or None when it is open-ended."""
        by_epochs = None if self.max_epochs is None else self.steps_in_epochs(self.max_epochs)
        return min((limit for limit in (by_epochs, self.max_steps) if limit is not None), default=None)

    def steps_left(self, share: float = 1.0) -> int | None:
        """Return the optimizer steps from the epoch on that begins, or None when the run is open-ended.

        Args:
            share: How many of its steps an epoch really has.

        Example:
            >>> RunLength(3, None, lambda epoch: 10, lambda epoch: 1, epoch=1, before=4).steps_left(0.4)
            8
        """
        limit, steps = self.max_steps, replace(self, max_steps=None).steps
        by_epochs = None if steps is None else round((steps - self.before) * share)
        by_steps = None if limit is None else limit - self.before
        return min((left for left in (by_epochs, by_steps) if left is not None), default=None)

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


@dataclass(frozen=True)
class Outlook:
    """What is known of a run's steps when an epoch begins.

    Attributes:
        epoch: The epoch.
        counted: Steps so far, by the Trainer's count.
        done: Steps that the optimizer has really done.
        steps: Those of this epoch by what the loader says; 0 where it does not know.
        following: Those of the next epoch.
    """

    epoch: int
    counted: int
    done: int
    steps: int
    following: int

    def holds(self, later: Outlook) -> bool:
        """Tell whether the epoch came as it was expected.

        Args:
            later: The next epoch's.

        Example:
            >>> first = Outlook(0, 0, 0, 4, 4)
            >>> first.holds(Outlook(1, 4, 4, 4, 4)), first.holds(Outlook(1, 3, 3, 4, 4))
            (True, False)
        """
        expected = (self.epoch + 1, self.counted + self.steps, self.done + self.steps, self.following)
        return expected == (later.epoch, later.counted, later.done, later.steps)

    def shares(self, later: Outlook) -> tuple[float, float]:
        """Return which share of its steps an epoch had, and which share of these were real ones; 1 where that says
        nothing.

        Args:
            later: The next epoch's.

        Example:
            >>> Outlook(0, 0, 0, 10, 10).shares(Outlook(1, 5, 2, 10, 10))
            (0.5, 0.4)
        """
        counted, done = later.counted - self.counted, later.done - self.done
        if later.epoch != self.epoch + 1 or not counted:
            return 1.0, 1.0
        return (counted / self.steps if self.steps else 1.0), (done / counted if done else 1.0)
