"""Fit the tensors of a weight file to a module: containers, prefixes, another head; and one report of what fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module", "weights")
"""Where training programs keep the weights within a checkpoint, averaged ones first, as timm takes them."""

COUNTER = "num_batches_tracked"
"""End of the names that weights may lack: BatchNorm counts there, and hardly ever uses it."""

SHOWN = 5
"""Names of a list that a report shows."""


@dataclass(frozen=True)
class WeightReport:
    """What of a weight file went where; ``print`` shows it in a few lines.

    Attributes:
        source: Name of the file.
        loaded: Names of the module's tensors that came from the file.
        fresh: Names of the module's tensors that stay as they are, because they are of a head that is not in the file
            or has another shape there, or of a part that the file is not about.
        missing: Names of the module's tensors that should be in the file, and are not.
        unexpected: Names in the file that the module has no use for.
        surplus: Those of them that stand among the used ones, as further blocks of a deeper network do; counters apart.
        mismatched: (name, what stands in the file, what stands in the module) of the tensors that have another shape or
            kind in the file; those of the head are ``fresh`` as well.
        file_prefix: Where in the file the weights stand, as ``"model."``.
        module_prefix: Where in the module they belong.
        head: Those of ``loaded`` that are of the head.
    """

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, str, str], ...] = ()
    file_prefix: str = ""
    module_prefix: str = ""
    head: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[tuple[str, str, str], ...]:
        """The mismatched ones that are not of the head."""
        return tuple(entry for entry in self.mismatched if entry[0] not in self.fresh)

    def __str__(self) -> str:
        """Say it in a few lines."""
        total = len(self.loaded) + len(self.fresh) + len(self.missing) + len(self.wrong)
        first = f"{self.source}: {len(self.loaded)} of {total} tensors loaded"
        if self.file_prefix:
            first += f", from {self.file_prefix.rstrip('.')!r} in the file"
        if self.module_prefix:
            first += f", into {self.module_prefix.rstrip('.')!r} of the module"
        shapes = {name: f"{name} is {theirs} in the file, {mine} here" for name, theirs, mine in self.mismatched}
        lists = {
            "missing in the file": self.missing,
            "other shape or kind": [shapes[name] for name, _, _ in self.wrong],
            "left as they were (the head, or another part)": [shapes.get(name, name) for name in self.fresh],
            "in the file only": self.unexpected,
            "the head, too, came from the file": self.head,
        }
        lines = [f"  {title} ({len(names)}): {shortened(names)}" for title, names in lists.items() if names]
        return "\n".join([first, *lines])


def shortened(names: Collection[str]) -> str:
    """Name the first few and count the rest.

    Example:
        >>> shortened(["a", "b", "c", "d", "e", "f", "g"])
        'a; b; c; d; e and 2 more'
    """
    rest = len(names) - SHOWN
    return "; ".join(list(names)[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def find_state(content: Any) -> dict[str, Any]:
    """Find the state dict in what a file holds: the file itself, or one of its entries, however deep.

    Args:
        content: What was read.

    Returns:
        Names and values, of which at least one is a tensor.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import torch
        >>> find_state({"epoch": 3, "model": {"state_dict": {"weight": torch.zeros(1)}}})
        {'weight': tensor([0.])}
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    known = [content[name] for name in CONTAINERS if _has_tensors(content.get(name))]
    holders = known or [value for value in content.values() if _has_tensors(value)]
    if known or len(holders) == 1:
        return find_state(holders[0])
    state = {name: value for name, value in content.items() if isinstance(name, str)}
    if not any(isinstance(value, Tensor) for value in state.values()):
        keys = shortened([str(key) for key in content]) or "nothing"
        hint = "; it has several dicts of tensors: save the one you mean alone" if len(holders) > 1 else ""
        raise ValueError(f"it holds no dict of tensors under a name that is known here, but {keys}{hint}")
    return state


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) or _has_tensors(v) for v in value.values())


def find_prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
    """Find where in the file, and where in the module, the same tensors stand: the pair under which most names match.

    Args:
        state: The file's tensors.
        own: The module's.

    Returns:
        (prefix in the file, prefix in the module), each empty or ending with a dot. Matching shapes count before
        matching names, then the shorter pair, then the file's order. The module's covers half of its names at least.

    Example:
        >>> import torch
        >>> one, two = torch.zeros(1), torch.zeros(2)
        >>> find_prefixes({"module.net.a.b": one, "module.net.c": two}, {"model.a.b": one, "model.c": two, "d": one})
        ('module.net.', 'model.')
    """
    names, shapes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    heads = Counter(name[:cut] for name in own for cut in _cuts(name))
    for mine in (prefix for prefix, count in heads.items() if 2 * count >= len(own)):
        inside = {name[len(mine) :]: tensor.shape for name, tensor in own.items() if name.startswith(mine)}
        for name, tensor in state.items():
            for cut in _cuts(name):
                names[name[:cut], mine] += name[cut:] in inside
                shapes[name[:cut], mine] += inside.get(name[cut:]) == tensor.shape
    return max(names, key=lambda pair: (shapes[pair], names[pair], -"".join(pair).count(".")), default=("", ""))


def _cuts(name: str) -> Iterable[int]:
    """Where a name may be cut into prefix and rest."""
    yield 0
    yield from (dot.end() for dot in re.finditer(r"\.", name))


def plain_name(name: str) -> str:
    """Return a tensor's name without what ``torch.compile`` adds to it.

    Example:
        >>> plain_name("model._orig_mod.fc.weight")
        'model.fc.weight'
    """
    return name.replace("_orig_mod.", "")


