"""A module's own schedulers, at rest while a trick stands in their place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip

if TYPE_CHECKING:
    from lightning_speedups.attach.steps import OptimizerTrick

Values = dict[str, Any]
"""Values of a parameter group."""
NEVER = 2**62
"""A scheduler's frequency, in epochs or batches."""


def drives_the_same(scheduler: Any, trick: OptimizerTrick, trainer: Trainer) -> bool:
    """Tell whether a scheduler of the module drives what a trick drives.

    Args:
        scheduler: Torch's or another one with an ``optimizer``, as Lightning wants it.
        trick: The trick.
        trainer: Its Trainer, with optimizers.
    """
    optimizers = enumerate(raw_optimizers(trainer))
    return "lr" in trick.keys and any(one is scheduler.optimizer and trick.drives(i) for i, one in optimizers)


@contextmanager
def noting_schedulers() -> Iterator[tuple[list[LRScheduler], dict[Optimizer, list[Values]]]]:
    """While it lasts, note torch's schedulers as they are made, and what stood in the groups before.

    Yields:
        The schedulers, also those inside of others; and for each optimizer, rate and momentum of its groups before the
        first scheduler, which may overwrite them for good.
    """
    made: list[LRScheduler] = []
    before: dict[Optimizer, list[Values]] = {}

    def noting(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def noted(self: LRScheduler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            groups = getattr(optimizer, "param_groups", ())
            own = [{key: group[key] for key in ("lr", "momentum", "betas") if key in group} for group in groups]
            before.setdefault(optimizer, copy.deepcopy(own))
            init(self, optimizer, *args, **kwargs)
            made.append(self)

        return noted

    # The others write before they call the first one's, or do not call it.
    inits = {kind: kind.__init__ for kind in (LRScheduler, CyclicLR, OneCycleLR, ReduceLROnPlateau)}
    try:
        for kind, init in inits.items():
            kind.__init__ = noting(init)  # type: ignore[method-assign]
        yield made, before
    finally:
        for kind, init in inits.items():
            kind.__init__ = init  # type: ignore[method-assign]


class SchedulersAtRest(Grip):
    """Keeps the module's own schedulers of what a trick drives at rest, and the groups as they were before them.

    The schedulers stay in the Trainer's list, where the module, monitors and checkpoints look for them, but nothing
    moves them: neither Lightning nor the module by hand. Groups from a checkpoint that was written without the trick
    start from their own values again, not from what schedulers had put there.

    Args:
        trick: Whose.
    """

    trick: OptimizerTrick

    def __init__(self, trick: OptimizerTrick) -> None:
        super().__init__(trick)
        self.resting: list[tuple[Any, int]] = []  # Lightning's configurations of them, and their frequency
        self.own: dict[Optimizer, list[Values]] = {}  # what the groups held before them
        self.stations: list[tuple[Station, Any]] = []  # and who stands there
        self.report = ""

    def join(self, trainer: Trainer) -> None:
        """Stand where schedulers are made, and where optimizers are loaded."""
        self._stand(trainer.strategy, "setup_optimizers", self, self.make)
        self._stand(trainer.strategy, "load_optimizer_state_dict", self, self.load)

    def _stand(self, owner: Any, method: str, who: Any, act: Callable[..., Any]) -> None:
        self.stations.append((Station.of(owner, method), who))
        self.stations[-1][0].join(who, act)

    def make(self, original: Callable[..., Any], trainer: Trainer) -> None:
        """Let optimizers and schedulers be made, and lay to rest those whose place the trick takes."""
        with noting_schedulers() as (made, before):
            original(trainer)
        configs = [one for one in trainer.lr_scheduler_configs if drives_the_same(one.scheduler, self.trick, trainer)]
        by_hand = [one for one in dict.fromkeys(made) if drives_the_same(one, self.trick, trainer)]
        self.resting = [(config, config.frequency) for config in configs]
        for config in configs:
            config.frequency = NEVER  # so that Lightning looks for no metric of theirs, either
        for scheduler in dict.fromkeys([*(config.scheduler for config in configs), *by_hand]):
            for method in ("step", "step_update", "load_state_dict", "state_dict"):
                if hasattr(scheduler, method):  # it stands there itself: copies of it hold nothing of the run
                    self._stand(scheduler, method, scheduler, _bare if method == "state_dict" else _nothing)
            known = [{"lr": group.get("initial_lr", group["lr"])} for group in scheduler.optimizer.param_groups]
            self.own[scheduler.optimizer] = before.get(scheduler.optimizer, known)
        named = [f"{type(config.scheduler).__name__} (interval {config.interval})" for config in configs]
        self.report = " and ".join(named or [f"{type(one).__name__} (stepped by the module)" for one in by_hand])
        if "momentum" not in self.trick.keys and any("max_momentum" in g for one in self.own for g in one.param_groups):
            self.report += "; the momentum that it cycles stays as the optimizer was given it"
        self.put_own()

    def load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Load the optimizers; put on their own values if the checkpoint was written without the trick."""
        original(*args, **kwargs)
        if not self.trick.resumed:
            self.put_own()

    @torch.no_grad()
    def put_own(self) -> None:
        """Give the groups what they held before the schedulers; one that came later is left alone."""
        for optimizer, values in self.own.items():
            for group, own in zip(optimizer.param_groups, values, strict=False):
                for key, value in own.items():
                    if isinstance(group.get(key), Tensor):  # groups may share it
                        group[key].copy_(torch.as_tensor(value))
                    else:
                        group[key] = value

    def leave(self, trainer: Trainer) -> None:
        """Wake the schedulers."""
        for station, who in self.stations:
            station.leave(who)
        for config, frequency in self.resting:
            config.frequency = frequency
        self.resting, self.own, self.stations = [], {}, []


def _nothing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    pass


def _bare(original: Callable[..., Any]) -> dict[str, Any]:
    """Return a scheduler's state, which is all that it holds, without the stations."""
    return {key: value for key, value in original().items() if not isinstance(value, Station)}
