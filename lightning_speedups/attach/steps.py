"""Values on the optimizers' parameter groups for the time of a step, and a count of the steps that really happened.

Lightning has no hook after ``optimizer.step``, counts a step that GradScaler skipped, and lets schedulers and
checkpoints read whatever stands in the groups. So a trick's values are put on before the step and taken off before
anyone could build on them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.run_length import facts, raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.durations import Duration, RunFacts

Shown = tuple[dict[str, Any], str, Any, Any]
"""A parameter group, a key in it, the value before, and the one that was put there."""
GIVE_STEPS = "Give `total_steps=`, in optimizer steps, or `Trainer(max_steps=...)`."
"""What to do when the length of a run is unknown."""


class ValueOrder(IntEnum):
    """Which values come first: absolute ones, then the factors on them, then what ends a run whatever they say."""

    ABSOLUTE = 10
    FACTOR = 20
    FINAL = 30


class SetsValues(Protocol):
    """Who sets values of parameter groups (``lr``, ``momentum``, …) for the time of each step: a trick, or a part of
    one.
    """

    @property
    def order(self) -> ValueOrder:
        """Which values come first."""

    def is_active(self, trainer: Trainer) -> bool:
        """Tell whether the Trainer runs it."""

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set on a parameter group for the next step.

        Args:
            optimizer: The optimizer's index.
            group: The parameter group's index in it.
            values: The group as schedulers and those before left it.
        """

    def rests(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer has nothing to step, which GradScaler takes for a mistake."""

    def settle_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None] | None:
        """Settle, before ``configure_optimizers``, which parameters need a group of their own; return what names that
        of a parameter, or gives None. None for no need at all.
        """


@dataclass
class Steps:
    """What a checkpoint holds of a trick that goes by steps.

    Attributes:
        steps_done: Steps that each optimizer has really done.
    """

    steps_done: list[int] = field(default_factory=list)


class OptimizerTrick(Trick):
    """A trick that sets values of parameter groups (``lr``, ``momentum``, …) step by step.

    A subclass says when (``order``) and what (``group_values``). ``steps_done`` counts the real steps of each
    optimizer, over resumes.
    """

    saved_as = Steps
    saved: Steps
    order: ValueOrder

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []

    @property
    def steps_done(self) -> list[int]:
        """Steps that each optimizer has really done."""
        return self.saved.steps_done

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set on a parameter group for the next step.

        Args:
            optimizer: The optimizer's index.
            group: The parameter group's index in it.
            step: Steps that this optimizer has really done.
            values: The group as schedulers and earlier tricks left it.
        """
        raise NotImplementedError

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set for the next step; nothing before training has begun."""
        done = self.saved.steps_done
        return self.group_values(optimizer, group, done[optimizer], values) if optimizer < len(done) else {}

    def rests(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer has nothing to step."""
        return False

    def settle_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None] | None:
        """Settle which parameters need a group of their own: none."""
        return None

    def plan(self, run: RunFacts) -> None:
        """Settle what depends on the run's length or batch size, before the first step."""

    def steps_of_run(self, run: RunFacts, given: int | None, way_out: str = GIVE_STEPS) -> int:
        """Return the length of the whole run in optimizer steps; refuse a run of unknown length.

        Args:
            run: The run.
            given: The length that the user gave, if they did.
            way_out: What else they can do, as a sentence.
        """
        if steps := given or run.steps:
            return steps
        raise self.refusal(
            "needs the length of the run, and this one's is unknown (an endless loader, no `max_epochs`, or manual "
            "optimization, where the steps are the module's own)",
            way_out,
        )

    def steps_of_parts(self, run: RunFacts, whole: float | None = None, **parts: Duration) -> list[float]:
        """Return the lengths of parts of the run in optimizer steps; refuse a run that does not tell one of them.

        Args:
            run: The run.
            whole: Steps of which fractions are taken, instead of the run's own.
            **parts: By the arguments' names.
        """
        lengths = []
        for name, part in parts.items():
            length = part.in_steps(run, whole)
            if length is None:
                whose = "an epoch" if part.unit == "epochs" else "the run"
                given = part.amount if part.unit == "fraction" else f"{part.amount:g} {part.unit}"
                raise self.refusal(
                    f"needs the length of {whose}, but this training data has none",
                    f"Give `{name}` in optimizer steps.",
                    **{name: given},
                )
            lengths.append(length)
        return lengths

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the driver that stands before each step."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            Driver.of(trainer).join(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count, and settle the plan."""
        super().on_train_start(trainer, pl_module)
        optimizers = raw_optimizers(trainer)
        if not self.resumed or len(self.steps_done) != len(optimizers):
            # A checkpoint made without this trick: Lightning's own count, which takes all optimizers together.
            self.saved.steps_done = [trainer.global_step // max(len(optimizers), 1)] * len(optimizers)
        self.plan(facts(trainer, pl_module))
        for i, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(partial(self._count, trainer, i)))
        Driver.of(trainer).watch()

    def _count(self, trainer: Trainer, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.is_active(trainer) and has_stepped(optimizer):
            self.saved.steps_done[i] += 1

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the values off and leave the driver."""
        super().undo(trainer, pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        Driver.of(trainer).leave(self)


def has_stepped(optimizer: Optimizer) -> bool:
    """Tell in a hook after ``optimizer.step`` whether it did anything.

    Fused optimizers are called by GradScaler also when they must skip; they carry the verdict while they are.
    """
    skipped = getattr(optimizer, "found_inf", None)
    return not (skipped is not None and bool(skipped))


class Driver:
    """Stands where optimizers of one Trainer are made and step, where rates are read for the user, and where they are
    saved.

    The values are on while one of these runs and no longer: whoever builds on the groups in a hook (``group["lr"] *=
    0.5``) builds on the base values.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.members: list[SetsValues] = []
        self.stations: list[Station] = []
        self.shown: list[Shown] = []
        self.handles: list[Any] = []
        self.bare = False  # whether a step that did not come through Lightning shows them

    @staticmethod
    def of(trainer: Trainer) -> Driver:
        """Return the Trainer's driver, or a new one, whose first member will let it take its place."""
        return Station.of(trainer.strategy, "optimizer_step").find(Driver) or Driver(trainer)

    def join(self, member: SetsValues) -> None:
        """Take a member in, once."""
        if not self.members:
            strategy = self.trainer.strategy
            places: list[tuple[Any, str, Callable[..., Any]]] = [
                (strategy, "setup_optimizers", self.make),
                (strategy, "training_step", self.read),
                (strategy, "optimizer_step", self.step),
                (strategy, "optimizer_state", self.save),
            ]
            monitors = [callback for callback in callbacks_of(self.trainer) if is_a(callback, "LearningRateMonitor")]
            for owner, method, act in [*places, *((monitor, "_extract_stats", self.show) for monitor in monitors)]:
                self.stations.append(Station.of(owner, method))
                self.stations[-1].join(self, act)
        if member not in self.members:
            self.members = sorted([*self.members, member], key=lambda one: one.order)

    def leave(self, member: SetsValues) -> None:
        """Take the values off and let a member go; with the last one the driver goes."""
        if member not in self.members:
            return
        self.hide()
        self.members.remove(member)
        if not self.members:
            for handle in self.handles:
                handle.remove()
            for station in self.stations:
                station.leave(self)

    def watch(self) -> None:
        """Notice steps that do not come through Lightning (``self.optimizers(use_pl_optimizer=False)``)."""
        if not self.handles:
            for optimizer in raw_optimizers(self.trainer):
                self.handles.append(optimizer.register_step_pre_hook(self.before_bare_step))
                self.handles.append(optimizer.register_step_post_hook(self.after_bare_step))

    def before_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Show the values, unless they are shown already."""
        if not self.shown:
            self.bare = True
            self.put_on(optimizer)

    def after_bare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take them off again."""
        if self.bare:
            self.bare = False
            self.hide()

    def make(self, original: Callable[..., Any], trainer: Trainer) -> None:
        """Make the optimizers, with the parameter groups that members need."""
        with ExitStack() as splits:
            splitting = []
            for member in self.members:
                if label_of := member.settle_groups(trainer.lightning_module):
                    splits.enter_context(split_groups(label_of))
                    splitting.append(type(member).__name__)
            try:
                original(trainer)
            except Exception as error:
                if splitting:
                    error.add_note(f"{', '.join(splitting)} split the parameter groups; the new ones come last.")
                raise

    def step(
        self, original: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Step with the values on the groups."""
        raw = getattr(optimizer, "_optimizer", optimizer)
        for member in self.members:  # not by any(), which takes longer than all that it asks
            if member.rests(raw):
                return closure()
        return self.show(partial(original, optimizer, closure), *args, only=raw, **kwargs)

    def read(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the training step read the values."""
        # In manual optimization training_step steps the schedulers too: there only the step sees the values.
        if self.trainer.lightning_module.automatic_optimization:
            return self.show(original, *args, **kwargs)
        return original(*args, **kwargs)

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
        """Let a checkpoint have the groups' own values."""
        taken = self.hide()
        try:
            return original(*args, **kwargs)
        finally:
            for group, key, _, value in taken:
                self.put(group, key, value)

    def put_on(self, only: Optimizer | None) -> None:
        """Put the tricks' values on the groups; this runs at every step, and is written to be quick."""
        members = [member for member in self.members if member.is_active(self.trainer)]
        for i, wrapper in enumerate(self.trainer.strategy.optimizers):
            optimizer: Optimizer = getattr(wrapper, "_optimizer", wrapper)
            if only is not None and optimizer is not only:
                continue
            for g, group in enumerate(optimizer.param_groups):
                values: dict[str, Any] = {}
                for member in members:
                    values |= member.values_now(i, g, ChainMap(values, group) if values else group)
                for key, value in values.items():
                    self.put(group, key, value)

    def put(self, group: dict[str, Any], key: str, value: Any) -> None:
        """Put a value on a group."""
        before = group[key]
        if isinstance(before, Tensor):
            self.shown.append((group, key, before.clone(), value))
            before.copy_(torch.as_tensor(value))  # in place: a compiled or captured step holds this very tensor
        else:
            self.shown.append((group, key, before, value))
            group[key] = value

    def hide(self) -> list[Shown]:
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
