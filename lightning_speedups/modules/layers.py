"""The layers of a backbone from its input to its output: groups of modules that are frozen, thawed and paced together.

Which layers a model has is known by timm (its group matcher), or read from its blocks, or from its children.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

HEAD = "head"
"""What users call all that is not in the backbone."""


@dataclass(frozen=True)
class Layer:
    """A group of modules.

    Attributes:
        name: Unique in the backbone: a path in it, or ``"stem"``.
        modules: The modules that hold the layer's parameters and buffers themselves, not in children.
        root: Path of the encoder that it is of, as far as that is known.
    """

    name: str
    modules: tuple[nn.Module, ...]
    root: str = ""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the layer's parameters."""
        return (parameter for module in self.modules for parameter in module.parameters(recurse=False))


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation layer, torch's or anyone's.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3)), is_norm(nn.Linear(3, 3))
        (True, True, False)
    """
    torchs = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
    kind = type(module)
    # A container that is named after the norm in it is none itself.
    by_name = "norm" in kind.__name__.lower() and not any(True for _ in module.children())
    is_of_weights = kind.__module__.startswith("torch.nn.utils.")  # spectral norm, weight norm
    return not is_of_weights and (isinstance(module, torchs) or by_name)


def owners(root: nn.Module, without: Collection[nn.Module] = ()) -> dict[str, nn.Module]:
    """Return which module holds each parameter and buffer, under the tensor's name.

    Args:
        root: Where to look.
        without: Modules that are left out, with all that is in them.

    Example:
        >>> list(owners(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2, affine=False))))
        ['0.weight', '0.bias', '2.running_mean', '2.running_var', '2.num_batches_tracked']
    """
    left_out = {module for one in without for module in one.modules()}
    return {
        f"{path}.{name}".lstrip("."): module
        for path, module in root.named_modules()
        if module not in left_out
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def tied_parameters(root: nn.Module, group_of: Mapping[nn.Module, str]) -> list[tuple[str, str]]:
    """Return the names of parameters that are in several groups, or in one and outside of all, with another name each.

    Those that are frozen already are left out.

    Args:
        root: Where to look.
        group_of: The groups of the modules that are in one.

    Example:
        >>> net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
        >>> net[2].weight = net[0].weight
        >>> tied_parameters(net, {net[0]: "body", net[1]: "body"})
        [('2.weight', '0.weight')]
    """
    first: dict[int, tuple[str, str | None]] = {}
    tied = []
    held = sorted(owners(root).items(), key=lambda one: one[1] not in group_of)  # what is in a group comes first
    for name, owner in held:
        tensor, group = getattr(owner, name.rpartition(".")[2]), group_of.get(owner)
        other, its_group = first.setdefault(id(tensor), (name, group))
        if group != its_group and tensor.requires_grad:
            tied.append((name, other))
    return tied


def find_layers_in(root: nn.Module, without: Collection[nn.Module] = ()) -> list[Layer]:
    """Take each block of a network for a layer, all that stands before them for another, and all that follows for one
    more; or each child, if there is no one list of blocks.

    That list is a ModuleList or Sequential of modules of one class with children of their own, longer than any other,
    which holds more than half of the parameters outside embeddings, and is no stage beside others, as in a ResNet.
    Embeddings outside the blocks go before them, wherever they were registered.

    Args:
        root: A module that calls its children in the order in which they were registered.
        without: Modules that are left out.

    Example:
        >>> blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 2, enable_nested_tensor=False)
        >>> net = nn.ModuleDict({"blocks": blocks, "pooler": nn.Linear(4, 4), "words": nn.Embedding(9, 4)})
        >>> [layer.name for layer in find_layers_in(net)]
        ['words', 'blocks.layers.0', 'blocks.layers.1', 'pooler']
    """
    held = owners(root, without)
    blocks = _blocks(root, held)
    if not blocks:
        return layers_by_child(root, without)
    numbers, after = {}, 0
    for name, module in held.items():
        number = next((i for i, path in enumerate(blocks, 1) if name.startswith(f"{path}.")), after)
        after = len(blocks) + 1 if number else after
        if number == after and isinstance(module, nn.Embedding):
            number = 0
        has_parameters = any(True for _ in module.parameters(recurse=False))
        numbers[name] = number if has_parameters else min(number, len(blocks))
    return layers_by_number(root, numbers, without)


def _blocks(root: nn.Module, held: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the blocks that a network mainly consists of; nothing if there are none."""
    lists = _lists_of_blocks(root, held)
    several = {path: blocks for path, (_, blocks) in lists.items() if len(blocks) > 1}
    alike = Counter((_above(path), kind) for path, (kind, _) in lists.items())
    beside = Counter(map(_above, several))
    stages = {path for path in several if beside[_above(path)] > 1 or alike[_above(path), lists[path][0]] > 1}
    longest = sorted((blocks for path, blocks in several.items() if path not in stages), key=len)[-2:]
    if not longest or (len(longest) > 1 and len(longest[0]) == len(longest[1])):
        return []
    within = {name for name in held if name.startswith(tuple(f"{path}." for path in longest[-1]))}
    others = [name for name in held.keys() - within if not isinstance(held[name], nn.Embedding)]
    return longest[-1] if _size(held, within) > _size(held, others) else []


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _lists_of_blocks(root: nn.Module, held: Mapping[str, nn.Module]) -> dict[str, tuple[type, list[str]]]:
    """Return the class and the paths of the blocks in each list of such, but for lists in the blocks of another."""
    lists: dict[str, tuple[type, list[str]]] = {}
    outer: tuple[str, ...] = ()
    holding = {name[:end] for name in held for end, sign in enumerate(name) if sign == "."}
    for path, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or path.startswith(outer):
            continue
        inner = {f"{path}.{name}".lstrip("."): block for name, block in module.named_children()}
        blocks = {path: block for path, block in inner.items() if path in holding}
        kinds = {*map(type, blocks.values())}
        if len(kinds) == 1 and all(any(True for _ in block.children()) for block in blocks.values()):
            lists[path] = kinds.pop(), [*blocks]
            outer += tuple(f"{block}." for block in blocks) if len(blocks) > 1 else ()
    return lists


