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
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.trick import Trick, callbacks_of, facts, patch, raw_optimizers, unpatch
from lightning_speedups.core.durations import Run


class Order(IntEnum):
    """Which values come first: absolute ones, then the factors on them, then what ends a run whatever they say."""

    ABSOLUTE = 10
    FACTOR = 20
    FINAL = 30


class OptimizerTrick(Trick):
    """A trick that sets values of parameter groups (``lr``, ``momentum``, …) step by step.

    A subclass says when (``order``) and what (``group_values``). ``steps_done`` counts the real steps of each
    optimizer, over resumes.
    """

    order: Order

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """Forget the last run."""
        self.steps_done: list[int] = []
        self._resumed = False

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set on a parameter group for the next step.

        Args:
            optimizer: The optimizer's index.
            group: The parameter group's index in it.
            step: Steps that this optimizer has really done.
            values: The group as schedulers and earlier tricks left it.
        """
        raise NotImplementedError

    def plan(self, run: Run) -> None:
        """Settle what depends on the run's length or batch size, before the first step."""

    def splits_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None] | None:
        """Return what names the group of its own that a parameter needs, or gives None; asked before
        ``configure_optimizers``. None for no need at all.
        """
        return None

    def rests(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer has nothing to step, which GradScaler takes for a mistake."""
        return False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the driver that stands before each step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.forget()
        driver = _driver(trainer) or _Driver(trainer)
        if self not in driver.tricks:
            driver.tricks = sorted([*driver.tricks, self], key=lambda trick: trick.order)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count, and settle the plan."""
        optimizers = raw_optimizers(trainer)
        if not self._resumed or len(self.steps_done) != len(optimizers):
            # A checkpoint made without this trick: Lightning's own count, which takes all optimizers together.
            self.steps_done = [trainer.global_step // max(len(optimizers), 1)] * len(optimizers)
        self.plan(facts(trainer, pl_module))
        for i, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(partial(self._count, trainer, i)))
        if driver := _driver(trainer):
            driver.watch()

    def _count(self, trainer: Trainer, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers are called by GradScaler also when they must skip; they carry the verdict while they are.
        skipped = getattr(optimizer, "found_inf", None)
        if self.is_active(trainer) and not (skipped is not None and bool(skipped)):
            self.steps_done[i] += 1

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
    """Stands in for a few methods of one Trainer: where optimizers are made and step, where rates are read for the
    user, and where they are saved.

    The values are on while one of these runs and no longer: whoever builds on the groups in a hook (``group["lr"] *=
    0.5``) builds on the base values.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.tricks: list[OptimizerTrick] = []
        self.shown: list[tuple[dict[str, Any], str, Any, Any]] = []  # group, key, value before, value set
        self.originals: list[tuple[Any, str, Any]] = []
        self.handles: list[Any] = []
        self.bare = False  # whether a step that did not come through Lightning shows them
        monitors = [callback for callback in callbacks_of(trainer) if isinstance(callback, LearningRateMonitor)]
        stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
            (trainer.strategy, "setup_optimizers", self.make),
            (trainer.strategy, "training_step", self.read),
            (trainer.strategy, "optimizer_step", self.step),
            (trainer.strategy, "optimizer_state", self.save),
            *((monitor, "_extract_stats", self.show) for monitor in monitors),
        ]
        for owner, name, stand_in in stand_ins:
            original = getattr(owner, name)
            self.originals.append((owner, name, original))
            patch(owner, name, _StandIn(self, partial(stand_in, original)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for owner, name, original in self.originals:
            unpatch(owner, name, original)

    def watch(self) -> None:
        """Notice steps that do not come through Lightning (``self.optimizers(use_pl_optimizer=False)``)."""
        if not self.handles:
            for optimizer in raw_optimizers(self.trainer):
                self.handles.append(optimizer.register_step_pre_hook(self.before_bare_step))
                self.handles.append(optimizer.register_step_post_hook(self.after_bare_step))

    def before_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.shown:
            self.bare = True
            self.put_on(optimizer)

    def after_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.bare:
            self.bare = False
            self.hide()

    def make(self, original: Callable[..., Any], trainer: Trainer) -> None:
        with ExitStack() as splits:
            splitting = []
            for trick in self.tricks:
                if label_of := trick.splits_groups(trainer.lightning_module):
                    splits.enter_context(split_groups(label_of))
                    splitting.append(trick.name)
            try:
                original(trainer)
            except Exception as error:
                if splitting:
                    error.add_note(f"{', '.join(splitting)} split the parameter groups; the new ones come last.")
                raise

    def step(
        self, original: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        raw = getattr(optimizer, "_optimizer", optimizer)
        if any(trick.rests(raw) for trick in self.tricks):
            return closure()
        return self.show(partial(original, optimizer, closure), *args, only=raw, **kwargs)

    def read(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # In manual optimization training_step steps the schedulers too: there only the step sees the values.
        if self.shown or not self.trainer.lightning_module.automatic_optimization:
            return original(*args, **kwargs)
        return self.show(original, *args, **kwargs)

    def show(self, original: Callable[..., Any], *args: Any, only: Optimizer | None = None, **kwargs: Any) -> Any:
        """Call a method with the values on the groups, of all optimizers or of one."""
        if self.shown:  # by a call around this one, which takes them off
            return original(*args, **kwargs)
        try:
            self.put_on(only)
            return original(*args, **kwargs)
        finally:
            self.hide()

    def save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        taken = self.hide()
        try:
            return original(*args, **kwargs)
        finally:
            for group, key, _, value in taken:
                self.put(group, key, value)

    def put_on(self, only: Optimizer | None) -> None:
        """Put the tricks' values on the groups; this runs at every step, and is written to be quick."""
        callbacks = callbacks_of(self.trainer)
        tricks = [trick for trick in self.tricks if trick in callbacks]
        for i, wrapper in enumerate(self.trainer.strategy.optimizers):
            optimizer: Optimizer = getattr(wrapper, "_optimizer", wrapper)
            if only is not None and optimizer is not only:
                continue
            for g, group in enumerate(optimizer.param_groups):
                values: dict[str, Any] = {}
                for trick in tricks:
                    if len(trick.steps_done) > i:  # else it has not started yet
                        now = ChainMap(values, group) if values else group
                        values |= trick.group_values(i, g, trick.steps_done[i], now)
                for key, value in values.items():
                    self.put(group, key, value)

    def put(self, group: dict[str, Any], key: str, value: Any) -> None:
        before = group[key]
        if isinstance(before, Tensor):
            self.shown.append((group, key, before.clone(), value))
            before.copy_(torch.as_tensor(value))  # in place: a compiled or captured step holds this very tensor
        else:
            self.shown.append((group, key, before, value))
            group[key] = value

    def hide(self) -> list[tuple[dict[str, Any], str, Any, Any]]:
        """Give the groups their own values back, except where someone else has written; return what was taken off."""
        shown, self.shown = self.shown, []
        taken = []
        for entry in shown:
            group, key, before, value = entry
            current = group[key]
            if isinstance(current, Tensor):
                if current != torch.as_tensor(value, dtype=current.dtype, device=current.device):
                    continue
                current.copy_(before)
            elif current is value or current == value:
                group[key] = before
            else:
                continue
            taken.append(entry)
        return taken


class _StandIn:
    """A patched method that can be recognised as ours."""

    def __init__(self, driver: _Driver, function: Callable[..., Any]) -> None:
        self.driver, self.function = driver, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _driver(trainer: Trainer) -> _Driver | None:
    stand_in = trainer.strategy.__dict__.get("optimizer_step")
    return stand_in.driver if isinstance(stand_in, _StandIn) else None


@contextmanager
def split_groups(label_of: Callable[[Tensor], str | None]) -> Iterator[None]:
    """While it lasts, optimizers are built with the parameters of each label in groups of their own.

    Schedulers that are made in the meantime so see the groups from the start.

    Groups keep their places: what is split off comes last.

    Args:
        label_of: Says of a parameter which group it is split off into, or None.
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
        if isinstance(given, set):
            return add(self, param_group)  # torch says what is wrong with it
        params = [given] if isinstance(given, Tensor) else list(given)
        parts: dict[str | None, list[Any]] = {}
        for parameter in params:
            tensor = parameter[1] if isinstance(parameter, tuple) else parameter
            parts.setdefault(label_of(tensor) if isinstance(tensor, Tensor) else None, []).append(parameter)
        first = None if None in parts else next(iter(parts), None)
        add(self, {**param_group, "params": parts.pop(first, params)})
        for label, part in parts.items():
            split = {**param_group, "params": part}
            if "name" in split:
                split["name"] = f"{split['name']}-{label}"  # LearningRateMonitor refuses two groups of one name
            if id(self) in split_off:
                split_off[id(self)].append(split)
            else:
                add(self, split)

    Optimizer.__init__, Optimizer.add_param_group = __init__, add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__, Optimizer.add_param_group = init, add  # type: ignore[method-assign]
