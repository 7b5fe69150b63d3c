"""One curve for a whole run: cosine and its restarts (arXiv:1608.03983), warm-up – stable – decay (arXiv:2405.18392),
slow start and fast decay (arXiv:2012.13628), and the field's other schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.steps import get_value
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.durations import Duration, RunFacts
from lightning_speedups.core.schedules import Shape, anneal_between, join, pick_shape, with_ends
from lightning_speedups.tricks.rates.base import Leaders, OnResume, Schedule, ScheduleTrick, entry


@dataclass
class Cooling(Schedule):
    """What a checkpoint holds.

    Attributes:
        cooling: For each optimizer: since which step it cools down, for how many, and from which factor.
        stop: Whether the run ends with that.
    """

    cooling: list[tuple[int, int, float]] = field(default_factory=list)
    stop: bool = False


@dataclass
class Pieces(Leaders):
    """What else belongs to a run.

    Attributes:
        pieces: The curve.
        elapsed: Part of the run's time that is over.
    """

    pieces: list[tuple[float, Shape]] = field(default_factory=list)
    elapsed: float = 0.0


class LRCurve(ScheduleTrick):
    """One curve over the whole run for the learning rate, or for momentum, weight decay or any other group value.

    The curve is a factor on the value that the optimizer was given: each parameter group follows it from its own value,
    also one that appears later. It comes to its end after the last step, so that no step is wasted at a rate of 0; with
    the same arguments its values are those of torch's schedulers. It counts real optimizer steps (one that GradScaler
    skips moves nothing). Several curves, for several values or optimizers, run side by side.

    In manual optimization (as of a GAN), where nobody knows how many steps there will be, a step of the curve is a
    batch, whatever is done in it; with ``total_steps`` each optimizer goes by its own steps.

    When not to use it: together with a scheduler of the learning rate (it refuses, unless ``replace=True``). For the
    shortest runs ``OneCycleMomentum`` moves momentum as well.

    Args:
        shape: ``"cosine"``, ``"linear"``, ``"step"``, ``"polynomial"``, ``"exponential"``, ``"trapezoid"`` (warm-up,
            stable, decay), ``"slow_start_fast_decay"`` or ``"cosine_restarts"``; or your own function of progress in
            [0, 1] that returns a factor of 0 or more.
        warmup: Length of a linear warm-up before the shape: a whole number of optimizer steps, a float in [0, 1] as a
            fraction of the run, or a text like ``"5 epochs"``. None: 0, for the trapezoid 0.05.
        cooldown: Length of a linear fall after the shape, in the same ways; not after a shape that ends at 0. None: 0,
            for the trapezoid 0.2.
        end_factor: Factor at the end of the shape, 0 or more. None: the shape's own: 0, or 0.01 where it falls
            exponentially. Not for the trapezoid, the step and your own.
        warmup_factor: Factor at the first step of a warm-up, 0 or more.
        cooldown_factor: Factor at the end of a cooldown, 0 or more.
        key: The value to drive: ``"lr"``, ``"momentum"`` (``betas[0]`` in the Adam family), ``"weight_decay"``, or any
            other number in the parameter groups.
        options: More arguments of a named shape: ``power`` (polynomial), ``milestones`` as fractions and ``gamma``
            (step), ``start`` and ``rise`` (slow start, fast decay), ``cycles`` and ``growth`` (cosine restarts).
        over: ``"steps"``, or ``"time"``: progress is the elapsed part of ``Trainer(max_time=...)``, the same on every
            rank (one small broadcast a batch).
        total_steps: Length in optimizer steps, 1 or more. None: the length of the run, from the Trainer.
        optimizer: Index of the optimizer to drive; None: all of them.
        on_resume: When a resumed run has another length, ``"stretch"`` the curve over the new total, or ``"extend"``
            it: go on from where it stood and end at the new total. A trapezoid with warm-up and cooldown in steps that
            is stretched on its plateau stays there.
        replace: Take the place of the module's own schedulers of the rate, which then rest, also where the module steps
            them by hand; rates start from what the optimizer held before them. Without it they are refused.

    Methods:
        cool_down: Begins the last decay now and ends the run after it.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the run's length is unknown, if warm-up and cooldown are longer than
            the run, if there is another owner of the value, or if the optimizer has no such value.

    Source:
        Loshchilov & Hutter, arXiv:1608.03983; Hägele et al., arXiv:2405.18392; Jeddi et al., arXiv:2012.13628.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LRCurve("cosine", warmup="1 epoch"), LRCurve("linear", key="weight_decay")])
    """

    saved_as, run_as = Cooling, Pieces
    saved: Cooling
    run: Pieces
    ways_out: ClassVar[str] = (
        "Give `total_steps=`, in optimizer steps, or `Trainer(max_steps=...)`, or `over='time'` with "
        "`Trainer(max_time=...)`."
    )

    def __init__(
        self,
        shape: str | Callable[[float], float] = "cosine",
        warmup: int | float | str | None = None,
        cooldown: int | float | str | None = None,
        end_factor: float | None = None,
        warmup_factor: float = 0.01,
        cooldown_factor: float = 0.0,
        key: str = "lr",
        options: dict[str, Any] | None = None,
        over: Literal["steps", "time"] = "steps",
        total_steps: int | None = None,
        optimizer: int | None = None,
        on_resume: OnResume = "stretch",
        replace: bool = False,
    ) -> None:
        super().__init__(total_steps, optimizer, on_resume, replace)
        check_number("end_factor", end_factor, 0, optional=True)
        check_number("warmup_factor", warmup_factor, 0)
        check_number("cooldown_factor", cooldown_factor, 0)
        if not isinstance(key, str) or not key or key in ("params", "betas"):
            raise ValueError(f"Expected `key` to be the name of a number in the parameter groups, but got {key!r}.")
        check_choice("over", over, ("steps", "time"))
        end = {} if end_factor is None else {"end": end_factor}
        self.shape = pick_shape(shape, {**options, **end} if isinstance(options, dict) else options or end)
        own = (0.05, 0.2) if shape == "trapezoid" else (0, 0)
        self.warmup = Duration.parse("warmup", own[0] if warmup is None else warmup)
        self.cooldown = Duration.parse("cooldown", own[1] if cooldown is None else cooldown)
        parts = [part.amount for part in (self.warmup, self.cooldown) if part.unit == "fraction"]
        if sum(parts) > 1:
            raise ValueError(f"Expected `warmup` and `cooldown` to be at most the whole run, but got {parts}.")
        if over == "time" and any(part.amount and part.unit != "fraction" for part in (self.warmup, self.cooldown)):
            raise ValueError("Expected `warmup` and `cooldown` to be fractions of the run with `over='time'`.")
        if key == "lr" and self.cooldown.amount and self.shape(1.0) == 0 == cooldown_factor:
            raise ValueError(
                "Expected no `cooldown` after a `shape` that ends at 0, where it has nowhere to fall and its steps are "
                "lost. Give `end_factor` above 0, or leave it out."
            )
        self.warmup_factor, self.cooldown_factor = warmup_factor, cooldown_factor
        self.key, self.over, self.keys = key, over, (key,)

    @property
    def needs_length(self) -> bool:
        """Whether it goes by steps."""
        return self.over == "steps"

    @property
    def state_key(self) -> str:
        """Distinct for each value and optimizer."""
        return self._generate_state_key(key=self.key, optimizer=self.optimizer)

    def cool_down(self, steps: int, stop: bool = True) -> None:
        """Begin the cooldown now, wherever the curve stands: from the value of the next step, in so many steps.

        Call it while the run goes on, on every rank, from a callback or the module.

        Args:
            steps: Length in optimizer steps, 1 or more.
            stop: End the run with it.

        Raises:
            ValueError: If ``steps`` is out of range.
            MisconfigurationException: If no run is going on.
        """
        check_number("steps", steps, 1, whole=True)
        if not self.run.pieces:
            raise self.refusal("has no run: LRCurve.cool_down is for a run that is going on", "Call it from a hook.")
        here = [self.step_now(i) for i in range(len(self.steps_done))]
        self.saved.cooling = [(step, steps, self._factor(i, step)) for i, step in enumerate(here)]
        self.saved.stop = stop

    def plan(self, run: RunFacts) -> None:
        """Lay the pieces end to end."""
        super().plan(run)
        whole = self.length if self.needs_length else 1.0
        warmup, cooldown = self._steps_of_parts(run, whole, warmup=self.warmup, cooldown=self.cooldown)
        if warmup + cooldown > whole * (1 + 1e-9):  # fractions that add up to 1 may pass it by a rounding error
            if not self.resumed:
                parts = f"a warm-up of {warmup:g} and a cooldown of {cooldown:g} optimizer steps"
                what = f"finds that {parts} do not fit in a run of {whole:g}"
                raise self.refusal(what, "Give shorter ones, or fractions of the run.")
            # A resumed run that is too short for both: they share it.
            warmup, cooldown = (part * whole / (warmup + cooldown) for part in (warmup, cooldown))
        self.run.pieces = with_ends(self.shape, whole, warmup, self.warmup_factor, cooldown, self.cooldown_factor)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the curve, and find the clock that it may go by."""
        super().on_train_start(trainer, pl_module)
        self._stop_if_cooled(trainer)  # resumed from a checkpoint of the last step
        self._look_at_the_clock(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time, where the curve goes by it."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._look_at_the_clock(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run when a cooldown is over that should."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._stop_if_cooled(trainer)

    def _stop_if_cooled(self, trainer: Trainer) -> None:
        if self.saved.stop:
            cooling = enumerate(zip(self.steps_done, self.saved.cooling, strict=True))
            # An optimizer that has not stepped at all is not waited for.
            ends = [
                self.step_now(i) >= since + steps for i, (done, (since, steps, _)) in cooling if self.drives(i) and done
            ]
            if ends and all(ends):
                trainer.should_stop = True

    def _look_at_the_clock(self, trainer: Trainer) -> None:
        if self.over != "time":
            return
        timers: list[Any] = [callback for callback in callbacks_of(trainer) if is_a(callback, "Timer")]
        timer = next((timer for timer in timers if timer.time_remaining() is not None), None)
        if timer is None:
            raise self.refusal("needs the length of the run", "Give `Trainer(max_time=...)`.", over="time")
        gone, left = timer.time_elapsed(), timer.time_remaining()
        elapsed = min(1.0, gone / max(gone + left, 1e-9))
        self.run.elapsed = trainer.strategy.broadcast(elapsed) if trainer.world_size > 1 else elapsed

    def _factor(self, optimizer: int, step: int) -> float:
        if self.saved.cooling:
            since, steps, begin = self.saved.cooling[optimizer]
            return anneal_between(begin, self.cooldown_factor, min(1.0, (step - since) / steps), "linear")
        return join(self.position(optimizer, step) if self.over == "steps" else self.run.elapsed, self.run.pieces)

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Multiply the optimizer's own value."""
        if not self.drives(optimizer):
            return {}
        return entry(values, self.key, get_value(values, self.key) * self._factor(optimizer, step))
