"""Frozen modules: no gradient, no running statistics that move, and all of it given back as it was."""

from __future__ import annotations

from collections.abc import Iterable

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
        self._in_eval: list[_StaysInEval] = []
        for module in modules:
            if train_norm and is_norm(module):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    parameter.grad = None  # an optimizer would go on stepping with it
                    self.parameters.append(parameter)
            if is_norm(module) or any(True for _ in module.buffers(recurse=False)):
                self._in_eval.append(_StaysInEval(module))

    def undo(self) -> None:
        """Give everything back."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for stand_in in self._in_eval:
            stand_in.undo()
        self.parameters, self._in_eval = [], []


class _StaysInEval:
    """Stands in for the ``train`` method of a frozen module, so that no ``model.train()`` moves its statistics.

    Its children go with the call: they may be of the head, or dropouts.
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
