"""Optimizers that become others when they are born, so that whatever is built on them has the others from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_speedups.attach.steps import Group


class Birth(NamedTuple):
    """What an optimizer is born with.

    Attributes:
        kind: Its class.
        groups: Its parameter groups.
        defaults: What groups hold that say nothing else.
    """

    kind: type[Optimizer]
    groups: list[Group]
    defaults: Group


@contextmanager
def born_as(change: Callable[[Birth], Birth | None]) -> Iterator[list[Birth]]:
    """While it lasts, optimizers are born as others: schedulers, which keep the optimizer they are given, need no care.

    Args:
        change: Takes what one would be born with, and returns with what it is, or None for no change. The class must do
            without an ``__init__`` of its own, since the constructor that was called runs to its end.

    Yields:
        With what all would have been born, a list that grows.

    Example:
        >>> import torch
        >>> class Still(Optimizer):
        ...     def step(self, closure=None): ...
        >>> with born_as(lambda birth: birth._replace(kind=Still)) as born:
        ...     optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.5)
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"], born[0].kind.__name__
        ('Still', 0.5, 'SGD')
    """
    init = Optimizer.__init__
    born: list[Birth] = []
    others: list[Optimizer] = []

    def __init__(self: Optimizer, params: Any, defaults: Group) -> None:
        if isinstance(params, Tensor):
            return init(self, params, defaults)  # torch says what is wrong with it
        birth = Birth(type(self), as_groups(params), defaults)
        changed = change(birth) if birth.groups else None
        born.append(birth)
        if changed is None:
            return init(self, birth.groups, defaults)
        others.append(self)
        self.__class__ = changed.kind
        init(self, changed.groups, changed.defaults)

    Optimizer.__init__ = __init__  # type: ignore[method-assign]
    try:
        yield born
    finally:
        Optimizer.__init__ = init  # type: ignore[method-assign]
        for optimizer in others:  # a fused one's constructor says that gradients are unscaled in its step
            vars(optimizer).pop("_step_supports_amp_scaling", None)


def as_groups(params: Iterable[Any]) -> list[Group]:
    """Return what an optimizer is given as parameter groups, whose parameters are in lists.

    Args:
        params: Parameters, pairs of names and parameters, or groups.

    Example:
        >>> as_groups([{"params": iter("ab"), "lr": 1}]), as_groups(iter("ab"))
        ([{'params': ['a', 'b'], 'lr': 1}], [{'params': ['a', 'b']}])
    """
    given = list(params)
    if given and not isinstance(given[0], dict):
        return [{"params": given}]
    return [
        {**group, "params": [held] if isinstance(held := group["params"], Tensor) else list(held)} for group in given
    ]
