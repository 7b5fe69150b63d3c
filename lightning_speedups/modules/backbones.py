"""Which part of a module is the backbone that is fine-tuned, and what its layers are.

What the head of a network is, is known by timm and by Hugging Face's transformers, or read from its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_speedups.modules.layers import (
    Layer,
    find_layers_in,
    find_timm_network,
    layers_by_child,
    layers_by_number,
    owners,
    unreserved,
)

HEADS = ("fc", "classifier", "head", "heads", "lm_head")
"""What networks call their last layers."""

Picked = str | Sequence[str] | Callable[[Any], Any] | None


class NoBackboneError(LookupError):
    """There is no such backbone; what was found instead, and the way out."""


def are_paths(backbone: object) -> bool:
    """Tell whether something is an attribute path, or a list of different ones.

    Example:
        >>> are_paths("model.bert"), are_paths(["image", "text"]), are_paths(["image", "image"]), are_paths([])
        (True, True, False, False)
    """
    paths = [backbone] if isinstance(backbone, str) else backbone
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) and path for path in paths):
        return False
    return 0 < len(paths) == len({*paths})


def find_layers(
    module: nn.Module, backbone: Picked, saved: Collection[str] = ()
) -> tuple[list[nn.Module], list[Layer]]:
    """Return the modules that a backbone consists of, and its layers, from its input on.

    timm's models say themselves what their layers are; of others each block is one, or each child. Layers of several
    paths come in turn: those with as many behind them stand together. Several modules of a callable are one each.

    Args:
        module: The module that trains.
        backbone: Attribute path, a list of paths, a callable that picks one or several modules, or None: the network in
            it without its head.
        saved: Names of the layers in the checkpoint of a resumed run, which may have been found in an older way.

    Raises:
        NoBackboneError: If there is no such thing.

    Example:
        >>> net = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "head": nn.ReLU()})
        >>> [layer.name for layer in find_layers(net, "backbone")[1]]
        ['0', '1']
    """
    roots, heads = _without_head(module) if backbone is None else (_picked(module, backbone), [])
    paths = {inner: path for path, inner in module.named_modules()}
    if len(roots) == 1:
        path = ".".join(step for step in paths.get(roots[0], "").split(".") if step != "_orig_mod")
        return roots, [replace(layer, root=path) for layer in _layers(roots[0], heads, saved)]
    before = [roots[:i] for i in range(len(roots))]  # a module that is in two of them belongs to the first
    if callable(backbone):
        held = [owners(root, without).values() for root, without in zip(roots, before, strict=True)]
        return roots, [
            Layer(unreserved(paths.get(root, f"part {i}")), tuple(dict.fromkeys(found)))
            for i, (root, found) in enumerate(zip(roots, held, strict=True))
            if found
        ]
    layers = [(paths[root], _layers(root, without, saved)) for root, without in zip(roots, before, strict=True)]
    behind = [
        (len(found) - i, Layer(f"{path}.{layer.name}", layer.modules, path))
        for path, found in layers
        for i, layer in enumerate(found)
    ]
    return roots, [layer for _, layer in sorted(behind, key=lambda one: -one[0])]


def _layers(root: nn.Module, without: Sequence[nn.Module], saved: Collection[str]) -> list[Layer]:
    root = getattr(root, "_orig_mod", root)  # of a compiled module, under whose names no pattern fits
    matcher: Any = getattr(root, "group_matcher", None)
    if matcher is None:
        layers = find_layers_in(root, without)
        is_older = not {layer.name for layer in layers}.issuperset(saved)
        older = layers_by_child(root, without) if is_older else layers
        return older if {layer.name for layer in older}.issuperset(saved) else layers
    from timm.models import group_parameters

    try:
        patterns = matcher(coarse=True)
    except AssertionError:  # a family that has no coarse groups
        patterns = matcher(coarse=False)
    return layers_by_number(root, group_parameters(root, patterns, reverse=True), without)


def _picked(module: nn.Module, backbone: str | Sequence[str] | Callable[[Any], Any]) -> list[nn.Module]:
    """Return the modules at a path or several, or those that a callable picks."""
    if callable(backbone):
        found = backbone(module)
        roots = list(found) if isinstance(found, Iterable) and not isinstance(found, nn.Module) else [found]
        if roots and all(isinstance(root, nn.Module) for root in roots):
            return roots
        raise NoBackboneError(f"must pick nn.Modules, but it picked {found!r}", "Return one, or a list of them.")
    try:
        return [module.get_submodule(path) for path in ([backbone] if isinstance(backbone, str) else backbone)]
    except AttributeError as error:
        has = [name for name, _ in module.named_children()]
        what = f"names nothing: {type(module).__name__} has no such submodule. It has {has}"
        raise NoBackboneError(what, "Name one, give a callable, or None for a network with a head.") from error


def _without_head(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the network with a head in a module, and what of it is no backbone."""
    found = _networks(module)
    way_out = "Give the backbone's attribute path, or the network's, with its last layer in `schedule={0: ...}`."
    if len(found) > 1:
        raise NoBackboneError(f"looks for a network with one head, but found the heads {[*found]}", way_out)
    if not found:
        network, _ = find_timm_network(module)
        what = f"looks for a network with a head in {type(module).__name__}, but found none"
        if network is not None:
            what = f"looks for a head, but the classifier of {type(network).__name__} has no parameters"
            way_out = "Create it with `num_classes`, or name the backbone by its attribute path."
        has = [path for path, part in module.named_modules() if path and path.count(".") < 2 and _trains(part)]
        raise NoBackboneError(f"{what}, and nothing that is called {', '.join(HEADS)}. It has {has}", way_out)
    ((network, heads),) = found.values()
    idle = [child for child in network.children() if network is module and not any(True for _ in child.parameters())]
    without = [*heads, *idle]
    inner = [child for child in network.children() if owners(child, without)]
    is_all = len(inner) == 1 and not owners(network, [*without, *inner])
    return (inner if is_all else [network]), without


