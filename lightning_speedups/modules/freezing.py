"""Frozen modules: no gradient, no running statistics that move, no dropout, and all of it given back as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from itertools import chain

from torch import nn

from lightning_speedups.modules.layers import is_norm


class Frozen:
    """Freezes modules as long as it is not undone.

    Their parameters need no gradient and have none left from before. Norms, and whatever else keeps buffers, stay in
    eval mode after every ``.train()``.

    Args:
        modules: What to freeze, without the modules' children.
        train_norm: Leave norms as they are.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> frozen = Frozen(net)
        >>> net.train()[1].training, any(p.requires_grad for p in net.parameters())
        (False, False)
        >>> frozen.undo()
        >>> net[1].training, all(p.requires_grad for p in net.parameters())
        (True, True)
    """

    def __init__(self, modules: Iterable[nn.Module], train_norm: bool = False) -> None:
        self.parameters: list[nn.Parameter] = []
        keeping = []
        for module in modules:
            if train_norm and is_norm(module):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    parameter.grad = None  # an optimizer would go on stepping with it
                    self.parameters.append(parameter)
            if is_norm(module) or any(True for _ in module.buffers(recurse=False)):
                keeping.append(module)
        self._in_eval = InEval(keeping)

    def undo(self) -> None:
        """Give everything back."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._in_eval.undo()
        self.parameters = []


class InEval:
    """Keeps modules in eval mode after every ``.train()``, as long as it is not undone.

    Recurrent ones are left alone: cuDNN has no way back through them in that mode.

    Args:
        modules: Which ones, without their children.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._stand_ins = [_StaysInEval(module) for module in modules if not isinstance(module, nn.RNNBase)]

    def undo(self) -> None:
        """Give them their modes back."""
        for stand_in in reversed(self._stand_ins):
            stand_in.undo()
        self._stand_ins = []


def wholly_frozen(module: nn.Module, roots: Iterable[nn.Module], frozen: Set[nn.Module]) -> list[nn.Module]:
    """Return the modules in which nothing trains, with the containers and dropouts that belong to them.

    All that is in them is frozen, or they are in such a module; or they hold nothing at all and stand, in the order in
    which modules were registered, between two that are frozen. What holds nothing and is in a module that trains as
    well is none of them.

    Args:
        module: The whole.
        roots: Where in it to look.
        frozen: The modules in these that are frozen and hold parameters or buffers themselves.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
        >>> wholly_frozen(net, [net], {net[0], net[2]}) == [net[0], net[1], net[2]]
        True
        >>> wholly_frozen(net, [net], {net[0], net[2], net[4]}) == [net, *net]
        True
    """
    found = {part: None for root in roots for part in _frozen_in(root, frozen)}
    times = Counter(child for parent in module.modules() for child in parent.children())
    outside = {child for parent in module.modules() if parent not in found for child in parent.children()}
    shared = [part for part in found if times[part] > 1 and part in outside and not _holders(part)]
    trains = {inner for part in shared for inner in part.modules()}
    return [part for part in found if part not in trains]


def _frozen_in(root: nn.Module, frozen: Set[nn.Module]) -> list[nn.Module]:
    order, holders = list(root.modules()), _holders(root)
    found, before = set[nn.Module](), None
    for i, part in enumerate(order):
        around = {before, next((one for one in order[i:] if one in holders), None)}
        if (holders.intersection(part.modules()) or around) <= frozen:
            found.update(part.modules())
        before = part if part in holders else before
    return [part for part in order if part in found]


def _holders(root: nn.Module) -> set[nn.Module]:
    """The modules that hold a parameter or a buffer themselves."""
    own = {part: chain(part.parameters(recurse=False), part.buffers(recurse=False)) for part in root.modules()}
    return {part for part, tensors in own.items() if any(True for _ in tensors)}


class _StaysInEval:
    """Stands in for the ``train`` method of a frozen module, so that no ``model.train()`` moves its statistics.

    Its children go with the call: they may be of the head.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode_before = module, module.training
        self.own = module.__dict__.get("train")  # one that a user has put there
        module.training = False
        module.__dict__["train"] = self

    def __call__(self, mode: bool = True) -> nn.Module:
        if self.own is None:
            type(self.module).train(self.module, mode)
        else:
            self.own(mode)
        self.module.training = False
        return self.module

    def undo(self) -> None:
        del self.module.__dict__["train"]
        if self.own is not None:
            self.module.__dict__["train"] = self.own
        self.module.training |= self.mode_before  # somebody may have given it its mode back already
