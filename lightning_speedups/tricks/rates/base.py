"""Schedules: tricks that own a value of the parameter groups for a whole run, and know how long that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.run_length import BatchClock, raw_optimizers, run_length
from lightning_speedups.attach.schedulers import SchedulersAtRest, drives_the_same
from lightning_speedups.attach.steps import GIVE_STEPS, OptimizerTrick, Steps, ValueOrder, get_value
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.counts import counted
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.core.schedules import Course

Rates = float | list[float]
OnResume = Literal["stretch", "extend"]


def entry(group: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the entry of a parameter group that holds a value, with a new one.

    Args:
        group: The parameter group.
        key: The value's name; ``"momentum"`` is ``betas[0]`` in the Adam family.
        value: The new value.

    Example:
        >>> entry({"betas": (0.9, 0.999)}, "momentum", 0.85)
        {'betas': (0.85, 0.999)}
    """
    return {"betas": (value, *group["betas"][1:])} if key == "momentum" and "betas" in group else {key: value}


def rate_of(rates: Rates, group: int) -> float:
    """Return a group's rate; one that came later than the rates were given has the first one's.

    Example:
        >>> [rate_of([0.1, 0.4], group) for group in (0, 1, 2)], rate_of(0.3, 1)
        ([0.1, 0.4, 0.1], 0.3)
    """
    if isinstance(rates, (list, tuple)):
        return rates[group if group < len(rates) else 0]
    return rates


@dataclass
class Schedule(Steps):
    """What a checkpoint holds of a schedule.

    Attributes:
        courses: How each optimizer's steps go along the curve.
        groups: How many groups each optimizer had when the schedule began.
        told: Length of the run, in optimizer steps, as the Trainer told it when the courses were settled; 0 if an older
            version did that.
        outlook: The epoch after that which began last; steps that were done then, and those that there should be at the
            ends of both.
    """

    courses: list[Course] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    told: int = 0
    outlook: list[int] = field(default_factory=list)


@dataclass
class Leaders:
    """What else belongs to a run of a schedule.

    Attributes:
        leading: Rate of each optimizer's first group before the schedule; empty before training.
        own: What the first group of each optimizer has of itself, where a schedule's first value stands.
        warned: Whether the user knows that something else writes there.
        off_plan: Whether the user knows that the run is not as long as planned.
    """

    leading: list[float] = field(default_factory=list)
    own: dict[int, Any] = field(default_factory=dict)
    warned: bool = False
    off_plan: bool = False


