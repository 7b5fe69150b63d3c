"""Values on the optimizers' parameter groups for the time of a step, and a count of the steps that really happened.

Lightning has no hook after ``optimizer.step``, counts a step that GradScaler skipped, and lets schedulers, checkpoints
and the module's own hooks read whatever stands in the groups. So a trick's values are on while the optimizer itself
works, and no longer: not in the closure that it calls, where training step, backward and gradient hooks run.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.packages import MisconfigurationException, is_a
from lightning_speedups.attach.run_length import facts, raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.durations import Duration, RunFacts

Group = dict[str, Any]
"""A parameter group."""
Shown = tuple[Group, str, Any, Any]
"""A parameter group, a key in it, the value before, and the one that was put there."""
Closure = Callable[..., Any]
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

    def stepped(self, optimizer: int) -> None:
        """Note that an optimizer has really stepped.

        Args:
            optimizer: Its index.
        """

    def settle_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None] | None:
        """Settle, before ``configure_optimizers``, which parameters need a group of their own; return what names that
        of a parameter, or gives None. None for no need at all.
        """

    def meet(self, trainer: Trainer) -> None:
        """Get to know the run's optimizers, at fit start and when others take their place; refuse what cannot be
        driven.
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
    keys: tuple[str, ...] = ("lr",)
    """Names of the values that it sets; ``"momentum"`` is ``betas[0]`` in the Adam family."""
    way_without: ClassVar[Mapping[str, str]] = {}
    """What to do when an optimizer lacks a value that it sets."""

    @property
    def steps_done(self) -> list[int]:
        """Steps that each optimizer has really done."""
        return self.saved.steps_done

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set on a parameter group for the next step.

        Args:
            optimizer: The optimizer's index.
            group: The parameter group's index in it.
            step: Steps that this optimizer has really done, or what takes their place (`step_now`).
            values: The group as schedulers and earlier tricks left it.
        """
        raise NotImplementedError

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to set for the next step; nothing before training has begun."""
        if optimizer >= len(self.saved.steps_done):
            return {}
        return self.group_values(optimizer, group, self.step_now(optimizer), values)

    def step_now(self, optimizer: int) -> int:
        """Return at which step an optimizer's values are taken: after those that it has really done."""
        return self.saved.steps_done[optimizer]

    def rests(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer has nothing to step."""
        return False

    def stepped(self, optimizer: int) -> None:
        """Count."""
        if optimizer < len(self.saved.steps_done):
            self.saved.steps_done[optimizer] += 1

    def drives(self, optimizer: int) -> bool:
        """Tell whether it sets values of an optimizer."""
        return True

    def settle_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None] | None:
        """Settle which parameters need a group of their own: none."""
        return None

    def plan(self, run: RunFacts) -> None:
        """Settle what depends on the run's length or batch size, before the first step."""

    def _steps_of_run(self, run: RunFacts, given: int | None, way_out: str = GIVE_STEPS) -> int:
        """Return the length of the whole run in optimizer steps; refuse a run of unknown length.

        Args:
            run: The run.
            given: The length that the user gave, if they did.
            way_out: What else they can do, as a sentence.
        """
        if steps := given or run.steps:
            return steps
        why = "an endless loader, or no `max_epochs`"
        if run.batches is not None:
            why = "manual optimization, where the steps are the module's own"
        raise self.refusal(f"needs the length of the run, and this one's is unknown ({why})", way_out)

    def _steps_of_parts(self, run: RunFacts, whole: float | None = None, **parts: Duration) -> list[float]:
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that lack what it sets."""
        super().on_fit_start(trainer, pl_module)
        self.meet(trainer)

    def meet(self, trainer: Trainer) -> None:
        """Refuse optimizers that lack what it sets."""
        self.require_fit(raw_optimizers(trainer))

    def require_fit(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers that lack what it sets."""
        for i, optimizer in enumerate(optimizers):
            if self.drives(i):
                ways_out = {"lr": "Give the optimizer a learning rate.", **self.way_without}
                require_values(self, optimizer, self.keys, ways_out)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count, and settle the plan."""
        super().on_train_start(trainer, pl_module)
        optimizers = raw_optimizers(trainer)
        if not self.resumed or len(self.steps_done) != len(optimizers):
            # A checkpoint made without this trick: Lightning's own count, which takes all optimizers together.
            self.saved.steps_done = [trainer.global_step // max(len(optimizers), 1)] * len(optimizers)
        self.plan(facts(trainer, pl_module))
        Driver.of(trainer).watch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether a callback has put other optimizers into the Trainer."""
        super().on_train_epoch_start(trainer, pl_module)
        Driver.of(trainer).watch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if no step was seen."""
        super().on_train_epoch_end(trainer, pl_module)
        Driver.of(trainer).look_back()

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the values off and leave the driver."""
        super().undo(trainer, pl_module)
        Driver.of(trainer).leave(self)


def get_value(group: Mapping[str, Any], key: str) -> Any:
    """Return a value of a parameter group; ``"momentum"`` is ``betas[0]`` in the Adam family.

    Args:
        group: The parameter group.
        key: The value's name.

    Raises:
        KeyError: If the group has no such value.

    Example:
        >>> get_value({"lr": 0.1, "betas": (0.9, 0.999)}, "momentum")
        0.9
    """
    return group["betas"][0] if key == "momentum" and "betas" in group else group[key]


def require_values(trick: Trick, optimizer: Optimizer, keys: Iterable[str], ways_out: Mapping[str, str]) -> None:
    """Refuse an optimizer that lacks a value, or has something there that is no number.

    Args:
        trick: Who sets it.
        optimizer: Torch's optimizer.
        keys: Names of the values.
        ways_out: What the user can do without one, as a sentence.
    """
    kind = type(optimizer).__name__
    for key, group in itertools.product(keys, optimizer.param_groups):
        try:
            value = get_value(group, key)
        except KeyError as error:
            what = f"drives `{key}`, but {kind} has none, only {[name for name in group if name != 'params']}"
            raise trick.refusal(what, ways_out.get(key, "Name one of these.")) from error
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            what = f"drives `{key}`, which must be a number, but {kind} has {value!r} there"
            raise trick.refusal(what, ways_out.get(key, "Name another one."))


def has_stepped(optimizer: Optimizer) -> bool:
    """Tell in a hook after ``optimizer.step`` whether it did anything.

    Fused optimizers are called by GradScaler also when they must skip; they carry the verdict while they are.
    """
    skipped = getattr(optimizer, "found_inf", None)
    return not (skipped is not None and bool(skipped))


class Driver:
    """Stands where optimizers of one Trainer are made and step, where rates are read for the user, and where they are
    saved.

    The values are on while an optimizer works or a monitor reads, and no longer: whoever builds on the groups in a hook
    (``group["lr"] *= 0.5``), or in the closure, builds on the base values.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.members: list[SetsValues] = []
        self.stations: list[Station] = []
        self.watched: list[Optimizer] = []
        self.at_steps: list[Station] = []  # of those
        self.at_work: int | None = None  # which of them
        self.shown: list[Shown] = []
        self.unseen_since: int | None = None  # so many batches; None once a step was seen
        self.warned = False

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
                (strategy, "optimizer_step", self.step),
                (strategy, "optimizer_state", self.unshown),
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
            for station in [*self.stations, *self.at_steps]:
                station.leave(self)
            self.watched = []

    def watch(self) -> None:
        """Stand where the optimizers themselves step, which no step can miss: neither one that does not come through
        Lightning, nor that of a wrapper or of an optimizer that somebody has put in place of another.
        """
        optimizers = raw_optimizers(self.trainer)
        if self.watched == optimizers:
            return
        if self.watched:
            self.take_over(optimizers)
        else:
            self.unseen_since = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        for station in self.at_steps:
            station.leave(self)
        self.watched, self.at_steps = optimizers, [Station.of(optimizer, "step") for optimizer in optimizers]
        for i, station in enumerate(self.at_steps):
            station.join(self, partial(self.work, i))

    def look_back(self) -> None:
        """Say so if an epoch has passed and no step was seen yet, as of optimizers with other methods than `step`."""
        begun = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if self.unseen_since is not None and begun > self.unseen_since:
            self.unseen_since = None
            rank_zero_warn(
                f"{self.names} saw no step of an optimizer in a whole epoch, and so stood still. Steps are seen, and "
                "counted, in the method `step` of the optimizers from `configure_optimizers`. Step there."
            )

    @property
    def names(self) -> str:
        """The members' names in messages."""
        return ", ".join(type(member).__name__ for member in self.members)

    @property
    def active(self) -> list[SetsValues]:
        """The members that the Trainer runs."""
        return [member for member in self.members if member.is_active(self.trainer)]

    def take_over(self, optimizers: list[Optimizer]) -> None:
        """Let the members go on with optimizers that somebody has put in place of the run's own."""
        if len(optimizers) != len(self.watched):
            raise MisconfigurationException(
                f"{self.names}: the Trainer's {len(self.watched)} optimizers became {len(optimizers)} in mid-run, and "
                "nobody can say which goes on for which. Put as many in their place, or make them all in "
                "`configure_optimizers`."
            )
        for member in self.members:
            if label_of := member.settle_groups(self.trainer.lightning_module):
                for optimizer in (one for one in optimizers if one not in self.watched):
                    regroup(optimizer, label_of)
        for member in self.members:
            member.meet(self.trainer)

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
        self, original: Callable[..., Any], optimizer: Optimizer, closure: Closure, *args: Any, **kwargs: Any
    ) -> Any:
        """Step, unless there is nothing to step."""
        self.unseen_since = None
        raw = getattr(optimizer, "_optimizer", optimizer)
        if self.watched and raw not in self.watched:
            self.watch()
        for member in self.members:  # not by any(), which takes longer than all that it asks
            if member.rests(raw):
                return closure()
        return original(optimizer, closure, *args, **kwargs)

    def work(self, i: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let an optimizer work with the values on its groups, and count the step."""
        if self.at_work is not None:  # one that calls its own step
            return original(*args, **kwargs)
        self.unseen_since, self.at_work, optimizer, members = None, i, self.watched[i], self.active
        if args and callable(args[0]):
            args = (partial(self.unshown, args[0]), *args[1:])
        elif callable(closure := kwargs.get("closure")):
            kwargs["closure"] = partial(self.unshown, closure)
        try:
            self.put_on(i, optimizer, members)
            result = original(*args, **kwargs)
        finally:
            self.at_work = None
            self.hide()
        if has_stepped(optimizer):
            for member in members:
                member.stepped(i)
        return result

    def unshown(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call something in the middle of a step with the groups' own values: the closure, in which the module's code
        runs, or what makes a checkpoint.
        """
        i, self.at_work, taken = self.at_work, None, self.hide()
        try:
            return call(*args, **kwargs)
        finally:
            self.at_work = i
            if i is not None and not self.put_back(taken):
                self.put_on(i, self.watched[i], self.active)

    def show(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method with the values on the groups of all optimizers."""
        if self.at_work is not None:  # which shows them itself
            return original(*args, **kwargs)
        members = self.active
        try:
            for i, optimizer in enumerate(raw_optimizers(self.trainer)):
                self.put_on(i, optimizer, members)
            return original(*args, **kwargs)
        finally:
            self.hide()

    # Traced in a compiled step, it would write to what the compiler takes for the groups.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def put_on(self, i: int, optimizer: Optimizer, members: Sequence[SetsValues]) -> None:
        """Put the members' values on an optimizer's groups; this runs at every step, and is written to be quick."""
        for g, group in enumerate(optimizer.param_groups):
            values: dict[str, Any] = {}
            for member in members:
                values |= member.values_now(i, g, ChainMap(values, group) if values else group)
            for key, value in values.items():
                before = group[key]
                if isinstance(before, Tensor):
                    # Another tensor: several groups may share this one, and a number put into it would be rounded.
                    value = torch.as_tensor(value, dtype=before.dtype, device=before.device)
                self.shown.append((group, key, before, value))
                group[key] = value

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def put_back(self, taken: list[Shown]) -> bool:
        """Put on again what was taken off, unless somebody has written in the meantime; tell whether that was done."""
        if any(group[key] is not before or isinstance(before, Tensor) for group, key, before, _ in taken):
            return False
        self.shown = taken
        for group, key, _, value in taken:
            group[key] = value
        return bool(taken)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hide(self) -> list[Shown]:
        """Give the groups their own values back, except where someone else has written; return what was taken off."""
        shown, self.shown = self.shown, []
        taken = []
        for entry in shown:
            group, key, before, value = entry
            if (current := group[key]) is value or (type(current) is float and current == value):
                group[key] = before
                taken.append(entry)
            elif not self.warned:
                self.warned = True
                rank_zero_warn(
                    f"{self.names}: the optimizer itself, or one of its hooks, wrote `{key}` of a parameter group "
                    "during `step`, where it holds the value of that step. What it wrote is the base value from now "
                    "on: a factor would multiply up. Write it in a hook of the module or of a callback instead."
                )
        return taken


def split_group(group: Group, label_of: Callable[[Tensor], str | None]) -> list[Group]:
    """Return a parameter group as one for each label; the first one keeps the name.

    Args:
        group: The group; its parameters may be names and tensors in pairs.
        label_of: Says of a parameter which group it is split off into, or None, which comes first.
    """
    parts: dict[str | None, list[Any]] = {None: []}
    for parameter in [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"]):
        tensor = parameter[1] if isinstance(parameter, tuple) else parameter
        parts.setdefault(label_of(tensor) if isinstance(tensor, Tensor) else None, []).append(parameter)
    if not parts[None] and len(parts) > 1:
        del parts[None]
    first, *rest = ({**group, "params": part} for part in parts.values())
    if "name" in group:  # LearningRateMonitor refuses two groups of one name
        for split, label in zip(rest, list(parts)[1:], strict=True):
            split["name"] = f"{group['name']}-{label}"
    return [first, *rest]


@contextmanager
def split_groups(label_of: Callable[[Tensor], str | None]) -> Iterator[None]:
    """While it lasts, optimizers are built with the parameters of each label in groups of their own.

    Schedulers that are made in the meantime so see the groups from the start.

    Groups keep their places: what is split off comes last.

    Args:
        label_of: Says of a parameter which group it is split off into, or None.
    """
    init, add = Optimizer.__init__, Optimizer.add_param_group
    split_off: dict[int, list[Group]] = {}

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        split_off[id(self)] = []
        init(self, *args, **kwargs)
        for group in split_off.pop(id(self)):
            add(self, group)

    def add_param_group(self: Optimizer, param_group: Group) -> None:
        if isinstance(param_group["params"], set):
            return add(self, param_group)  # torch says what is wrong with it
        first, *rest = split_group(param_group, label_of)
        add(self, first)
        if id(self) in split_off:
            split_off[id(self)] += rest
        else:
            for split in rest:
                add(self, split)

    Optimizer.__init__, Optimizer.add_param_group = __init__, add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__, Optimizer.add_param_group = init, add  # type: ignore[method-assign]


def regroup(optimizer: Optimizer, label_of: Callable[[Tensor], str | None]) -> None:
    """Split the parameter groups of an optimizer that was made without `split_groups`.

    Args:
        optimizer: Torch's optimizer.
        label_of: Says of a parameter which group it is split off into, or None.
    """
    parts = [split_group(group, label_of) for group in optimizer.param_groups]
    optimizer.param_groups[:] = [first for first, *_ in parts] + [split for _, *rest in parts for split in rest]
