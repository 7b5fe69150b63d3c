"""Which layers of a backbone train in which epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from lightning_speedups.modules.layers import HEAD, Layer, matches, pick_layers

Names = str | Sequence[str]


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
        epoch: Its first epoch, counted from 0.
        training: Names of the layers that train in it, beside the head.
    """

    epoch: int
    training: frozenset[str]


def check_schedule(name: str, schedule: Mapping[int, Names] | None) -> None:
    """Refuse what is not a mapping from epochs to names of layers.

    Raises:
        ValueError: If it is none.
    """
    if schedule is None:
        return
    good = isinstance(schedule, Mapping) and all(
        isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 and _are_names(names)
        for epoch, names in schedule.items()
    )
    if not good:
        raise ValueError(
            f"Expected `{name}` to map epochs, whole numbers from 0 on, to a layer's name or a list of them, such as "
            f"{{2: 'layer4', 4: ['layer3', 'layer2']}}, but got {schedule!r}."
        )


def _are_names(names: Names) -> bool:
    names = [names] if isinstance(names, str) else names
    return isinstance(names, Sequence) and len(names) > 0 and all(isinstance(name, str) and name for name in names)


def gradually(layers: Sequence[Layer], first: int, every: int) -> dict[int, str]:
    """Return a schedule that thaws one layer after the other, the last one first.

    Args:
        layers: The backbone's layers, from the input on.
        first: Epoch of the first of them.
        every: Epochs from one to the next.

    Example:
        >>> gradually([Layer("stem", ()), Layer("layer1", ()), Layer("layer2", ())], first=1, every=2)
        {1: 'layer2', 3: 'layer1', 5: 'stem'}
    """
    return {first + every * i: layer.name for i, layer in enumerate(reversed(layers))}


def all_names(*schedules: Mapping[int, Names] | None) -> list[str]:
    """Return the names that are in schedules.

    Example:
        >>> all_names({0: "head", 2: ["layer4", "layer3"]}, None, {5: "layer4"})
        ['head', 'layer4', 'layer3', 'layer4']
    """
    names = chain.from_iterable(schedule.values() for schedule in schedules if schedule is not None)
    return [*chain.from_iterable([one] if isinstance(one, str) else one for one in names)]


def one_by_one(
    schedule: Mapping[int, Names], layers: Sequence[Layer], every: int = 1, last_first: bool = True
) -> dict[int, list[str]]:
    """Return a schedule in which each path that a pattern fits has an epoch of its own, from the pattern's on.

    Args:
        schedule: Names by epochs. Those with a wildcard (``*``, ``?``, ``[...]``) are patterns.
        layers: The backbone's layers, from the input on.
        every: Epochs from one to the next.
        last_first: Whether they come from the last to the first.

    Example:
        >>> one_by_one({0: "head", 1: "block.*"}, [Layer("stem", ()), Layer("block.0", ()), Layer("block.1", ())])
        {0: ['head'], 1: ['block.1'], 2: ['block.0']}
    """
    found: dict[int, list[str]] = {}
    for epoch, names in schedule.items():
        for name in [names] if isinstance(names, str) else names:
            fitting = matches(name, layers)[:: -1 if last_first else 1] if {*"*?["} & {*name} else []
            for i, path in enumerate(fitting or [name]):
                found.setdefault(epoch + every * i, []).append(path)
    return found


def stages(
    layers: Sequence[Layer], thaw: Mapping[int, Names], freeze: Mapping[int, Names], every: int = 1
) -> list[Stage]:
    """Return the stages of a run, the first from epoch 0 on.

    Args:
        layers: The backbone's layers.
        thaw: Which layers begin to train in which epoch. What a pattern fits begins one after the other, from the last.
        freeze: Which of them stop again. What a pattern fits stops one after the other, from the first.
        every: Epochs from one to the next.

    Raises:
        LookupError: If there is no such layer.
        ValueError: If a layer is to be frozen in an epoch in which it does not train, or the head.

    Example:
        >>> layers = [Layer("stem", ()), Layer("layer1", ())]
        >>> [(epoch, sorted(training)) for epoch, training in stages(layers, {0: "head", 2: "all"}, {3: "stem"})]
        [(0, []), (2, ['layer1', 'stem']), (3, ['layer1'])]
    """
    thaw, freeze = one_by_one(thaw, layers, every), one_by_one(freeze, layers, every, last_first=False)
    training = frozenset[str]()
    found = {0: training}
    for epoch in sorted({*thaw, *freeze}):
        joining = pick_layers(thaw.get(epoch, ()), layers)
        if HEAD in joining and epoch > 0:
            raise ValueError(f"the head trains from the start, but the schedule thaws it in epoch {epoch}")
        leaving = pick_layers(freeze.get(epoch, ()), layers)
        if HEAD in leaving:
            raise ValueError(f"the head always trains, but in epoch {epoch} it is to be frozen")
        if idle := [layer.name for layer in layers if layer.name in leaving - training | leaving & joining]:
            raise ValueError(f"what is to be frozen again in epoch {epoch} must train before it, but {idle} does not")
        before, training = training, (training | joining - {HEAD}) - leaving
        if epoch == 0 or training != before:
            found[epoch] = training
    return [Stage(epoch, training) for epoch, training in found.items()]