def layers_by_child(root: nn.Module, without: Collection[nn.Module] = ()) -> list[Layer]:
    """Take each child of a module for a layer, in the order in which they were registered.

    A child that holds everything, and a list that holds almost everything, are looked into. Norms go with what stands
    before them; what the module holds itself, with its first child.

    Args:
        root: A module that calls its children one after the other.
        without: Modules that are left out.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> [layer.name for layer in layers_by_child(nn.Sequential(net, nn.Flatten()))]
        ['0.0', '0.3']
    """
    held = owners(root, without)
    paths = list(_children(root, held)) or ["stem"]
    number_of = {name: next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), 0) for name in held}
    return _layers(held, {paths[number]: names for number, names in _grouped(held, number_of).items()})


def _children(root: nn.Module, held: Mapping[str, nn.Module], path: str = "") -> Iterator[str]:
    """Return the paths of the children that hold anything, and instead of one that holds almost all, its children's."""
    within = {name for name in held if name.startswith(path and f"{path}.")}
    for name, child in root.get_submodule(path).named_children():
        inner = f"{path}.{name}".lstrip(".")
        its_own = {name for name in within if name.startswith(f"{inner}.")}
        most = _size(held, its_own) > 0.8 * _size(held, held)
        goes_in_order = isinstance(child, (nn.Sequential, nn.ModuleList)) and most
        if any(True for _ in child.children()) and its_own and (its_own == within or goes_in_order):
            yield from _children(root, held, inner)
        elif its_own:
            yield inner


def _size(held: Mapping[str, nn.Module], names: Iterable[str]) -> int:
    return sum(getattr(held[name], name.rpartition(".")[2]).numel() for name in names)


