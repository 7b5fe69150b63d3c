"""Freezes layers during ordinary training, one after the other from the input on (FreezeOut, arXiv:1706.04983)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.attach.run_length import BatchClock
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.counts import counted
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.modules.layers import Layer
from lightning_speedups.tricks.transfer.base import Backbone, Freezing, FreezingTrick


def freeze_times(layers: int, start: float, until: float, power: float = 1.0) -> tuple[float, ...]:
    """Return when each layer is frozen, as a fraction of the run, from the input on.

    ``t_i = (a + (b - a) * i / (layers - 1)) ** power`` with ``a ** power = start`` and ``b ** power = until``. A single
    layer is frozen at ``start``.

    Args:
        layers: How many layers are frozen.
        start: When the first one is.
        until: When the last one is.
        power: 1: in equal steps; 3: FreezeOut's cubic ones, which give later layers more of the run.

    Example:
        >>> freeze_times(3, 0.5, 1.0), [round(t, 3) for t in freeze_times(3, 0.125, 1.0, power=3)]
        ((0.5, 0.75, 1.0), [0.125, 0.422, 1.0])
    """
    first, last = start ** (1 / power), until ** (1 / power)
    return tuple((first + (last - first) * i / max(1, layers - 1)) ** power for i in range(layers))


def annealed(step: int, freeze_at: int) -> float:
    """Return the factor on a layer's rate: half a cosine from 1 down to 0, where the layer is frozen.

    Args:
        step: Optimizer steps done.
        freeze_at: Steps after which the layer is frozen, 1 or more.

    Example:
        >>> [round(annealed(step, 4), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / freeze_at)))


@dataclass
class FreezeTimes(Freezing):
    """What belongs to a run, by the layers' names.

    Attributes:
        times: When each is frozen, as a fraction of the run.
        freeze_at: The same in optimizer steps.
        optimizer_of: Index of the optimizer that has it; 0 of one that the user froze.
    """

    times: dict[str, float] = field(default_factory=dict)
    freeze_at: dict[str, int] = field(default_factory=dict)
    optimizer_of: dict[str, int] = field(default_factory=dict)


