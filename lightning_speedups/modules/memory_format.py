"""How the weights of convolutions lie in memory, and the optimizer's state beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The layout with the channels last, by the number of dimensions, those of the batch and the channels included."""


def format_of(module: nn.Module) -> torch.memory_format | None:
    """Return the layout that puts a convolution's channels last; None of what has no such layout.

    Example:
        >>> format_of(nn.Conv2d(3, 8, 3)), format_of(nn.Conv1d(3, 8, 3))
        (torch.channels_last, None)
    """
    return LAYOUTS.get(2 + len(module.kernel_size)) if isinstance(module, _ConvNd) else None


def make_channels_last(root: nn.Module) -> list[nn.Parameter]:
    """Lay the weights of all convolutions in two and three dimensions with their channels last, gradients included.

    Values and parameters stay the same objects. A weight that is computed (parametrizations, weight norm) or not made
    yet (lazy layers) stays as it is. Where both layouts are the same in memory (one input channel, 1×1), the strides
    change alone, to those that gradients come with, which DDP compares.

    Args:
        root: The module.

    Returns:
        The parameters whose layout has changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> len(make_channels_last(net)), net[0].weight.is_contiguous(memory_format=torch.channels_last)
        (2, True)
    """
    changed = []
    for module in root.modules():
        weight, layout = module._parameters.get("weight"), format_of(module)
        if weight is None or layout is None or nn.parameter.is_lazy(weight):
            continue
        if weight.stride() != torch.empty_like(weight, device="meta", memory_format=layout).stride():
            _lay(weight, layout)
            changed.append(weight)
    return changed


def make_contiguous(parameters: Iterable[nn.Parameter]) -> None:
    """Lay parameters and their gradients as torch makes them.

    Args:
        parameters: What to lay.

    Example:
        >>> net = nn.Conv2d(3, 8, 3)
        >>> make_contiguous(make_channels_last(net))
        >>> net.weight.is_contiguous()
        True
    """
    for parameter in parameters:
        _lay(parameter, torch.contiguous_format)


def _lay(parameter: nn.Parameter, layout: torch.memory_format) -> None:
    parameter.data = parameter.data.to(memory_format=layout)
    if parameter.grad is not None:
        parameter.grad.data = parameter.grad.data.to(memory_format=layout)


def match_state(optimizer: Optimizer) -> None:
    """Lay what an optimizer remembers of each parameter as the parameter itself.

    The fused steps of torch 2.14 on a CPU walk through memory without a look at strides: with another layout than the
    parameter's, as a checkpoint may have it, they mix up the elements and say nothing.

    Args:
        optimizer: Torch's, whose state is kept by parameters.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> optimizer.state[weight]["momentum_buffer"] = torch.ones(2, 3, 4, 4)
        >>> match_state(optimizer)
        >>> optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
        True
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items() if isinstance(parameter, Tensor) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def contiguous_state(optimizer: Optimizer, state: dict[str, Any], parameters: Collection[Tensor]) -> dict[str, Any]:
    """Return an optimizer's state dict in which what belongs to some parameters lies as torch makes it.

    Args:
        optimizer: Torch's.
        state: Its state dict, which is left alone.
        parameters: Some of its parameters.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
        >>> state = contiguous_state(optimizer, optimizer.state_dict(), [weight])
        >>> state["state"][0]["momentum_buffer"].is_contiguous()
        True
    """
    chosen = {id(one) for one in parameters}
    every = (one for group in optimizer.param_groups for one in group["params"])
    numbers = {number for number, one in enumerate(every) if id(one) in chosen}
    kept = {
        number: {name: one.contiguous() if isinstance(one, Tensor) else one for name, one in values.items()}
        for number, values in state.get("state", {}).items()
        if number in numbers
    }
    return state | {"state": state["state"] | kept} if kept else state
