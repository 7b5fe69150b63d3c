"""The one-cycle policy with inverse momentum (Smith & Topin, arXiv:1708.07120; Smith, arXiv:1803.09820)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.range_test import run_range_test
from lightning_speedups.core.range_test import Sweep
from lightning_speedups.core.schedules import Anneal, OneCycle
from lightning_speedups.tricks.rates.base import OnResume, Rates, Schedule, ScheduleTrick, entry, rate_of

curve = lru_cache(maxsize=8)(OneCycle.at)  # parameter groups ask for the same point


@dataclass
class FoundPeak(Schedule):
    """What a checkpoint holds: where the cycle stands, and the peak that a range test found."""

    found_lr: float | None = None


class OneCycleMomentum(ScheduleTrick):
    """One cycle over the whole run: the learning rate goes low → high → far below low, momentum high → low → high.

    The values of each step are those of ``torch.optim.lr_scheduler.OneCycleLR``, but they count real optimizer steps
    (one that GradScaler skips moves nothing), stay at the end instead of climbing again, and a resumed run may have
    another length: the curve is stretched over the new total or extended, with a warning. Parameter groups that appear
    later keep the ratio of their rate to that of the first group.

    In manual optimization (as of a GAN), where nobody knows how many steps there will be, a step of the cycle is a
    batch, whatever is done in it; with ``total_steps`` each optimizer goes by its own steps.

    When not to use it: together with another scheduler (it refuses, unless ``replace=True``), or for open-ended
    runs. The peak must fit: too high a ``max_lr`` diverges.

    Args:
        max_lr: The peak, above 0: one number, one for each parameter group, or ``"auto"``: found before the first step
            by a range test on a copy of the model (see ``LRRangeTest``), the same on every rank, and between two and
            ten times the rate that ``configure_optimizers`` gives, if that is no placeholder. The other callbacks do
            not take part in it.
        total_steps: Length in optimizer steps, 1 or more. None: the length of the run, from the Trainer.
        pct_start: Fraction of the run in which the rate rises, in (0, 1); at most 0.5 with ``three_phase``.
        anneal: ``"cos"`` or ``"linear"``.
        div_factor: ``max_lr`` over the first rate, above 0.
        final_div_factor: First rate over the last, above 0.
        base_momentum: Momentum at the peak, in [0, 1).
        max_momentum: Momentum at both ends, in [0, 1).
        three_phase: Return to the first rate before the final fall.
        cycle_momentum: Move ``momentum`` (or ``betas[0]``) as well.
        optimizer: Index of the optimizer to drive; None: all of them.
        on_resume: When a resumed run has another length, ``"stretch"`` the curve over the new total, or ``"extend"``
            it: go on from where it stood and end at the new total.
        range_test: Settings of the range test for ``max_lr="auto"``, the arguments of ``LRRangeTest``.
        replace: Take the place of the module's own schedulers of the rate, which then rest, also where the module steps
            them by hand; rates start from what the optimizer held before them. Without it they are refused.

    Attributes:
        found_lr: The peak that the range test found, for ``max_lr="auto"``; None before it.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the run's length is unknown, if there is another owner of the
            learning rate, if ``max_lr`` does not fit the parameter groups, if the optimizer has no momentum to cycle,
            or if the range test cannot be run or finds nothing.

    Source:
        Smith & Topin, arXiv:1708.07120; Smith, arXiv:1803.09820.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[OneCycleMomentum(max_lr=0.4)], max_epochs=10)
    """

    saved_as = FoundPeak
    saved: FoundPeak
    ends_before: ClassVar[int] = 1
    way_without: ClassVar[Mapping[str, str]] = {"momentum": "Use `cycle_momentum=False`."}

    def __init__(
        self,
        max_lr: Rates | Literal["auto"],
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal: Anneal = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        three_phase: bool = False,
        cycle_momentum: bool = True,
        optimizer: int | None = None,
        on_resume: OnResume = "stretch",
        range_test: dict[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        super().__init__(total_steps, optimizer, on_resume, replace, **({} if max_lr == "auto" else {"max_lr": max_lr}))
        self.cycle = OneCycle(pct_start, anneal, div_factor, final_div_factor, base_momentum, max_momentum, three_phase)
        self.max_lr, self.cycle_momentum = max_lr, cycle_momentum
        self.keys = ("lr", "momentum") if cycle_momentum else ("lr",)
        try:
            self.sweep = Sweep(**(range_test or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected `range_test` to hold arguments of LRRangeTest, but got {range_test}: {error}"
            ) from error

    @property
    def found_lr(self) -> float | None:
        """The peak that the range test found, for ``max_lr="auto"``; None before it."""
        return self.saved.found_lr

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak, if that was asked for, and settle the length of the cycle."""
        super().on_train_start(trainer, pl_module)
        if self.max_lr == "auto" and self.saved.found_lr is None:
            rates, losses, own = run_range_test(trainer, pl_module, self.sweep, trainer.train_dataloader)
            _, self.saved.found_lr = self.sweep.read(rates, losses, own)
            given = " and ".join(f"{rate:.3g}" for rate in dict.fromkeys(own))
            found = f"max_lr={self.saved.found_lr:.3g}; the module's own rate is {given}"
            rank_zero_info(f"{self.name}: the range test suggests {found}.")

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set rate and momentum."""
        if not self.drives(optimizer):
            return {}
        ratio = self._ratio(optimizer, group, values)
        rates = self.saved.found_lr if self.max_lr == "auto" else self.max_lr
        assert rates is not None
        lr, momentum = curve(self.cycle, self.position(optimizer, step), self.length, rate_of(rates, group) * ratio)
        return {"lr": lr, **(entry(values, "momentum", momentum) if self.cycle_momentum else {})}