def layers_by_number(root: nn.Module, number_of: Mapping[str, int], without: Collection[nn.Module] = ()) -> list[Layer]:
    """Take all that has one number for a layer; norms alone go with what stands before them.

    Args:
        root: The module.
        number_of: The layer's number, counted from the input, of each parameter. Buffers that it lacks go with what
            stands before them.
        without: Modules that are left out.

    Example:
        >>> net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
        >>> numbers = {name: int(name[0] == "c") for name in net.state_dict()}
        >>> [layer.name for layer in layers_by_number(net, numbers)]
        ['stem', 'c']
    """
    held = owners(root, without)
    numbers, number = {}, min(number_of.values(), default=0)
    for name in held:
        numbers[name] = number = number_of.get(name, number)
    groups = list(_grouped(held, numbers).values())
    return _layers(held, {_name_of(groups, i, held): group for i, group in enumerate(groups)})


def _grouped(held: Mapping[str, nn.Module], number_of: Mapping[str, int]) -> dict[int, list[str]]:
    """Gather tensors by number, from the lowest on; norms alone go with what stands before them."""
    numbered: dict[int, list[str]] = defaultdict(list)
    for name, number in number_of.items():
        numbered[number].append(name)
    grouped: dict[int, list[str]] = {}
    for number, names in sorted(numbered.items()):
        goes_on = grouped and all(is_norm(held[name]) for name in names)
        grouped.setdefault(max(grouped) if goes_on else number, []).extend(names)
    return grouped


def _name_of(groups: Sequence[Sequence[str]], i: int, held: Mapping[str, nn.Module]) -> str:
    """Return the shortest path that no other layer shares and that most of this one is under."""
    elsewhere = {name for j, group in enumerate(groups) if j != i for name in group}
    most = _size(held, groups[i]) * (1 if i == 0 else 0.5)
    paths = {name.rpartition(".")[0] for name in groups[i]}
    candidates = {".".join(path.split(".")[:end]) for path in paths if path for end in range(1, path.count(".") + 2)}
    for path in sorted(candidates, key=lambda path: (path.count("."), path)):
        under = [name for name in groups[i] if name.startswith(f"{path}.")]
        if _size(held, under) >= most and not any(name.startswith(f"{path}.") for name in elsewhere):
            return path
    return "stem" if i == 0 else f"layer {i}"


def _layers(held: Mapping[str, nn.Module], grouped: Mapping[str, Iterable[str]]) -> list[Layer]:
    layers, taken = [], set[nn.Module]()
    for name, tensors in grouped.items():
        modules = [module for module in dict.fromkeys(held[tensor] for tensor in tensors) if module not in taken]
        taken.update(modules)
        if modules:
            layers.append(Layer(unreserved(name), tuple(modules)))
    return layers


def find_timm_network(module: nn.Module) -> tuple[Any, list[nn.Module]]:
    """Return the first of timm's networks in a module, and its classifiers; None and nothing if there is none.

    Example:
        >>> find_timm_network(nn.Sequential(nn.Linear(2, 2)))
        (None, [])
    """
    parts = (part for part in module.modules() if hasattr(part, "get_classifier") and hasattr(part, "reset_classifier"))
    network: Any = next(parts, None)
    if network is None:
        return None, []
    classifier = network.get_classifier()
    return network, list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]


def unreserved(name: str) -> str:
    """Return another name for a layer of a backbone that is called as the head is.

    Example:
        >>> unreserved("head"), unreserved("stem")
        ('backbone.head', 'stem')
    """
    return f"backbone.{name}" if name == HEAD else name


