"""An exponential average of a module's tensors: what it keeps at an update, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def share_kept(horizon: float, step: int, every: int = 1) -> float:
    """Return the share of the average that an update keeps; the rest is the weights of the moment.

    It is (1 − 1/h) to the power ``every``, where h is the horizon, but (10 + step) / 9 at most: early in a run the
    average reaches back over a ninth of its steps.

    Args:
        horizon: Steps that the average reaches back over, 1 or more.
        step: Steps that were done, 0 or more.
        every: Steps from one update to the next, 1 or more.

    Example:
        >>> share_kept(1000.0, 100_000), share_kept(2.0, 100, every=3), round(share_kept(1000.0, 0), 6)
        (0.999, 0.125, 0.1)
    """
    return (1 - 1 / min(horizon, (10 + step) / 9)) ** every


def averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what is averaged: parameters and the running statistics of norms, where they have fractions.

    Args:
        module: The module.

    Returns:
        The tensors themselves, by all the names that they have in the state dict.

    Example:
        >>> list(averaged_tensors(nn.BatchNorm1d(3)))
        ['weight', 'bias', 'running_mean', 'running_var']
    """
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    buffers = module.named_buffers(remove_duplicate=False)
    named |= {name: one for name, one in buffers if name.endswith(("running_mean", "running_var"))}
    return {name: one for name, one in named.items() if one.is_floating_point() or one.is_complex()}


@torch.no_grad()
def exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Exchange the values of tensors, in place.

    Args:
        pairs: Of one shape each; no tensor comes twice.

    Example:
        >>> one, other = torch.zeros(1), torch.ones(1)
        >>> exchange([(one, other)])
        >>> one, other
        (tensor([1.]), tensor([0.]))
    """
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
