"""What learning rate, momentum and scale will be over a run, drawn before it starts."""

from __future__ import annotations

import copy
import itertools
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer

from lightning_speedups.attach.packages import Callback, MisconfigurationException
from lightning_speedups.attach.steps import OptimizerTrick, ValueOrder, get_value
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.durations import RunFacts
from lightning_speedups.tricks.rates.base import ScheduleTrick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"lr": "learning rate", "scale": "scale of the rate"}


def schedule_values(
    callbacks: Callback | Sequence[Callback],
    trainer_length: int,
    *,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    points: int = 2000,
) -> tuple[list[int], dict[str, dict[str, list[float]]]]:
    """Compute what schedules will do at the steps of a run.

    Args:
        callbacks: As in `plot_schedule`.
        trainer_length: As in `plot_schedule`.
        steps_per_epoch: As in `plot_schedule`.
        batch_size: As in `plot_schedule`.
        optimizer: As in `plot_schedule`.
        points: At most how many steps, spread evenly; the first and the last are among them.

    Returns:
        The steps, from 0; and for each value (``"lr"``, ``"momentum"``, ``"scale"``, …) and each parameter group, by
        name, its numbers at these steps.

    Raises:
        ValueError: If no callback is a schedule, two own the same value, a length is missing, or optimizers do not fit.

    Example:
        >>> from lightning_speedups import LRCurve
        >>> steps, values = schedule_values(LRCurve("linear"), 4)
        >>> steps, values["lr"]
        ([0, 1, 2, 3], {'SGD': [1.0, 0.75, 0.5, 0.25]})
    """
    check_number("trainer_length", trainer_length, 1, whole=True)
    check_number("steps_per_epoch", steps_per_epoch, 1, whole=True, optional=True)
    check_number("batch_size", batch_size, 1, whole=True, optional=True)
    check_number("points", points, 2, whole=True)
    tricks = _twins([callbacks] if isinstance(callbacks, Callback) else callbacks)
    optimizers = _optimizers(optimizer, tricks)
    names = tuple(type(one).__name__ for one in optimizers)

    def steps_in_epochs(epochs: float) -> int | None:
        return None if steps_per_epoch is None else round(epochs * steps_per_epoch)

    for trick in tricks:
        try:
            trick.require_fit(optimizers)
            trick.plan(RunFacts(trainer_length, steps_in_epochs, batch_size, names))
        except MisconfigurationException as error:
            more = "(In a plot, `steps_per_epoch=`, `batch_size=` and `optimizer=` say more.)"
            raise ValueError(f"{error} {more}") from error

    count = min(points, trainer_length)
    steps = [i * (trainer_length - 1) // max(1, count - 1) for i in range(count)]
    values: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        for label, key, number in _values_at(step, tricks, optimizers):
            values.setdefault(key, {}).setdefault(label, []).append(number)
    if all(set(numbers) == {1.0} for numbers in values.get("scale", {}).values()):
        values.pop("scale", None)
    return steps, values


def _twins(callbacks: Sequence[Callback]) -> list[OptimizerTrick]:
    """Copies that have seen no run, in the order in which a Trainer asks them."""
    twins = []
    for trick in (callback for callback in callbacks if isinstance(callback, OptimizerTrick)):
        twin: Any = copy.deepcopy(trick)
        if getattr(trick, "max_lr", None) == "auto":
            twin.max_lr = getattr(trick, "found_lr", None)
            if twin.max_lr is None:
                raise ValueError(
                    f"{trick.name}(max_lr='auto') finds its rate when a run starts. Plot it after that, or give a "
                    "number, as `LRRangeTest` suggests it."
                )
        if getattr(trick, "over", None) == "time":
            twin.over = "steps"  # as if all steps took the same time
        twin.begin()
        twins.append(twin)
    schedules = [twin for twin in twins if isinstance(twin, ScheduleTrick)]
    for one, other in itertools.combinations(schedules, 2):
        if one.clashes(other):
            raise ValueError(f"{one.name} and {other.name} set the same value of every step. Remove one of them.")
    if not twins:
        raise ValueError(
            f"Expected `callbacks` to be a schedule or a list with one, but got {callbacks!r}. Schedules are "
            "OneCycleMomentum, CyclicMomentum, LRCurve and WarmupLRScaler."
        )
    return sorted(twins, key=lambda twin: twin.order)


def _optimizers(
    optimizer: Optimizer | Sequence[Optimizer] | None, tricks: Sequence[OptimizerTrick]
) -> Sequence[Optimizer]:
    if optimizer is not None:
        return [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    count = 1 + max((getattr(trick, "optimizer", None) or 0 for trick in tricks), default=0)
    schedules = [trick for trick in tricks if isinstance(trick, ScheduleTrick)]
    lists = [(one, rates) for one in schedules for rates in one.rates.values() if isinstance(rates, (list, tuple))]
    made = []
    for i in range(count):
        groups = max((len(rates) for one, rates in lists if one.drives(i)), default=1)
        made.append(SGD([{"params": [torch.zeros(())]} for _ in range(groups)], lr=1.0, momentum=0.9, weight_decay=1.0))
    return made


def _values_at(
    step: int, tricks: Sequence[OptimizerTrick], optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, str, float]]:
    for i, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            label = type(optimizer).__name__ + (f" {i}" if len(optimizers) > 1 else "")
            label += f", group {g}" if len(optimizer.param_groups) > 1 else ""
            values: dict[str, Any] = {}
            unscaled = None
            for trick in tricks:
                if trick.order > ValueOrder.ABSOLUTE and unscaled is None:
                    unscaled = float(values.get("lr", group["lr"]))
                values |= trick.group_values(i, g, step, ChainMap(values, group))
            now = {**group, **values}
            if unscaled:
                yield label, "scale", float(now["lr"]) / unscaled
            for key in dict.fromkeys(["lr", *("momentum" if key == "betas" else key for key in values)]):
                yield label, key, float(get_value(now, key))


def plot_schedule(
    callbacks: Callback | Sequence[Callback],
    trainer_length: int,
    *,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw what learning rate, momentum and scale will be over the whole run, before it starts.

    It asks the callbacks themselves; they and the optimizer stay as they are. Callbacks that are no schedules are left
    out, so the list that goes to the Trainer will do. Schedulers of torch's are not drawn.

    When not to use it: for what a run really did, which Lightning's ``LearningRateMonitor`` logs.

    Args:
        callbacks: A schedule of this package, or a list that contains some.
        trainer_length: Length of the run in optimizer steps, 1 or more.
        steps_per_epoch: Optimizer steps in an epoch, for what is given in epochs.
        batch_size: Samples behind one optimizer step, over all processes, for a ``WarmupLRScaler`` with a
            ``base_batch_size``.
        optimizer: The optimizer, or all of them, for curves that begin at its own values. None: SGD at rate 1 with
            momentum 0.9 and weight decay 1, and as many parameter groups as a schedule has rates.
        ax: Matplotlib axes to draw on: one takes the learning rate; a sequence takes a value each, in the order
            learning rate, momentum, others, scale. None: a new figure with all of them.

    Returns:
        The figure.

    Raises:
        ValueError: If no callback is a schedule, two own the same value, a length is missing, or optimizers do not fit.

    Example:
        >>> from lightning_speedups import OneCycleMomentum, WarmupLRScaler
        >>> figure = plot_schedule([OneCycleMomentum(max_lr=0.4)], 1000)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['learning rate', 'momentum']
    """
    from matplotlib.figure import Figure

    steps, values = schedule_values(
        callbacks, trainer_length, steps_per_epoch=steps_per_epoch, batch_size=batch_size, optimizer=optimizer
    )
    keys = sorted(values, key=lambda key: (key != "lr", key == "scale", key != "momentum", key))
    if ax is None:
        ax = list(Figure(figsize=(7, 1 + 2 * len(keys)), layout="constrained").subplots(len(keys), squeeze=False).flat)
    axes = list(ax) if isinstance(ax, Iterable) else [ax]
    for key, place in zip(keys, axes, strict=False):
        for label, numbers in values[key].items():
            place.plot(steps, numbers, label=label)
        place.set_ylabel(LABELS.get(key, key.replace("_", " ")))
        place.grid(alpha=0.3)
        if len(values[key]) > 1:
            place.legend()
    axes[min(len(keys), len(axes)) - 1].set_xlabel("optimizer step")
    return axes[0].figure.figure