def pick_layers(names: str | Iterable[str], layers: Sequence[Layer]) -> set[str]:
    """Return the names of the layers that a user means.

    Args:
        names: Layers' names, paths that hold several layers, both also with the encoder's own path before them and with
            wildcards, ``"all"``, or ``"head"``, which is returned as it is.
        layers: The backbone's layers.

    Raises:
        LookupError: If there is no such layer; its argument is the name.

    Example:
        >>> blocks = [Layer("stem", ()), Layer("blocks.0", ()), Layer("blocks.1", (), root="model.vit")]
        >>> sorted(pick_layers("blocks", blocks)), sorted(pick_layers(["head", "vit.blocks.1"], blocks))
        (['blocks.0', 'blocks.1'], ['blocks.1', 'head'])
    """
    picked = set()
    for name in [names] if isinstance(names, str) else names:
        found = {layer.name for layer in layers if name == "all" or _fit(name, layer.name, layer.root) is not None}
        if name == HEAD:
            found = {HEAD}
        if not found:
            raise LookupError(name)
        picked |= found
    return picked


def matches(pattern: str, layers: Sequence[Layer]) -> list[str]:
    """Return the paths that a pattern fits and that layers stand at or under, in the layers' order.

    Args:
        pattern: A path whose steps may be wildcards, as of ``fnmatch``; each stands for one step.
        layers: The backbone's layers.

    Example:
        >>> matches("net.*", [Layer("stem", ()), Layer("net.0.a", ()), Layer("net.0.b", ()), Layer("net.1", ())])
        ['net.0', 'net.1']
    """
    return list(dict.fromkeys(path for layer in layers if (path := _fit(pattern, layer.name, layer.root))))


def split_layers(layers: Sequence[Layer], names: Iterable[str], root: nn.Module) -> list[Layer]:
    """Return the layers with what a user names inside one of them as a layer of its own.

    Args:
        layers: The backbone's layers.
        names: As for `pick_layers`. Those that layers stand at or under split nothing.
        root: The module from which the layers' names lead.

    Example:
        >>> net = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 4)})
        >>> [layer.name for layer in split_layers([Layer("stem", tuple(net.children()))], ["places"], net)]
        ['stem', 'places']
    """
    path_of = {module: path.removeprefix("_orig_mod.") for path, module in root.named_modules()}
    for name in names:
        if name in (HEAD, "all") or any(_fit(name, layer.name, layer.root) is not None for layer in layers):
            continue
        layers = [part for layer in layers for part in _split(layer, name, path_of)]
    return list(layers)


def _split(layer: Layer, name: str, path_of: Mapping[nn.Module, str]) -> list[Layer]:
    parts = defaultdict[str, list[nn.Module]](list)
    for module in layer.modules:
        parts[_fit(name, path_of.get(module, ""), layer.root) or layer.name].append(module)
    return [replace(layer, name=unreserved(part), modules=tuple(modules)) for part, modules in parts.items()]


def _fit(pattern: str, path: str, root: str) -> str | None:
    """Return the beginning of a path that a pattern fits, which may lead from further up; None if it does not."""
    above = root.split(".") if root else []
    for start in [""] + [".".join((*above[i:], "")) for i in range(len(above))]:
        steps, wanted = f"{start}{path}".split("."), pattern.split(".")
        if len(wanted) <= len(steps) and all(map(fnmatchcase, steps, wanted)):
            return ".".join(steps[: len(wanted)])[len(start) :]
    return None


def rates_by_depth(
    layers: int, *, decay: float | None = None, ends: tuple[float, float] = (0.1, 0.1)
) -> tuple[float, ...]:
    """Return the learning rate of each layer of a backbone over the head's, from the input on.

    Args:
        layers: How many layers the backbone has.
        decay: Ratio of each layer's rate to the next one's; the last layer's to the head's.
        ends: Without it: ratios of the first and of the last layer, with geometric steps between.

    Example:
        >>> rates_by_depth(3, decay=0.5), rates_by_depth(3, ends=(0.01, 1.0))
        ((0.125, 0.25, 0.5), (0.01, 0.1, 1.0))
    """
    if decay is not None:
        return tuple(decay ** (layers - i) for i in range(layers))
    first, last = ends
    return tuple(last * (first / last) ** ((layers - 1 - i) / max(1, layers - 1)) for i in range(layers))
