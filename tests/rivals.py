"""Modules with schedulers of their own, whose place a trick takes, and the same modules without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from zoo import Classifier


def timms(optimizer: Any) -> Any:
    from timm.scheduler import CosineLRScheduler  # here, since it takes a second

    return CosineLRScheduler(optimizer, t_initial=3, warmup_t=2, warmup_lr_init=1e-5)


def stepwise(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda optimizer: ([optimizer], [{"scheduler": make(optimizer), "interval": "step"}])


def on_plateau(monitor: str) -> Callable[[Any], Any]:
    return lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, factor=0.1, patience=0), "monitor": monitor},
    }


RIVALS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: ([optimizer], [StepLR(optimizer, 1)]),
    "OneCycleLR": stepwise(lambda optimizer: OneCycleLR(optimizer, 0.7, total_steps=5)),  # too few for the run
    "LambdaLR from 0": stepwise(lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 4))),
    "CosineAnnealingWarmRestarts": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": CosineAnnealingWarmRestarts(optimizer, 2),
    },
    "ReduceLROnPlateau": on_plateau("train_loss"),
    "ReduceLROnPlateau without its metric": on_plateau("nobody logs this"),
    "CyclicLR": stepwise(lambda optimizer: CyclicLR(optimizer, 0.01, 0.3, 2, base_momentum=0.5, max_momentum=0.7)),
    "SequentialLR": stepwise(
        lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer, 0.1), StepLR(optimizer, 1)], [2])
    ),
    "ChainedScheduler": stepwise(
        lambda optimizer: ChainedScheduler([LinearLR(optimizer, 0.1), ExponentialLR(optimizer, 0.5)])
    ),
    "two of them": lambda optimizer: (
        [optimizer],
        [StepLR(optimizer, 1), on_plateau("none")(optimizer)["lr_scheduler"]],
    ),
    "timm's": lambda optimizer: ([optimizer], [timms(optimizer)]),
}
"""By name, what `configure_optimizers` returns."""


class Rival(Classifier):
    """A module with schedulers of its own; steps them by `lr_scheduler_step`, as timm's want it."""

    def __init__(self, rival: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rival = rival

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["lr"] = 0.06  # between the two, and not what the optimizer was made with
        return RIVALS[self.rival](optimizer) if self.rival else optimizer

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if hasattr(scheduler, "step_update"):
            scheduler.step(epoch=self.current_epoch + 1)
        else:
            super().lr_scheduler_step(scheduler, metric)


class ByHand(Classifier):
    """Steps a scheduler of its own in a hook, and tells nobody of it (UvA's transformer tutorial)."""

    where, told = "training_step", False

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.own = OneCycleLR(optimizer, 0.7, total_steps=200)
        return (
            ([optimizer], [{"scheduler": self.own, "interval": "step", "frequency": 1000}]) if self.told else optimizer
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.where == "training_step":
            self.own.step()
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.where == "optimizer_step":
            self.own.step()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.where == "lr_schedulers":
            self.lr_schedulers().step()


class ByHandTold(ByHand):
    """Steps the scheduler that Lightning has, too."""

    where, told = "lr_schedulers", True


class ByHandAtTheStep(ByHand):
    """Steps it after the optimizer."""

    where = "optimizer_step"