class FreezeProgressively(FreezingTrick):
    """Freezes the layers of a backbone during ordinary training, one after the other from the input on.

    The backward pass ends where the frozen layers begin, and their optimizer state is freed: a step becomes shorter
    towards the end of the run. Frozen layers keep weights and running statistics to the bit, whatever the optimizer
    does, and stand in eval mode: no dropout, no stochastic depth, but for recurrent layers. Parameters that they share
    with what trains longer are warned of. Each layer's rate comes
    down to 0 along a cosine until then, on top of whatever schedules give, in a parameter group of its own that exists
    from the start. Under DDP the module is re-wrapped at each freezing, so that frozen layers cost no communication and
    ranks stay equal. A run that is resumed with another length gets its times stretched over that: layers may train
    again. In manual optimization (as of a GAN) a step is a batch, whatever is done in it; with ``total_steps`` each
    layer goes by the steps of its own optimizer.

    When not to use it: where accuracy counts. Composer tried it and reports no evidence that it improves the trade of
    time for quality: about 5 % more throughput for 0.5 to 1 point of accuracy (ResNet-50 on ImageNet). Fewer epochs are
    the rival to compare with. FreezeOut's own larger savings cost accuracy too. Not under FSDP or model parallelism (it
    refuses).

    Args:
        backbone: Attribute path in the LightningModule, a list of paths, whose layers come in turn, a callable that
            takes it and returns one or several modules (a layer each), or None: the network in it without its head, as
            for FreezeBackboneFinetune. The rest is never frozen.
        start: When the first layer is frozen, as a fraction of the run, in (0, 1].
        until: When the last one is, from ``start`` to 1. At 1 that one is not frozen, but its rate still comes to 0.
        share: Share of the layers that are frozen at all, in [0, 1], rounded, at least one but for 0; the others train
            as ever.
        power: Spacing between them, above 0. 1: equal; 3: FreezeOut's cubic times, whose t₀ is ``start ** (1 / 3)``.
        anneal: Bring each layer's rate down to 0 until it is frozen. False if a schedule of yours has brought it down
            by then.
        scale_lr: Divide each layer's rate by its freezing time, so that it moves as far in all; FreezeOut's advice for
            cubic times. It needs ``anneal``.
        fold: Compute a frozen convolution and its frozen BatchNorm as one.
        total_steps: Length of the run in optimizer steps, 1 or more. None: from the Trainer.

    Raises:
        ValueError: If an argument is out of range, or two of them contradict each other.
        MisconfigurationException: At fit start, if there is no such backbone, the optimizer lacks its parameters,
            nothing would be left to train, the length of the run is unknown, or the strategy cannot follow.

    Source:
        Brock et al., FreezeOut, arXiv:1706.04983; ``start`` and ``share`` as in Composer's layer freezing. Freezing by
        how far a layer still moves (Egeria, arXiv:2201.06227) needs a reference model, and is not done here.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreezeProgressively("backbone", start=0.5)])
        >>> trainer = Trainer(callbacks=[FreezeProgressively(None, power=3, scale_lr=True)])  # FreezeOut's scaled cubic
    """

    run_as = FreezeTimes
    run: FreezeTimes

    def __init__(
        self,
        backbone: Backbone = "backbone",
        start: float = 0.5,
        until: float = 1.0,
        share: float = 1.0,
        power: float = 1.0,
        anneal: bool = True,
        scale_lr: bool = False,
        fold: bool = True,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(backbone, fold=fold)  # norms that train would keep the backward pass going through all layers
        check_number("start", start, 0, 1, above=True)
        check_number("until", until, start, 1)
        check_number("share", share, 0, 1)
        check_number("power", power, 0, above=True)
        if scale_lr and not anneal:
            raise ValueError(
                f"Expected `scale_lr` to go with `anneal=True`, but got anneal={anneal!r}: it makes up for what the "
                "cosine takes away."
            )
        check_number("total_steps", total_steps, 1, whole=True, optional=True)
        self.start, self.until, self.share, self.power = start, until, share, power
        self.anneal, self.scale_lr, self.total_steps = anneal, scale_lr, total_steps
        self.clock = BatchClock(self)
        self.grips = (*self.grips, self.clock)

    @property
    def goes_by_batches(self) -> bool:
        """Whether it goes by batches in manual optimization, where nobody knows the number of steps."""
        return not self.total_steps

    def step_now(self, optimizer: int) -> int:
        """Return at which step an optimizer's values are taken: its own, or in manual optimization the batch."""
        return self.clock.of_run if self.clock.runs else super().step_now(optimizer)

    def find_layers(self, pl_module: LightningModule) -> list[Layer]:
        """Return the layers that are frozen in the run; the others need no groups of their own."""
        layers = super().find_layers(pl_module)
        return layers[: max(self.share > 0, round(self.share * len(layers)))]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run at whose end nothing would train."""
        super().on_fit_start(trainer, pl_module)
        way_out = "`backbone` must not contain the head: name a part of the module, or give a lower `share`."
        self.require_training(pl_module, {layer.name for layer in self.layers}, "", way_out)

    def plan(self, run: RunFacts) -> None:
        """Settle when each layer is frozen."""
        super().plan(run)
        steps = self._steps_of_run(run, self.total_steps or run.batches)
        names = [layer.name for layer in self.layers]
        times = freeze_times(len(names), self.start, self.until, self.power)
        self.run.times = dict(zip(names, times, strict=True))
        self.run.freeze_at = {name: max(1, round(time * steps)) for name, time in self.run.times.items()}
        found = {layer.name: i for (i, _), layer in self.run.layer_of_group.items()}
        self.run.optimizer_of = dict.fromkeys(self.run.freeze_at, 0) | found
        if min(self.run.freeze_at.values(), default=0) >= steps:
            rank_zero_warn(
                f"{self.name}(start={self.start:g}) freezes no layer before the end of this run of {steps} optimizer "
                "steps. Give a lower `start`."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze what it is time for; the steps done are the same on all ranks."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        done, optimizer_of = [self.step_now(i) for i in range(len(self.steps_done))], self.run.optimizer_of
        due = [name for name, at in self.run.freeze_at.items() if done[optimizer_of[name]] >= at]
        if self.freeze_only(trainer, pl_module, due):
            unit = "batch" if self.clock.runs else "optimizer step"
            rank_zero_info(
                f"{self.name}: after {counted(done[optimizer_of[due[-1]]], unit)} {len(due)} of {len(self.layers)} "
                f"layers are frozen, up to {due[-1]!r}: {counted(self.frozen_parameters, 'parameter')}."
            )

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Bring a layer's rate down to where it is frozen."""
        layer = self.run.layer_of_group.get((optimizer, group))
        if layer is None:
            return {}
        freeze_at = self.run.freeze_at[layer.name]
        factor = annealed(step, freeze_at) if self.anneal else float(step < freeze_at)
        return {"lr": values["lr"] * (factor / self.run.times[layer.name] if self.scale_lr else factor)}
