"""Parts of a run in the unit that the user thinks in, and the facts of the run that turn them into steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from lightning_speedups.core.arguments import check_number, plain

Unit = Literal["steps", "epochs", "fraction"]
TEXT = re.compile(r"\s*(?:(?P<steps>\d+)\s*steps?|(?P<epochs>[\d.]+)\s*epochs?|(?P<fraction>[\d.]+)\s*%)\s*")


@dataclass(frozen=True)
class RunFacts:
    """What a schedule can know of a run before its first step.

    Attributes:
        steps: Optimizer steps of the whole run; None when it is open-ended.
        steps_in_epochs: Optimizer steps in the run's first so many epochs; gives None when an epoch has no length.
        batch_size: Samples behind one optimizer step, over all processes; None when unknown.
        optimizers: Class names of the optimizers.
        told: Optimizer steps of the whole run if all epochs are as the loader says now, also those that are over; None
            when it is open-ended.
        batches: Batches of the whole run where it optimizes manually, so that nobody knows the steps: these take their
            place, in ``steps_in_epochs`` and ``told`` as well. None elsewhere, and when it is open-ended.
    """

    steps: int | None
    steps_in_epochs: Callable[[float], int | None]
    batch_size: int | None = None
    optimizers: tuple[str, ...] = ("SGD",)
    told: int | None = None
    batches: int | None = None


@dataclass(frozen=True)
class Duration:
    """A part of a run.

    Attributes:
        amount: How much, 0 or more.
        unit: Of what: optimizer steps, epochs, or the whole run.
    """

    amount: float
    unit: Unit

    @staticmethod
    def parse(name: str, value: Any) -> Duration:
        """Read what a user gave.

        Args:
            name: The argument's name.
            value: A whole number of optimizer steps, a float in [0, 1] as a fraction of the run, or one of
                ``"500 steps"``, ``"2.5 epochs"`` and ``"10%"``.

        Raises:
            ValueError: If it is none of these.

        Example:
            >>> Duration.parse("warmup", 500)
            Duration(amount=500, unit='steps')
            >>> Duration.parse("warmup", "2.5 epochs"), Duration.parse("warmup", 0.1) == Duration.parse("warmup", "10%")
            (Duration(amount=2.5, unit='epochs'), True)
        """
        if isinstance(value, Duration):
            return value
        value = plain(given := value)
        amount, unit = value, "fraction" if isinstance(value, float) else "steps"
        try:
            if isinstance(value, str) and (match := TEXT.fullmatch(value)):
                unit = str(match.lastgroup)
                amount = int(match[unit]) if unit == "steps" else float(match[unit])
                amount = amount / 100 if unit == "fraction" else amount
            check_number(name, amount, 0, 1 if unit == "fraction" else math.inf, whole=unit == "steps")
        except ValueError as error:
            raise ValueError(
                f"Expected `{name}` to be a whole number of optimizer steps, a float in [0, 1] as a fraction of the "
                f"run, or a text like '500 steps', '5 epochs' or '10%', but got {given!r}."
            ) from error
        return Duration(int(amount) if unit == "steps" else amount, cast(Unit, unit))

    def in_steps(self, run: RunFacts, total: float | None = None) -> float | None:
        """Return the length in optimizer steps, or None when the run does not say enough.

        Args:
            run: The run.
            total: Steps of which a fraction is taken, instead of the run's own.

        Example:
            >>> run = RunFacts(steps=200, steps_in_epochs=lambda epochs: round(20 * epochs))
            >>> [Duration(*given).in_steps(run) for given in ((7, "steps"), (1.5, "epochs"), (0.1, "fraction"))]
            [7, 30, 20.0]
        """
        if self.unit == "steps" or self.amount == 0:
            return self.amount
        if self.unit == "epochs":
            return run.steps_in_epochs(self.amount)
        total = run.steps if total is None else total
        return None if total is None else self.amount * total
