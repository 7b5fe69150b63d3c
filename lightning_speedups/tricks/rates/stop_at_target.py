"""Ends a run when it is good enough, and says what that took: time to accuracy (DAWNBench, arXiv:1806.01427)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.run_length import facts, logger_step, steps_until_it_may_stop
from lightning_speedups.attach.steps import OptimizerTrick, Steps, ValueOrder
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch import count_by_loader
from lightning_speedups.core.counts import counted
from lightning_speedups.core.durations import Duration, RunFacts
from lightning_speedups.core.plateau import Mode, is_reached
from lightning_speedups.core.schedules import anneal_between


@dataclass(frozen=True)
class Reached:
    """What a target took.

    Attributes:
        value: The metric when it was reached.
        epochs: Epochs begun.
        steps: Real optimizer steps.
        samples: Training samples, over all processes; None if they could not be counted.
        seconds: Seconds since training began, validation included, breaks between resumed runs left out.
    """

    value: float
    epochs: int
    steps: int
    samples: int | None
    seconds: float


@dataclass
class Way(Steps):
    """What a checkpoint holds of the way to the target.

    Attributes:
        reached: What it took, as a dict; None as long as it is not reached.
        samples: Training samples so far; None if they cannot be counted.
        seconds: Seconds since training began, up to the clock's last look.
        last: For each optimizer: since which step it decays, and for how many.
        rates: Indices of optimizer and group, and where its rate stood then.
    """

    reached: dict[str, Any] | None = None
    samples: int | None = 0
    seconds: float = 0.0
    last: list[list[int]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)


@dataclass
class Watch:
    """What else belongs to a run.

    Attributes:
        clock: When the time was taken last; NaN before training.
        validates: Whether a validation is still to come that may log the metric.
    """

    clock: float = math.nan
    validates: bool = False


class StopAtTarget(OptimizerTrick):
    """Ends the run when a metric reaches its target, and reports seconds, steps and samples that it took.

    With ``finish="anneal"`` the learning rate first goes from where it stands to 0 in a short line, whatever schedule
    drove it, which mostly lifts the metric further; where the Trainer must go on (``min_epochs``, ``min_steps``), just
    before the run may end. The report is in ``reached``, in the log and, as ``target/seconds`` and so on, in the
    Trainer's loggers. For a metric that stops improving there is Lightning's ``EarlyStopping``.

    When not to use it: where the last bit of accuracy counts. A target on the test set is a choice made on the test
    set.

    Args:
        monitor: Name of a logged metric, looked at after each validation and each training epoch. What the module logs
            in its ``on_train_epoch_end`` comes too late for that.
        target: The value to reach; an infinite one never is.
        mode: ``"max"``: at least the target; ``"min"``: at most.
        finish: ``"now"``: end at once; ``"anneal"``: after a last decay of the learning rate.
        anneal: Length of that decay: a whole number of optimizer steps, a float in [0, 1] as a fraction of the
            steps done so far, or a text like ``"1 epoch"``; 0 ends the run at once. It ends with the run at the latest.

    Attributes:
        reached: Seconds, steps and samples that the target took; None as long as it is not reached.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: After the first epoch (that validates, if any does), if there is no such metric; at
            fit start, if ``anneal`` is in epochs and their length is unknown.

    Source:
        Coleman et al., DAWNBench, arXiv:1806.01427; decay from any point: Hägele et al., arXiv:2405.18392.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StopAtTarget("val_accuracy", 0.94, mode="max", finish="anneal")])
    """

    order = ValueOrder.FINAL
    saved_as, run_as = Way, Watch
    saved: Way
    run: Watch

    def __init__(
        self,
        monitor: str,
        target: float,
        mode: Mode,
        finish: Literal["now", "anneal"] = "now",
        anneal: int | float | str = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"Expected `monitor` to be the name of a metric, but got {monitor!r}.")
        if target not in (math.inf, -math.inf):  # never reached
            check_number("target", target)
        check_choice("mode", mode, get_args(Mode))
        check_choice("finish", finish, ("now", "anneal"))
        self.anneal = Duration.parse("anneal", anneal)
        self.monitor, self.target, self.mode = monitor, target, mode
        self.finish = finish if self.anneal.amount else "now"
        self.keys = ("lr",) if self.finish == "anneal" else ()

    @property
    def reached(self) -> Reached | None:
        """What the target took; None as long as it is not reached."""
        return None if self.saved.reached is None else Reached(**self.saved.reached)

    @property
    def state_key(self) -> str:
        """Distinct for each metric and target."""
        return self._generate_state_key(monitor=self.monitor, target=self.target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.run.clock = time.monotonic()
        self.run.validates = trainer.enable_validation
        self._stop_if_done(trainer)

    def plan(self, run: RunFacts) -> None:
        """Refuse a decay whose length nobody knows."""
        super().plan(run)
        if self.finish == "anneal":
            self._steps_of_parts(run, 1, anneal=self.anneal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the samples."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.saved.samples is not None and self.saved.reached is None:
            count = count_by_loader(trainer.train_dataloader, batch)
            self.saved.samples = None if count is None else self.saved.samples + count * trainer.world_size

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Decay the rate to 0 from where it stood when the target was reached."""
        since, steps = self.saved.last[optimizer] if self.saved.last else (0, 0)
        if not steps or step < since:  # a Trainer may have to go on, as for its `min_epochs`
            return {}
        begin = self._settle_begin(optimizer, group, float(values["lr"]))
        return {"lr": anneal_between(begin, 0.0, min(1.0, (step - since) / steps), "linear")}

    def _settle_begin(self, optimizer: int, group: int, rate: float) -> float:
        """Settle where a group's decay begins: at its rate in the first step, or in its own first one."""
        begins = {(i, g): begin for i, g, begin in self.saved.rates}
        if (optimizer, group) not in begins:
            self.saved.rates.append([optimizer, group, rate])
        return begins.get((optimizer, group), rate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run after the decay."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._take_time()
        self._stop_if_done(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)
            self.run.validates = False  # what validation logs is there from now on

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric; refuse one that is not there."""
        super().on_train_epoch_end(trainer, pl_module)
        self._look(trainer, pl_module)
        if not (self.saved.reached or self.run.validates or self.monitor in trainer.callback_metrics):
            what = f"finds that no such metric was logged in the first epoch, only {sorted(trainer.callback_metrics)}"
            way_out = f"Log it with `self.log({self.monitor!r}, ...)` before the epoch's end, or name one of these."
            raise self.refusal(what, way_out, monitor=self.monitor)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_time()
        value = trainer.callback_metrics.get(self.monitor, math.nan)
        # One rank's word is enough: a metric that is not synchronised differs between them, or is known to one alone.
        if self.saved.reached is None and trainer.strategy.reduce_boolean_decision(
            is_reached(value, self.target, self.mode), all=False
        ):
            epochs, steps = trainer.current_epoch + 1, max(self.steps_done, default=trainer.global_step)
            self._note(trainer, Reached(float(value), epochs, steps, self.saved.samples, self.saved.seconds))
        if self.saved.reached and len(self.saved.last) < len(self.steps_done):
            self._settle_end(trainer, pl_module)
        self._stop_if_done(trainer)

    def _settle_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle when each optimizer's decay begins, and how long it takes; not yet if nobody knows when it may end."""
        run = facts(trainer, pl_module)
        left = math.inf if run.steps is None else run.steps - trainer.global_step
        wait = 0 if self.finish == "now" else steps_until_it_may_stop(trainer)
        if wait is not None:
            self.saved.last = [self._decay(done, run, min(wait, left), left) for done in self.steps_done]

    def _note(self, trainer: Trainer, reached: Reached) -> None:
        self.saved.reached = asdict(reached)
        samples = "an unknown number of samples" if reached.samples is None else counted(reached.samples, "sample")
        rank_zero_info(
            f"{self.name}: {self.monitor} = {reached.value:g} (target {self.target:g}) after {reached.seconds:.1f} s, "
            f"{counted(reached.steps, 'optimizer step')}, {samples}."
        )
        report = {f"target/{name}": number for name, number in self.saved.reached.items() if number is not None}
        for logger in trainer.loggers:
            logger.log_metrics(report, step=logger_step(trainer))

    def _take_time(self) -> None:
        now = time.monotonic()
        self.saved.seconds, self.run.clock = self.saved.seconds + now - self.run.clock, now

    def _decay(self, done: int, run: RunFacts, wait: float, left: float) -> list[int]:
        """Return when an optimizer's decay begins, and how long it takes."""
        if self.finish == "now" or not done:  # an optimizer that does not step is not waited for
            return [done, 0]
        steps = min(max(1, round(self.anneal.in_steps(run, done) or 1)), max(0, left))
        return [int(done + max(0, wait - steps)), int(steps)]

    def _stop_if_done(self, trainer: Trainer) -> None:
        settled = len(self.saved.last) == len(self.steps_done)
        ends = zip(self.steps_done, self.saved.last, strict=False)
        if self.saved.reached and settled and all(done >= since + steps for done, (since, steps) in ends):
            trainer.should_stop = True
