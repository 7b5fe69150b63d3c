"""Where the frozen part of a network ends as its layers are frozen now, and whether that part is what it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from functools import cached_property
from itertools import chain
from typing import Any

from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

from lightning_speedups.modules.frozen_part import checksum, find_cuts, is_frozen
from lightning_speedups.tensors.feature_store import fingerprint
from lightning_speedups.tensors.unloaded import Shortcuts

Refuse = Callable[[str, str], Exception]
"""Makes an exception of what was found and the way out."""


class Cuts:
    """The cuts in a module, to which features come, and what is around them; a picture of one moment.

    Args:
        module: Which module.
        last: The picture before this one.
        moved: Names of tensors that change during a step, though no feature depends on them.

    Attributes:
        parameters: Those of the module.
        flags: Whether each of them trains.
        inside: The cuts: the largest modules of which every parameter trains, by name.
        outside: All other modules, by name.
        moving: Names of the tensors outside that move, found in this picture and, if the same parameters train, those
            before it.
        still: The tensors outside that neither train nor move, by name.
        versions: Of these tensors: what changes when somebody writes into them or puts others in their place.
        sums: Of their values: ``.data`` can be written to without another version.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.ReLU(), nn.Linear(2, 2))
        >>> cuts = Cuts(net)
        >>> list(cuts.inside), list(cuts.outside), list(cuts.still)
        (['2'], ['', '0', '1'], ['0.weight', '0.bias'])
    """

    def __init__(self, module: nn.Module, last: Cuts | None = None, moved: Collection[str] = ()) -> None:
        self.parameters = list(module.parameters())
        self.flags = self._flags_now()
        self.inside, self.outside = find_cuts(module)
        self._last: Shortcuts | None = None if last is None else vars(last).get("shortcuts", last._last)
        self.moving: set[str] = set(moved)
        if last is not None and last.flags == self.flags:
            self.moving |= last.moving
        self.still = {
            name: tensor
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
            if name.rpartition(".")[0] in self.outside and not tensor.requires_grad and name not in self.moving
        }
        self.versions = {name: (tensor._version, tensor.data_ptr()) for name, tensor in self.still.items()}
        self.sums = checksum(self.still.values())

    def train_as_then(self) -> bool:
        """Tell whether the same parameters train."""
        return self.flags == self._flags_now()

    def moved(self) -> list[str]:
        """Return the names of the tensors that somebody has written into or replaced since."""
        return [
            name for name, tensor in self.still.items() if (tensor._version, tensor.data_ptr()) != self.versions[name]
        ]

    def is_like(self, other: Cuts) -> bool:
        """Tell whether features of another moment are those of this one."""
        return (self.flags, self.versions, self.sums) == (other.flags, other.versions, other.sums)

    def fingerprint(self, *around: Any) -> str:
        """Return what is the same in another run whose features are the same.

        Args:
            *around: What else they depend on.
        """
        modules = [
            (name, type(part).__qualname__, part.training, re.sub(" at 0x[0-9a-f]+", "", part.extra_repr()))
            for name, part in self.outside.items()
            if name
        ]
        return fingerprint([self.still, modules, list(self.inside), *around])

    @cached_property
    def shortcuts(self) -> Shortcuts:
        """Over the modules in which nothing trains; those of the last picture go on, as another would cost a trial."""
        return Shortcuts((part for part in self.outside.values() if is_frozen(part)), self._last)

    def _flags_now(self) -> tuple[bool, ...]:
        return tuple(parameter.requires_grad for parameter in self.parameters)


def places(calls: Counter[str], name: str, given: Any) -> tuple[dict[str, Any], TreeSpec]:
    """Return what a module is given, each under the name of its place in the step, and how it is nested; count the
    call.

    Args:
        calls: How often modules were called in this step, by name.
        name: Of the module.
        given: Its arguments.

    Example:
        >>> calls = Counter()
        >>> places(calls, "head", ([1, 2], {}))[0], places(calls, "head", ([3], {}))[0]
        ({'head 0 0': 1, 'head 0 1': 2}, {'head 1 0': 3})
    """
    leaves, spec = tree_flatten(given)
    found = {f"{name} {calls[name]} {place}": leaf for place, leaf in enumerate(leaves)}
    calls[name] += 1
    return found, spec
