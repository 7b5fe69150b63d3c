"""Values on the optimizers' parameter groups for the time of a step, and a count of the steps that really happened.
 Lightning has no hook after ``optimizer.step``, counts a step that GradScaler skipped, and lets schedulers and
checkpoints read whatever stands in the groups. So a trick's values are put on before the step and taken off before
anyone could build on them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.trick import Trick, callbacks_of, patch, raw_optimizers, unpatch


class Order(IntEnum):
    """Which values come first: absolute ones, then the factors on them."""

    ABSOLUTE = 10
    FACTOR = 20


class OptimizerTrick(Trick):
    """A trick that sets values of parameter groups (``lr``, ``momentum``, …) step by step.

    A subclass says when (``order``) and what (``group_values``). ``steps_done`` counts the real steps of each
    optimizer, over resumes.
    """

    order: Order

    def __init__(self) -> None:
        super().__init__()
        self.steps_done: list[int] = []
        self._resumed = False
        self._handles: list[Any] = []

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set on a parameter group for the next step.

        Args:
            optimizer: The optimizer's index.
            group: The parameter group's index in it.
            step: Steps that this optimizer has really done.
            values: The group as schedulers and earlier tricks left it.
        """
        raise NotImplementedError

    def splits_groups(self, pl_module: LightningModule) -> Callable[[Tensor], bool] | None:
        """Return a test for parameters that need groups of their own, asked before ``configure_optimizers``; None for
        no need.
        """
        return None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the driver that stands before each step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.steps_done, self._resumed = [], False
        driver = _driver(trainer) or _Driver(trainer)
        if self not in driver.tricks:
            driver.tricks = sorted([*driver.tricks, self], key=lambda trick: trick.order)
        # A monitor reads the groups in the hooks in which they are set, so it comes later (Lightning keeps checkpoints
        # last).
        rank = {LearningRateMonitor: 1, Checkpoint: 2}
        trainer.callbacks = sorted(  # type: ignore[attr-defined]
            callbacks_of(trainer), key=lambda c: next((r for kind, r in rank.items() if isinstance(c, kind)), 0)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        optimizers = raw_optimizers(trainer)
        if not self._resumed or len(self.steps_done) != len(optimizers):
            # A checkpoint made without this trick: Lightning's own count, which takes all optimizers together.
            self.steps_done = [trainer.global_step // max(len(optimizers), 1)] * len(optimizers)
        for i, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(partial(self._count, trainer, i)))

    def _count(self, trainer: Trainer, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers are called by GradScaler also when they must skip; they carry the verdict while they are.
        skipped = getattr(optimizer, "found_inf", None)
        if self.is_active(trainer) and not (skipped is not None and bool(skipped)):
            self.steps_done[i] += 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the values, for monitors."""
        self._show(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the values, for monitors and training_step."""
        self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values off before a checkpoint or a callback builds on them."""
        if driver := _driver(trainer):
            driver.hide()

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In manual optimization a scheduler may be stepped before the next optimizer step: there only the step sees the
        # values.
        if (driver := _driver(trainer)) and pl_module.automatic_optimization:
            driver.show()

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the values off and leave the driver; the last one removes it."""
        super().undo(trainer, pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        driver = _driver(trainer)
        if driver and self in driver.tricks:
            driver.hide()
            driver.tricks.remove(self)
            if not driver.tricks:
                driver.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the counted steps."""
        return {"steps_done": list(self.steps_done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.steps_done = [int(steps) for steps in state_dict["steps_done"]]
        self._resumed = True


class _Driver:
    """Stands in for four methods of one Trainer: the optimizers' making, the step, and two readers that must not see a
    trick's values.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.tricks: list[OptimizerTrick] = []
        self.shown: list[tuple[dict[str, Any], str, Any, Any]] = []  # group, key, value before, value set
        self.originals: list[tuple[Any, str, Any]] = []
        for owner, name, stand_in in (
            (trainer.strategy, "setup_optimizers", self.make),
            (trainer.strategy, "optimizer_step", self.step),
            (trainer.strategy, "optimizer_state", self.hidden),
            (trainer.fit_loop.epoch_loop, "update_lr_schedulers", self.hidden),
        ):
            original = getattr(owner, name)
            self.originals.append((owner, name, original))
            patch(owner, name, _StandIn(self, partial(stand_in, original)))

    def remove(self) -> None:
        for owner, name, original in self.originals:
            unpatch(owner, name, original)

    def make(self, original: Callable[..., Any], trainer: Trainer) -> None:
        with ExitStack() as splits:
            splitting = []
            for trick in self.tricks:
                if belongs := trick.splits_groups(trainer.lightning_module):
                    splits.enter_context(split_groups(belongs))
                    splitting.append(trick.name)
            try:
                original(trainer)
            except Exception as error:
                if splitting:
                    error.add_note(f"{', '.join(splitting)} split the parameter groups; the new ones come last.")
                raise

    def step(self, original: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        torchs = getattr(optimizer, "_optimizer", optimizer)
        if not self.stands(torchs):
            self.hide()
            self.show(torchs)
        try:
            return original(optimizer, *args, **kwargs)
        finally:
            self.hide()

    def stands(self, optimizer: Optimizer) -> bool:
        """Tell whether the values shown are still on all groups of an optimizer."""
        on = {id(group) for group, *_ in self.shown}
        return all(id(group) in on for group in optimizer.param_groups) and all(
            _equals(group[key], value) for group, key, _, value in self.shown
        )

    def hidden(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.hide()
        return original(*args, **kwargs)

    def show(self, only: Optimizer | None = None) -> None:
        """Put the tricks' values on the groups."""
        if self.shown:
            return
        tricks = [trick for trick in self.tricks if trick.is_active(self.trainer)]
        for i, optimizer in enumerate(raw_optimizers(self.trainer)):
            if only is not None and optimizer is not only:
                continue
            for g, group in enumerate(optimizer.param_groups):
                values: dict[str, Any] = {}
                for trick in tricks:
                    if len(trick.steps_done) > i:  # else it has not started yet
                        values |= trick.group_values(i, g, trick.steps_done[i], ChainMap(values, group))
                for key, value in values.items():
                    before = group[key].clone() if isinstance(group[key], Tensor) else group[key]
                    _set(group, key, value)
                    self.shown.append((group, key, before, value))

    def hide(self) -> None:
        """Give the groups their own values back, except where someone else has written meanwhile."""
        for group, key, before, value in self.shown:
            if _equals(group[key], value):
                _set(group, key, before)
        self.shown = []


class _StandIn:
    """A patched method that can be recognised as ours."""

    def __init__(self, driver: _Driver, function: Callable[..., Any]) -> None:
        self.driver, self.function = driver, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _driver(trainer: Trainer) -> _Driver | None:
    stand_in = trainer.strategy.__dict__.get("optimizer_step")
    return stand_in.driver if isinstance(stand_in, _StandIn) else None


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].copy_(torch.as_tensor(value))  # in place: a compiled or captured step holds this very tensor
    else:
        group[key] = value


def _equals(current: Any, value: Any) -> bool:
    if isinstance(current, Tensor):
        return bool(current == torch.as_tensor(value, dtype=current.dtype, device=current.device))
    return bool(current == value)


@contextmanager
def split_groups(belongs: Callable[[Tensor], bool]) -> Iterator[None]:
    """While it lasts, optimizers are built with the parameters that belong together in groups of their own.

    Schedulers that are made in the meantime so see the groups from the start.

    Groups keep their places: what is split off comes last.

    Args:
        belongs: Says of a parameter whether it is split off from its group.
    """
    init, add = Optimizer.__init__, Optimizer.add_param_group
    split_off: dict[int, list[dict[str, Any]]] = {}

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        split_off[id(self)] = []
        init(self, *args, **kwargs)
        for group in split_off.pop(id(self)):
            add(self, group)

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        parts: tuple[list[Any], list[Any]] = ([], [])
        for parameter in params:
            parts[belongs(parameter[1] if isinstance(parameter, tuple) else parameter)].append(parameter)
        kept, split = ({**param_group, "params": part} for part in parts)
        if not (parts[0] and parts[1]):
            add(self, {**param_group, "params": params})
        else:
            add(self, kept)
            if id(self) in split_off:
                split_off[id(self)].append(split)
            else:
                add(self, split)

    Optimizer.__init__, Optimizer.add_param_group = __init__, add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__, Optimizer.add_param_group = init, add  # type: ignore[method-assign]