def find_named_heads(network: nn.Module) -> list[list[str]]:
    """Return what may be the head of a network that is not timm's: the paths of its modules. Several say that it is not
    known which it is.

    It is what lies outside a Hugging Face model's ``base_model``, or what its ``get_output_embeddings`` returns, or a
    child that is called as heads are, with those called auxiliary (``aux_classifier``). Parameters must train in it,
    and outside of it.

    Args:
        network: Which one.

    Example:
        >>> net = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 2)})
        >>> find_named_heads(net), find_named_heads(net["fc"])
        ([['fc']], [])
    """
    children = {name: child for name, child in network.named_children() if _trains(child)}
    base = children.get(str(getattr(network, "base_model_prefix", None)))
    output: Any = getattr(network, "get_output_embeddings", lambda: None)()
    if base is not None:
        found = [[name for name, child in children.items() if child is not base]]
    elif isinstance(output, nn.Module):
        found = [[path for path, part in network.named_modules() if part is output]]
    else:
        auxiliary = [name for name in children if name.lower().startswith("aux")]
        found = [[name, *auxiliary] for name in HEADS if name in children]
    return [one for one in found if one and not children.keys() <= {*one}]


def has_head(network: nn.Module) -> bool:
    """Tell whether it is known what the head of a network is.

    Args:
        network: Which one.

    Example:
        >>> has_head(nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 2)})), has_head(nn.Linear(8, 2))
        (True, False)
    """
    return len(_networks(network)) == 1


def _networks(module: nn.Module) -> dict[str, tuple[nn.Module, list[nn.Module]]]:
    """Return the networks with a head in a module, and what the heads consist of, by the heads' paths."""
    network, classifiers = find_timm_network(module)
    if any(True for one in classifiers for _ in one.parameters()):
        return {"": (network, classifiers)}
    found = {}
    for path, part in _places(module):
        for names in find_named_heads(part):
            said = ", ".join(f"{path}.{name}".lstrip(".") for name in names)
            found[said] = part, [part.get_submodule(name) for name in names]
    return found


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module, its children, and what these are wrapped around, with their paths."""
    yield "", module
    for name, part in module.named_children():
        inner = [(name, part)]
        while len(inner) == 1 and _trains(inner[0][1]):
            path, child = inner[0]
            yield path, child
            inner = [(f"{path}.{name}", one) for name, one in child.named_children() if _trains(one)]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
