"""Cyclic learning rates with inverse momentum (Smith, arXiv:1506.01186)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.durations import Duration, RunFacts
from lightning_speedups.core.schedules import triangle
from lightning_speedups.tricks.rates.base import Leaders, OnResume, Rates, ScheduleTrick, entry, rate_of

Mode = Literal["triangular", "triangular2", "exp_range"]


def amplitude(mode: Mode, cycle: int, position: float, gamma: float) -> float:
    """Return how high a cycle reaches, as a fraction of the first one.

    Args:
        mode: ``"triangular"``: 1; ``"triangular2"``: ``0.5 ** cycle``; ``"exp_range"``: ``gamma ** position``.
        cycle: How many cycles have ended.
        position: Steps since the start.
        gamma: Decay in each step, in (0, 1].

    Example:
        >>> amplitude("triangular2", 2, 50.0, 1.0), round(amplitude("exp_range", 2, 50.0, 0.99), 3)
        (0.25, 0.605)
    """
    if mode == "triangular2":
        return 0.5**cycle
    return float(gamma**position) if mode == "exp_range" else 1.0


@dataclass
class StepSizes(Leaders):
    """What belongs to a run: the lengths of rise and fall, in steps."""

    sizes: tuple[float, float] = (1.0, 1.0)


class CyclicMomentum(ScheduleTrick):
    """Swings the learning rate between two values again and again, and momentum inversely.

    The values of each step are those of ``torch.optim.lr_scheduler.CyclicLR``, but they count real optimizer steps (one
    that GradScaler skips moves nothing), and a step size can be a part of the run, so that it ends with a whole cycle.
    Parameter groups that appear later keep the ratio of their rate to that of the first group.

    In manual optimization (as of a GAN) step sizes in epochs or fractions of the run count batches, whatever is done in
    these; with both in steps, or with ``total_steps``, each optimizer goes by its own steps.

    When not to use it: together with another scheduler (it refuses, unless ``replace=True``); for one run of known
    length, where ``OneCycleMomentum`` or ``LRCurve`` end at a far lower rate.

    Args:
        base_lr: The lowest rate, above 0: one number, or one for each parameter group.
        max_lr: The highest rate, above 0: one number, or one for each parameter group.
        step_size_up: Length of the rise: a whole number of optimizer steps, a float in (0, 1] as a fraction of the run,
            or a text like ``"2 epochs"``. None: an eighth of the run, which makes four cycles.
        step_size_down: Length of the fall, in the same ways. None: that of the rise.
        mode: ``"triangular"``: each cycle as high as the first; ``"triangular2"``: half as high as the one before;
            ``"exp_range"``: lower by ``gamma`` in each step.
        gamma: Decay of ``"exp_range"`` in each step, in (0, 1].
        base_momentum: Momentum at the highest rate, in [0, 1).
        max_momentum: Momentum at the lowest rate, in [0, 1).
        cycle_momentum: Move ``momentum`` (or ``betas[0]``) as well.
        total_steps: Length of the run in optimizer steps, 1 or more, for step sizes that are fractions of it. None:
            from the Trainer.
        optimizer: Index of the optimizer to drive; None: all of them.
        on_resume: When a resumed run has another length and step sizes are fractions of it, ``"stretch"`` the cycles
            over the new total, or ``"extend"`` them: go on from where they stood and end with the new total.
        replace: Take the place of the module's own schedulers of the rate, which then rest, also where the module steps
            them by hand; rates start from what the optimizer held before them. Without it they are refused.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if a length is needed and unknown, if there is another owner of the
            learning rate, if rates do not fit the parameter groups, or if the optimizer has no momentum to cycle.

    Source:
        Smith, arXiv:1506.01186.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CyclicMomentum(base_lr=0.02, max_lr=0.2, step_size_up="2 epochs")])
    """

    run_as = StepSizes
    run: StepSizes
    way_without: ClassVar[Mapping[str, str]] = {"momentum": "Use `cycle_momentum=False`."}

    def __init__(
        self,
        base_lr: Rates,
        max_lr: Rates,
        step_size_up: int | float | str | None = None,
        step_size_down: int | float | str | None = None,
        mode: Mode = "triangular",
        gamma: float = 1.0,
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
        cycle_momentum: bool = True,
        total_steps: int | None = None,
        optimizer: int | None = None,
        on_resume: OnResume = "stretch",
        replace: bool = False,
    ) -> None:
        super().__init__(total_steps, optimizer, on_resume, replace, base_lr=base_lr, max_lr=max_lr)
        check_choice("mode", mode, get_args(Mode))
        check_number("gamma", gamma, 0, 1, above=True)
        check_number("base_momentum", base_momentum, 0, 1, below=True)
        check_number("max_momentum", max_momentum, 0, 1, below=True)
        self.up = Duration.parse("step_size_up", 0.125 if step_size_up is None else step_size_up)
        self.down = self.up if step_size_down is None else Duration.parse("step_size_down", step_size_down)
        for name, size in (("step_size_up", self.up), ("step_size_down", self.down)):
            if not size.amount:
                raise ValueError(f"Expected `{name}` to be above 0, but got {size.amount} {size.unit}.")
        self.base_lr, self.max_lr, self.mode, self.gamma = base_lr, max_lr, mode, gamma
        self.base_momentum, self.max_momentum, self.cycle_momentum = base_momentum, max_momentum, cycle_momentum
        self.keys = ("lr", "momentum") if cycle_momentum else ("lr",)

    @property
    def needs_length(self) -> bool:
        """Whether a step size is a fraction of the run."""
        return "fraction" in (self.up.unit, self.down.unit)

    @property
    def goes_by_batches(self) -> bool:
        """Whether it goes by batches in manual optimization: unless step sizes are in steps."""
        return not self.total_steps and {self.up.unit, self.down.unit} != {"steps"}

    def plan(self, run: RunFacts) -> None:
        """Settle the step sizes."""
        super().plan(run)
        whole = self.length if self.needs_length else None
        up, down = self._steps_of_parts(run, whole, step_size_up=self.up, step_size_down=self.down)
        if not up or not down:
            sizes = f"{self.up.amount:g} {self.up.unit} up and {self.down.amount:g} {self.down.unit} down"
            what = f"finds that step sizes of {sizes} are less than one optimizer step"
            raise self.refusal(what, "Give a longer `step_size_up`.")
        self.run.sizes = (up, down)
        if up + down < 2:
            rank_zero_warn(
                f"{self.name}: a cycle of {up + down:g} optimizer steps is too short to leave `base_lr`. Give a "
                "longer `step_size_up`."
            )

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set rate and momentum."""
        if not self.drives(optimizer):
            return {}
        position = self.position(optimizer, step) if self.needs_length else step
        height, cycle = triangle(position, *self.run.sizes)
        height *= amplitude(self.mode, cycle, position, self.gamma)
        base, high = rate_of(self.base_lr, group), rate_of(self.max_lr, group)
        rate = (base + (high - base) * height) * self._ratio(optimizer, group, values)
        momentum = self.max_momentum - (self.max_momentum - self.base_momentum) * height
        return {"lr": rate, **(entry(values, "momentum", momentum) if self.cycle_momentum else {})}