class ScheduleTrick(OptimizerTrick):
    """A trick that sets a value of the parameter groups as a function of the step and of the run's length.

    A subclass says which values it owns (``keys``) and computes them at `position`. It saves where it stands, never the
    curve: a resumed run goes on exactly, and one of another length gets the curve stretched over the new total or, with
    ``on_resume="extend"``, goes on from where it stood and comes to the curve's end at the new total. So it does when
    epochs turn out to be longer or shorter than they were planned, with a warning.

    Args:
        total_steps: Length in optimizer steps, 1 or more; None: from the Trainer.
        optimizer: Index of the optimizer to drive; None: all of them.
        on_resume: What to do when a resumed run has another length.
        replace: Take the place of the module's own schedulers of the learning rate, instead of refusing them.
        **rates: Learning rates that the user gives, by the arguments' names: one above 0, or one for each parameter
            group.
    """

    order = ValueOrder.ABSOLUTE
    saved_as, run_as = Schedule, Leaders
    saved: Schedule
    run: Leaders

    ends_before: ClassVar[int] = 0
    """Steps between the curve's end and the end of the run: 1 if the last step stands at the end of the curve."""
    ways_out: ClassVar[str] = GIVE_STEPS
    """What to do when the length of the run is unknown."""

    def __init__(
        self,
        total_steps: int | None,
        optimizer: int | None,
        on_resume: OnResume,
        replace: bool = False,
        **rates: Rates,
    ) -> None:
        super().__init__()
        check_number("total_steps", total_steps, 1, whole=True, optional=True)
        check_number("optimizer", optimizer, 0, whole=True, optional=True)
        check_choice("on_resume", on_resume, ("stretch", "extend"))
        for name, given in rates.items():
            for rate in given if isinstance(given, (list, tuple)) and given else [given]:
                check_number(name, rate, 0, above=True)
        self.total_steps, self.optimizer, self.on_resume, self.rates = total_steps, optimizer, on_resume, rates
        self.at_rest = SchedulersAtRest(self) if replace else None
        self.clock = BatchClock(self)
        self.grips = (self.clock, *([self.at_rest] if self.at_rest else []))

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run matters."""
        return True

    @property
    def goes_by_batches(self) -> bool:
        """Whether it goes by batches in manual optimization, where nobody knows the number of steps."""
        return self.needs_length and not self.total_steps

    def step_now(self, optimizer: int) -> int:
        """Return at which step an optimizer's values are taken: its own, or in manual optimization the batch."""
        if not self.clock.runs:
            return super().step_now(optimizer)
        return self.clock.of_run if self.needs_length else self.clock.batches

    @property
    def length(self) -> float:
        """Length of the curve, in its own steps: that of the run when it began."""
        return self.saved.courses[0].length + self.ends_before

    @property
    def state_key(self) -> str:
        """Distinct for each optimizer, as Lightning wants of two callbacks of a class."""
        return self.name if self.optimizer is None else self._generate_state_key(optimizer=self.optimizer)

    def drives(self, optimizer: int) -> bool:
        """Tell whether it owns the values of an optimizer."""
        return self.optimizer in (None, optimizer)

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set for the next step; say so when something else writes there too."""
        if group == 0 and self.drives(optimizer) and not self.run.warned:
            own = get_value(values, self.keys[0])
            before = self.run.own.setdefault(optimizer, own)
            if own is not before and not isinstance(own, Tensor) and own != before:
                self.run.warned = True
                what = "learning rate" if self.keys[0] == "lr" else self.keys[0]
                helps = "lr" in self.keys and not self.at_rest
                way_out = " `replace=True` lays it to rest, if `configure_optimizers` made it" if helps else ""
                rank_zero_warn(
                    f"{self.name} is not alone: something else wrote the {what}, too, from {before:g} to {own:g} (a "
                    f"scheduler that the module steps itself?{way_out}). Values of its own override what was written, "
                    "factors multiply with it. Remove one of them (WarmupLRScaler may stay: it multiplies)."
                )
        return super().values_now(optimizer, group, values)

    def position(self, optimizer: int, step: int) -> float:
        """Return where the curve stands at a step of an optimizer, in the curve's own steps."""
        return self.saved.courses[optimizer].position(step)

    def _ratio(self, optimizer: int, group: int, values: Mapping[str, Any]) -> float:
        """Return the learning rate of a group that came later over the first group's; 1 for the others."""
        leading = self.run.leading[optimizer] if self.run.leading else 0.0
        return float(values["lr"]) / leading if leading and group >= self.saved.groups[optimizer] else 1.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another owner of the same values, and optimizers that lack them; say whose place it takes."""
        super().on_fit_start(trainer, pl_module)
        if others := list(self._other_owners(trainer)):
            mine = "learning rate" if "lr" in self.keys else " and ".join(self.keys)
            what = f"sets the {mine} of every step, and so does {' and '.join(others)}"
            way_out = "Remove one of them (WarmupLRScaler may stay: it multiplies)"
            replaced = others[0].startswith("the scheduler")
            raise self.refusal(what, way_out + (", or give `replace=True` to take its place." if replaced else "."))
        if self.at_rest and (report := self.at_rest.report):
            rank_zero_info(f"{self.name} takes the place of {report}.")

    def meet(self, trainer: Trainer) -> None:
        """Refuse optimizers that do not fit, and note what leads the groups that come later."""
        super().meet(trainer)
        self._settle_leading(trainer)

    def require_fit(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers that lack what it sets, or that its rates do not fit."""
        super().require_fit(optimizers)
        if self.optimizer is not None and self.optimizer >= len(optimizers):
            what = f"counts from 0, but this run has {counted(len(optimizers), 'optimizer')}"
            raise self.refusal(what, "Name one of these.", optimizer=self.optimizer)
        for i, optimizer in enumerate(optimizers):
            # Those that it began with; a resumed run may have more by now.
            count = self.saved.groups[i] if i < len(self.saved.groups) else len(optimizer.param_groups)
            for name, rates in self.rates.items():
                if self.drives(i) and isinstance(rates, (list, tuple)) and len(rates) != count:
                    has = f"{type(optimizer).__name__} has {counted(count, 'parameter group')}"
                    what = f"has {counted(len(rates), 'value')}, but {has}"
                    raise self.refusal(what, "Give one number, or one for each group.", **{name: rates})

    def _settle_leading(self, trainer: Trainer) -> None:
        first = [optimizer.param_groups[0].get("lr") for optimizer in raw_optimizers(trainer)]
        self.run.leading = [0.0 if rate is None else float(rate) for rate in first]
        self.run.own = {}

    def _other_owners(self, trainer: Trainer) -> Iterator[str]:
        for config in trainer.lr_scheduler_configs:
            if not self.at_rest and drives_the_same(config.scheduler, self, trainer):
                yield f"the scheduler {type(config.scheduler).__name__} from configure_optimizers"
        for callback in callbacks_of(trainer):
            if is_a(callback, "StochasticWeightAveraging") and "lr" in self.keys:
                yield "the callback StochasticWeightAveraging"
            if isinstance(callback, ScheduleTrick) and callback is not self and self.clashes(callback):
                yield f"the callback {callback.name}"

    def clashes(self, other: ScheduleTrick) -> bool:
        """Tell whether both own the same value of an optimizer."""
        same = self.optimizer == other.optimizer or None in (self.optimizer, other.optimizer)
        return same and bool(set(self.keys) & set(other.keys))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the groups that are there from the start, and settle the curve."""
        groups = [optimizer.param_groups for optimizer in raw_optimizers(trainer)]
        if len(self.saved.groups) != len(groups):
            self.saved.groups = [len(of_one) for of_one in groups]
        self._settle_leading(trainer)
        super().on_train_start(trainer, pl_module)

    def plan(self, run: RunFacts) -> None:
        """Settle the length of the curve; what stretched or extended it stands in a warning."""
        super().plan(run)
        if not self.needs_length:
            return
        total = self._steps_of_run(run, self.total_steps or run.batches, self.ways_out)
        told, end, courses = self.total_steps or run.told or total, total - self.ends_before, self.saved.courses
        if len(courses) != len(run.optimizers):
            courses = [Course(end, end)] * len(run.optimizers)
        elif (before := self.saved.told or self.planned) != told:
            self.saved.outlook = []  # of epochs of another length
            if self.on_resume == "extend":
                courses = [course.extended(self.step_now(i), end) for i, course in enumerate(courses)]
                how = "the curve goes on from where it stood and ends at the new total"
            else:
                courses = [Course(end, end)] * len(courses)
                how = "the curve is stretched over the new total"
            rank_zero_warn(
                f"{self.name}: the checkpoint's run had {counted(before, self._step)}, this one has {total}; {how}."
            )
        self.saved.courses, self.saved.told = courses, told

    @property
    def _step(self) -> str:
        """What its steps are, in messages."""
        return "batch" if self.clock.runs else "optimizer step"

    @property
    def planned(self) -> int:
        """Length of the run as it is planned, in optimizer steps."""
        return self.saved.courses[0].total + self.ends_before

    def _counted(self, trainer: Trainer) -> int:
        """Return the steps so far that the planned length is to be compared with: real ones, but where a GradScaler
        skips some, the Trainer's.
        """
        if self.clock.runs:
            return self.clock.of_run
        skips = str(trainer.precision_plugin.precision).startswith("16")
        return trainer.global_step if skips else self.steps_done[0]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the end of a run that turns out to be longer or shorter than it was planned."""
        super().on_train_epoch_start(trainer, pl_module)
        if not self._follows_run:
            return
        length, done = run_length(trainer), self._counted(trainer)
        following, began, *expected = self.saved.outlook or (0, done, done)
        end = done + length.steps_in(length.epoch)
        self.saved.outlook = [length.epoch + 1, done, end, end + length.steps_in(length.epoch + 1)]
        share = 1.0
        if following == length.epoch:
            if self.saved.outlook[1:3] == expected:
                return
            if began < min(done, expected[0]):  # the next ones are taken to come out as the last one did
                share = (done - began) / (expected[0] - began)
        left = length.steps_left(share)
        if left is None:  # a new loader that does not know its length
            return
        total, planned = done + max(1, left), self.planned
        if total != planned:
            self.saved.told = length.told or self.saved.told
            courses = enumerate(self.saved.courses)
            self.saved.courses = [
                course.extended(self.step_now(i), course.total + total - planned) for i, course in courses
            ]
            self._warn(
                f"the run was planned with {counted(planned, self._step)}, but {done} are done before epoch "
                f"{length.epoch} and some {total - done} are to come; from here on the curve goes to its end at step "
                f"{total}"
            )

    @property
    def _follows_run(self) -> bool:
        """Whether its end is the run's. In manual optimization `max_steps` ends that as soon as all optimizers'
        steps make them, and the clock goes by it.
        """
        return self.needs_length and not self.total_steps and not (self.clock.runs and self.clock.has_max_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the curve did not end with the run, and nobody stopped it."""
        super().on_train_end(trainer, pl_module)
        if not self._follows_run or trainer.should_stop:
            return
        if (steps := self._counted(trainer)) != self.planned:
            self._warn(
                f"the run was planned with {counted(self.planned, self._step)} and ended after {steps}, so that the "
                "curve did not end with it"
            )

    def _warn(self, what: str) -> None:
        if not self.run.off_plan:
            rank_zero_warn(f"{self.name}: {what}. Give the true number as `total_steps=` if it is known.")
        self.run.off_plan = True

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold, of the courses their fields."""
        return {**super().state_dict(), "courses": [list(astuple(course)) for course in self.saved.courses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on along the checkpoint's courses."""
        super().load_state_dict(state_dict)
        self.saved.courses = [Course(*course) for course in state_dict["courses"]]
