"""Learning-rate scaling with batch size, and warm-up (Goyal et al., arXiv:1706.02677; √k for Adam: Malladi et al.,
arXiv:2205.10287).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.attach.run_length import BatchClock, facts
from lightning_speedups.attach.steps import OptimizerTrick, ValueOrder
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch_scaling import Rule, scaling_factor
from lightning_speedups.core.counts import counted
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.core.schedules import ramp


@dataclass
class Ramp:
    """What belongs to a run.

    Attributes:
        steps: Length of the ramp.
        full: The factor of each optimizer after it.
    """

    steps: int = 0
    full: list[float] = field(default_factory=list)


class WarmupLRScaler(OptimizerTrick):
    """Multiplies the learning rate by k = effective batch / base batch, and ramps it up over the first epochs.

    The factor multiplies whatever the user's schedulers (or ``OneCycleMomentum``) give at each step: theirs go on as
    they are, see only their own values, and so do checkpoints. It ramps per real optimizer step, keeps the ratios
    between parameter groups, and takes each optimizer by itself. The effective batch is batch size × processes ×
    accumulation. In manual optimization (as of a GAN) a ramp in epochs goes by batches, whatever is done in these.

    When not to use it: with a learning rate tuned for this very batch size, or beyond a batch of about 8,000, where the
    linear rule ends.

    Args:
        base_batch_size: Batch size for which the learning rate was tuned (256 in the paper), in samples. None: warm up
            only.
        rule: ``"linear"``, ``"sqrt"``, or ``"auto"``: the root for the Adam family, else linear.
        warmup_epochs: Length of the ramp in epochs, 0 or more; parts of an epoch are allowed.
        warmup_steps: Length of the ramp in optimizer steps, instead of ``warmup_epochs``.
        start_factor: Factor on the learning rate at the first step, above 0. None: 1, the unscaled rate, as in the
            paper; 0.01 where it only warms up.
        scale: The factor after the ramp, instead of the one computed from batch sizes.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the batch size or the length of an epoch is needed and unknown.

    Source:
        Goyal et al., arXiv:1706.02677; Malladi et al., arXiv:2205.10287.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WarmupLRScaler(base_batch_size=256)])
    """

    order = ValueOrder.FACTOR
    run_as = Ramp
    run: Ramp

    def __init__(
        self,
        base_batch_size: int | None = None,
        rule: Rule = "auto",
        warmup_epochs: float = 5.0,
        warmup_steps: int | None = None,
        start_factor: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_number("base_batch_size", base_batch_size, 1, whole=True, optional=True)
        check_choice("rule", rule, get_args(Rule))
        check_number("warmup_epochs", warmup_epochs, 0)
        check_number("warmup_steps", warmup_steps, 0, whole=True, optional=True)
        check_number("start_factor", start_factor, 0, above=True, optional=True)
        check_number("scale", scale, 0, above=True, optional=True)
        self.base_batch_size, self.rule = base_batch_size, rule
        self.warmup_epochs, self.warmup_steps = warmup_epochs, warmup_steps
        own = 0.01 if scale is None and base_batch_size is None else 1.0
        self.start_factor, self.scale = own if start_factor is None else start_factor, scale
        self.clock = BatchClock(self)
        self.grips = (self.clock,)

    @property
    def goes_by_batches(self) -> bool:
        """Whether it goes by batches in manual optimization: where the ramp is in epochs."""
        return self.warmup_steps is None

    def step_now(self, optimizer: int) -> int:
        """Return at which step an optimizer's values are taken: its own, or in manual optimization the batch."""
        return self.clock.batches if self.clock.runs else super().step_now(optimizer)

    def plan(self, run: RunFacts) -> None:
        """Settle the factors and the length of the ramp."""
        super().plan(run)
        steps = self.warmup_steps if self.warmup_steps is not None else run.steps_in_epochs(self.warmup_epochs)
        if steps is None:
            what = "needs the length of an epoch, but this training data has none"
            raise self.refusal(what, "Give `warmup_steps` instead.", warmup_epochs=self.warmup_epochs)
        self.run.steps = steps
        self.run.full = [self.scale or 1.0] * len(run.optimizers)
        if self.scale is None and self.base_batch_size is not None:
            if run.batch_size is None:
                what = "needs the batch size, which only a single training DataLoader with a `batch_size` tells"
                way_out = "Give `scale=`, the effective batch size over the base batch size."
                raise self.refusal(what, way_out, base_batch_size=self.base_batch_size)
            ratio = run.batch_size / self.base_batch_size
            self.run.full = [scaling_factor(ratio, self.rule, name) for name in run.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what comes."""
        super().on_train_start(trainer, pl_module)
        run, steps, scaled = facts(trainer, pl_module), self.run.steps, self.base_batch_size and not self.scale
        size = f" (effective batch {run.batch_size}, base {self.base_batch_size})" if scaled else ""
        factors = ", ".join(f"× {self.start_factor:g} → × {full:g}" for full in self.run.full)
        unit, total = ("batch", run.batches) if self.clock.runs else ("optimizer step", run.steps)
        rank_zero_info(f"{self.name}: learning rate {factors}{size} over the first {counted(steps, unit)}.")
        if total is not None and steps > total and any(full != self.start_factor for full in self.run.full):
            rank_zero_warn(
                f"{self.name}: the ramp takes {counted(steps, unit)}, but the run has {total} and "
                "never reaches the full rate. Give a shorter `warmup_epochs` or `warmup_steps`."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow an accumulation that changes between epochs."""
        super().on_train_epoch_start(trainer, pl_module)
        self.plan(facts(trainer, pl_module))

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Multiply the rate."""
        full = self.run.full[optimizer]
        return {"lr": values["lr"] * ramp(step, self.run.steps, self.start_factor, full)}