def fit_state(
    content: Mapping[str, Any], own: Mapping[str, Tensor], head: Collection[str] = (), source: str = "the weights"
) -> tuple[dict[str, Tensor], WeightReport]:
    """Pick what of a state dict fits a module; nothing is copied or changed.

    The head fits as a whole or stays as it is: a bias of other classes is of no use beside a new weight.

    Args:
        content: Names and tensors; what is no tensor is reported as unexpected.
        own: The module's state dict.
        head: The names in it that belong to the classifier.
        source: What the report calls the weights.

    Returns:
        The tensors to load, by the module's names, and the report.

    Example:
        >>> module, other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), nn.Sequential(nn.Linear(4, 3))
        >>> print(fit_state(other.state_dict(), module.state_dict(), head=["1.weight", "1.bias"])[1])
        the weights: 2 of 4 tensors loaded
          left as they were (the head, or another part) (2): 1.weight; 1.bias
    """
    state = {plain_name(name): value for name, value in content.items() if isinstance(value, Tensor)}
    own = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    head = own.keys() & head
    theirs, mine = find_prefixes(state, {plain_name(name): tensor for name, tensor in own.items()})
    places = {name: theirs + plain_name(name)[len(mine) :] for name in own if plain_name(name).startswith(mine)}
    given = {name: state[place] for name, place in places.items() if place in state and _is_kept(name, state[place])}
    alike = {name: tensor for name, tensor in given.items() if _is_alike(tensor, own[name])}
    head_fits = head <= alike.keys()
    fitting = {name: tensor for name, tensor in alike.items() if head_fits or name not in head}
    unused = state.keys() - places.values()
    return fitting, WeightReport(
        source,
        loaded=tuple(fitting),
        fresh=tuple(name for name in own if name not in places or (name in head and not head_fits)),
        missing=tuple(name for name in places if name not in given and not (name in head or name.endswith(COUNTER))),
        unexpected=tuple(name for name in content if plain_name(name) in unused or plain_name(name) not in state),
        mismatched=tuple((name, _described(given[name]), _described(own[name])) for name in given if name not in alike),
        file_prefix=theirs,
        module_prefix=mine,
        head=tuple(name for name in fitting if name in head),
        surplus=tuple(_surplus(list(state), unused)),
    )


def _is_kept(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor of a file still has its values: counters in a file of half precision are rounded."""
    return not (name.endswith(COUNTER) and tensor.is_floating_point())


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _surplus(names: Sequence[str], unused: Collection[str]) -> Iterable[str]:
    """The unused names within the parts that are used; not after the last used one: a head, or a longer end."""
    used = [name for name in names if name not in unused]
    if not used:
        return ()
    shared = max(cut for cut in _cuts(used[0]) if all(name.startswith(used[0][:cut]) for name in used))
    parts = tuple({used[0][:shared] + name[shared:].partition(".")[0] + "." for name in used})
    inner = names[: names.index(used[-1])]
    return (name for name in inner if name in unused and name.startswith(parts) and not name.endswith(COUNTER))


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def require_fit(report: WeightReport, backbone: Collection[str], strict: bool = True) -> None:
    """Refuse weights that are not the module's.

    Args:
        report: What fits.
        backbone: The module's names without those of the head.
        strict: Whether each of them must fit, with little surplus: a fifth as much at most. Else half of them must.

    Raises:
        ValueError: With the report.
    """
    counted = [name for name in backbone if not name.endswith(COUNTER)]
    loaded = len(set(report.loaded).intersection(counted))
    if loaded == 0 or 2 * loaded < len(counted):
        raise ValueError(
            f"These weights are of another model: {loaded} of {len(counted)} tensors of the backbone fit. Check the "
            f"model's name and options, or load into the part of the module that they are of.\n{report}"
        )
    if strict and (report.missing or report.wrong):
        raise ValueError(
            "Not all of the backbone is in these weights. Check the model's name and options, or use `strict=False` to "
            f"leave the rest as it is.\n{report}"
        )
    if strict and 5 * len(report.surplus) > loaded:
        raise ValueError(
            f"These weights are of another model: {len(report.surplus)} tensors stand among those that fit, and have "
            f"no place here, as {shortened(report.surplus)}. Check the model's name and options, or use "
            f"`strict=False` to do without them.\n{report}"
        )


def head_names(module: nn.Module, heads: Iterable[nn.Module]) -> frozenset[str]:
    """Return the names, in a module's state dict, of the tensors of some of its parts; none if that would be all.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> sorted(head_names(module, [module[1]]))
        ['1.bias', '1.weight']
    """
    own = module.state_dict(keep_vars=True)
    tensors = {id(tensor) for head in heads for tensor in head.state_dict(keep_vars=True).values()}
    names = frozenset(name for name, tensor in own.items() if id(tensor) in tensors)
    return names if len(names) < len(own) else frozenset()


def last_layer(module: nn.Module) -> list[nn.Module]:
    """Return what looks like a classifier: the last layer with parameters, where it is linear or a 1×1 convolution.

    Example:
        >>> last_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2), nn.Softmax(1)))
        [Linear(in_features=8, out_features=2, bias=True)]
        >>> last_layer(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        []
    """
    layers = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    pointwise = layers and isinstance(layers[-1], nn.Conv2d) and layers[-1].kernel_size == (1, 1)
    return layers[-1:] if pointwise or (layers and isinstance(layers[-1], nn.Linear)) else []
