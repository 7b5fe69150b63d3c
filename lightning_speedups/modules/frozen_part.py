"""What of a network is frozen, and where its frozen part ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from lightning_speedups.core.batch import tensors_in


def find_cuts(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the largest modules of which every parameter trains, and the modules that are in none of these, by name;
    lists of modules, which nobody calls, count as their parts. Dropout that is at work beside what trains counts as if
    it did: what comes to it is not random yet.

    Args:
        module: Where to look.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
        >>> cuts, outside = find_cuts(net)
        >>> list(cuts), list(outside)
        (['1'], ['', '0'])
        >>> [list(found) for found in find_cuts(net.requires_grad_(True))]
        [[''], []]
    """
    cuts: dict[str, nn.Module] = {}
    outside: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if any(not cut or f"{name}.".startswith(f"{cut}.") for cut in cuts):
            continue
        flags = [parameter.requires_grad for parameter in part.parameters()]
        is_cut = flags and all(flags) and not isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if isinstance(part, _DropoutNd) and part.training and part.p:
            is_cut = not is_frozen(module.get_submodule(name.rpartition(".")[0]))
        (cuts if is_cut else outside)[name] = part
    return cuts, outside


def different(one: Tensor, other: Tensor) -> Tensor:
    """Return, for each sample, how far two computations of one feature are apart, relative to its size.

    Args:
        one: ``(N, ...)``.
        other: The same.

    Example:
        >>> different(torch.tensor([[1.0, 0.0], [4.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.0000, 0.8000])
    """
    one, other = (values.reshape(len(values), -1).double() for values in (one, other))
    same = ((one == other) | (one.isnan() & other.isnan())).all(1)
    apart = (one - other).norm(dim=1) / torch.maximum(one.norm(dim=1), other.norm(dim=1))
    return torch.where(same, 0.0, apart.nan_to_num(1.0)).float()


def is_untrained(values: Any) -> bool:
    """Tell whether there are tensors of which none depends on what trains.

    Args:
        values: Tensors and other things, nested as they may be, in dataclasses and mappings too.

    Example:
        >>> is_untrained([torch.ones(2)]), is_untrained([torch.ones(2), torch.ones(2, requires_grad=True)])
        (True, False)
    """
    leaves = tree_leaves([_opened(leaf) for leaf in tree_leaves(values)])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(tensor.requires_grad for tensor in tensors)


def _opened(leaf: Any) -> Any:
    """Return what is in a dataclass or mapping of a kind that torch takes for one piece, as models return."""
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return vars(leaf)
    return dict(leaf) if isinstance(leaf, Mapping) else leaf


def is_frozen(module: nn.Module) -> bool:
    """Tell whether nothing in a module trains.

    Args:
        module: Which module.

    Example:
        >>> is_frozen(nn.Linear(2, 2)), is_frozen(nn.Linear(2, 2).requires_grad_(False)), is_frozen(nn.ReLU())
        (False, True, True)
    """
    return not any(parameter.requires_grad for parameter in module.parameters())


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module itself is compiled, by ``torch.compile`` or as TorchScript.

    Args:
        module: Which module.

    Example:
        >>> is_compiled(nn.Linear(2, 2)), is_compiled(torch.compile(nn.Linear(2, 2)))
        (False, True)
    """
    is_wrapped = isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"
    return is_wrapped or module._compiled_call_impl is not None


def memories(values: Any) -> set[int]:
    """Return where tensors have their values: the same for a tensor and its views.

    Args:
        values: Tensors and other things, nested as they may be.

    Example:
        >>> ones = torch.ones(4)
        >>> memories([ones]) == memories([ones.view(2, 2), None]), memories([ones]) == memories([ones.clone()])
        (True, False)
    """
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(values) if tensor.layout == torch.strided}


def checksum(tensors: Iterable[Tensor]) -> bytes:
    """Return something that changes when values do, at a small part of the cost of comparing them: their sums.

    Args:
        tensors: Of any kinds.

    Example:
        >>> weight = torch.ones(3)
        >>> before = checksum([weight])
        >>> weight.data.mul_(2)
        tensor([2., 2., 2.])
        >>> checksum([weight]) == before
        False
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        sums.setdefault(values.device, []).append(values.sum(dtype=torch.float32))
    return b"".join(torch.stack(found).cpu().numpy().tobytes() for found in sums.values())


def before(modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Any], Any]) -> ExitStack:
    """Call a function before each of some modules is called, while the context lasts.

    Args:
        modules: The modules, by name.
        see: Takes name, module, and what the module is given, as ``(args, kwargs)``; it may return these changed.
    """

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return see(name, module, (args, kwargs))

    hooks = ExitStack()
    for name, module in modules.items():
        hooks.enter_context(module.register_forward_pre_hook(partial(hook, name), prepend=True, with_kwargs=True))
    return hooks


def after(modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Any], None]) -> ExitStack:
    """Call a function after each of some modules was called, while the context lasts.

    Args:
        modules: The modules, by name.
        see: Takes name, module, and what the module returned.
    """

    def hook(name: str, module: nn.Module, args: Any, made: Any) -> None:
        see(name, module, made)

    hooks = ExitStack()
    for name, module in modules.items():
        hooks.enter_context(module.register_forward_hook(partial(hook, name)))
    return hooks
