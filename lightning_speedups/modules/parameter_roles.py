"""What each parameter of a network is to an optimizer: a matrix, or part of a norm, of an embedding, of the head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_speedups.modules.initialization import statistics_moved
from lightning_speedups.modules.layers import find_timm_network, is_norm
from lightning_speedups.modules.weights import find_heads, last_layer

LOOKED_UP = re.compile(r"embed|token|table|(?:^|_)(?:pos|places?)(?:_|itional|ition|$)")
"""How parameters are called that stand for places or tokens and multiply nothing."""


class Role(StrEnum):
    """What a parameter is; of one that is several things, the first."""

    EMBEDDING = "embedding"
    NORM_BIAS = "norm bias"
    NORM = "norm weight"
    HEAD = "head"
    HEAD_BIAS = "head bias"
    BIAS = "bias"
    GAIN = "gain"
    DEPTHWISE = "depthwise filter"
    MATRIX = "matrix"


def parameter_roles(module: nn.Module, head: str | None = None) -> dict[str, Role]:
    """Return what each parameter of a module is, frozen or not, by its first name.

    A matrix is a weight with outputs and inputs, two or more of each: of a linear layer, or a bank of filters, which is
    one matrix when flattened. Filters that see one channel each are none. A parameter that several parts share is what
    the most particular of them makes of it: an embedding that is tied to the head is an embedding.

    Args:
        module: The module.
        head: Path of its head; None: timm's classifier, or the last layer, if that is linear.

    Raises:
        ValueError: If there is no such submodule, or a parameter is complex or has no shape yet.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [f"{name} {role}" for name, role in parameter_roles(net).items()]
        ['0.weight matrix', '1.weight norm weight', '1.bias norm bias', '3.weight head', '3.bias head bias']
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_complex():
            kind = "one without a shape yet" if is_lazy(parameter) else f"one of {parameter.dtype}"
            raise ValueError(f"Expected real parameters that have their shapes, but got {name!r}, {kind}.")
    in_head = {part for one in _heads(module, head) for part in one.modules()}
    roles: dict[int, set[Role]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            roles.setdefault(id(parameter), set()).add(_role_in(part, name, parameter, part in in_head))
    order = list(Role)
    return {name: min(roles[id(parameter)], key=order.index) for name, parameter in module.named_parameters()}


def _heads(module: nn.Module, path: str | None) -> list[nn.Module]:
    heads = find_heads(module, path)
    if any(True for head in heads for _ in head.parameters()):
        return heads
    network, _ = find_timm_network(module)  # made without classes: the head is somebody's own
    inner = set() if network is None else set(network.modules())
    return [layer for layer in last_layer(module) if layer not in inner]


def _role_in(owner: nn.Module, name: str, parameter: nn.Parameter, is_head: bool) -> Role:
    is_bias = "bias" in name
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or (LOOKED_UP.search(name) and parameter.ndim > 1):
        return Role.EMBEDDING
    if is_norm(owner):
        return Role.NORM_BIAS if is_bias else Role.NORM
    if is_head:
        return Role.HEAD if parameter.ndim > 1 else Role.HEAD_BIAS
    if sum(size > 1 for size in parameter.shape) < 2:
        return Role.BIAS if is_bias else Role.GAIN
    return Role.MATRIX if min(parameter.shape[:2]) > 1 else Role.DEPTHWISE


def check_groups(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameter groups that lack a trainable parameter of a module, or have one twice.

    Args:
        module: The module.
        groups: Parameter groups, with their parameters in lists.

    Raises:
        ValueError: If one is in no group, whose gradients would pile up unseen, or in more than one.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> check_groups(net, [{"params": [net.weight]}])
        Traceback (most recent call last):
        ValueError: Expected each trainable parameter to be in one group, but got 'bias' in none.
    """
    times = Counter(id(parameter) for group in groups for parameter in group["params"])
    for name, parameter in module.named_parameters():
        if times[id(parameter)] > 1 or (parameter.requires_grad and not times[id(parameter)]):
            where = "several" if times[id(parameter)] else "none"
            raise ValueError(f"Expected each trainable parameter to be in one group, but got {name!r} in {where}.")


def looks_trained(module: nn.Module) -> bool:
    """Tell whether norms show that a network was trained before: BatchNorm's statistics have moved, or the weights of
    another norm, which begin alike, differ.

    Example:
        >>> net = nn.LayerNorm(2)
        >>> looks_trained(net)
        False
        >>> nn.init.uniform_(net.weight).shape, looks_trained(net)
        (torch.Size([2]), True)
    """
    norms = [part for part in module.modules() if is_norm(part) and not isinstance(part, _BatchNorm)]
    weights = [one for norm in norms for one in norm.parameters(recurse=False) if one.numel()]
    return statistics_moved(module) or any(bool((one != one.flatten()[0]).any()) for one in weights)
