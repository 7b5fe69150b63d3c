"""Fit the tensors of a weight file to a module: containers, prefixes, another head; and one report of what fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_speedups.modules.layers import find_timm_network

CONTAINERS = ("", "state_dict", "model_state_dict", "model", "net", "module", "weights")
"""Under which keys training programs keep the weights: none, or these; others are looked through afterwards."""

AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged?)(?:[._]|$)")
"""How averaged weights are called."""

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
        others: Where else in the file weights stand that would fit as well, and differ.
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
    others: tuple[str, ...] = ()

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
            "other weights in the file that fit as well, not loaded": self.others,
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


def find_states(content: Any) -> dict[str, dict[str, Any]]:
    """Find the dicts of tensors in what a file holds: the file itself, or its entries, however deep; no optimizer's.

    Args:
        content: What was read.

    Returns:
        By the keys that lead to it, each followed by a dot, what a dict holds: names and values, of which at least one
        is a tensor.

    Raises:
        ValueError: If there is none.

    Example:
        >>> find_states({"epoch": 3, "model": {"state_dict": {"weight": torch.zeros(1)}}})
        {'model.state_dict.': {'weight': tensor([0.])}}
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    states = dict(_states(content))
    if not states:
        raise ValueError(f"it holds no dict of tensors, but {shortened([str(key) for key in content]) or 'nothing'}")
    return states


def _states(content: Mapping[Any, Any], path: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    state = {name: value for name, value in content.items() if isinstance(name, str) and not isinstance(value, Mapping)}
    if any(isinstance(value, Tensor) for value in state.values()):
        yield path, state
    for key, value in content.items():
        if isinstance(value, Mapping) and "param_groups" not in value:
            yield from _states(value, f"{path}{key}.")


@dataclass(frozen=True)
class Match:
    """Where in a file the weights of a module stand.

    Attributes:
        path: The keys that lead to the dict, each followed by a dot.
        theirs: Prefix of their names in it, empty or ending with a dot.
        mine: Prefix of the same names in the module.
        others: Where else in the file weights stand that fit as well, and are others.
    """

    path: str
    theirs: str
    mine: str
    others: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Where it stands, in one word."""
        return (self.path + self.theirs).rstrip(".")

    @property
    def rank(self) -> tuple[bool, int]:
        """What it is by its name: averaged weights come first, then the file itself, then what is known here."""
        top = self.path.partition(".")[0]
        return not AVERAGED.search(self.key), (*CONTAINERS, top).index(top)


def match_states(states: Mapping[str, Mapping[str, Any]], own: Mapping[str, Tensor], key: str | None = None) -> Match:
    """Find which of a file's sets of weights is the module's: that of which most tensors fit.

    Of several that fit alike and differ, averaged ones come first, then those under a key that is known here.

    Args:
        states: From `find_states`.
        own: The module's state dict; tied tensors are one where it is made with ``keep_vars=True``.
        key: Where the wanted ones stand; None to find out.

    Raises:
        ValueError: If nothing stands under the key, or several sets fit, and nothing tells which is meant.

    Example:
        >>> one, other = torch.zeros(1), torch.ones(1)
        >>> match_states({"model.": {"a": one}, "ema.": {"a": other}, "optimizer.": {"b": one}}, {"a": one})
        Match(path='ema.', theirs='', mine='', others=('model',))
    """
    tensors = {path: named_tensors(state) for path, state in states.items()}
    plain = {plain_name(name): tensor for name, tensor in own.items()}
    scores = {Match(path, "", ""): (0, 0) for path in states}
    scores |= {Match(path, *pair): score for path in states for pair, score in _scores(tensors[path], plain).items()}
    if key is not None:
        has = shortened(sorted({one.key.partition(".")[0] for one in scores if one.key}))
        scores = {one: score for one, score in scores.items() if f"{one.key}.".startswith(f"{key}.")}
        if not scores:
            raise ValueError(f"Expected `key` to be where weights stand in the file, but got {key!r}. It has {has}.")
    best = max(scores.values())
    if 2 * best[0] < sum(not name.endswith(COUNTER) for name in own):  # another model's, or names to be translated
        scores = {one: (len(tensors[one.path]), 0) for one in scores if scores[one] == best}
    most = max(score[0] for score in scores.values())  # a head that does not fit makes no difference
    alike = [one for one in scores if scores[one][0] == most]
    first = min(alike, key=lambda one: (one.rank, (one.path + one.theirs + one.mine).count(".")))
    given = {one: _given(tensors[one.path], own, one) if best[0] else tensors[one.path] for one in alike}
    rivals = [one for one in alike if not _is_same(given[one], given[first])]
    _require_one(first, [one for one in rivals if one.rank == first.rank])
    return replace(first, others=tuple(dict.fromkeys(one.key for one in rivals)))


def _require_one(first: Match, rivals: Sequence[Match]) -> None:
    if any(one.key != first.key for one in rivals):
        keys = shortened([repr(one.key) for one in (first, *rivals)])
        raise ValueError(
            f"It holds several sets of weights that fit alike: {keys}. Say which is meant, as "
            f"`load_weights(module, path, key={first.key!r})`."
        )
    if rivals:
        raise ValueError(
            f"Its weights fit several parts of the module: {shortened([one.mine[:-1] for one in (first, *rivals)])}. "
            f"Load them into the one that is meant, as `load_weights(module.{first.mine[:-1]}, path)`."
        )


def _given(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], match: Match) -> dict[str, Tensor]:
    return fit_state(tensors, own, prefixes=(match.theirs, match.mine))[0]


def _is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def find_prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
    """Find where in the file, and where in the module, the same tensors stand: the pair under which most names match.

    Args:
        state: The file's tensors.
        own: The module's.

    Returns:
        (prefix in the file, prefix in the module), each empty or ending with a dot. Matching shapes count before
        matching names, then the shorter pair, then the file's order. The module's covers half of its names at least.

    Example:
        >>> one, two = torch.zeros(1), torch.zeros(2)
        >>> find_prefixes({"module.net.a.b": one, "module.net.c": two}, {"model.a.b": one, "model.c": two, "d": one})
        ('module.net.', 'model.')
    """
    scores = _scores(state, own)
    return max(scores, key=lambda pair: (scores[pair], -"".join(pair).count(".")), default=("", ""))


def _scores(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[int, int]]:
    """Count the matching shapes, and the matching names, under each pair of prefixes; counters apart."""
    names, shapes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    state = {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}
    heads = Counter(name[:cut] for name in own for cut in _cuts(name))
    for mine in (prefix for prefix, count in heads.items() if 2 * count >= len(own)):
        inside = {name[len(mine) :]: tensor for name, tensor in own.items() if name.startswith(mine)}
        for name, tensor in state.items():
            for cut in _cuts(name):
                names[name[:cut], mine] += name[cut:] in inside
                shapes[name[:cut], mine] += name[cut:] in inside and _is_alike(tensor, inside[name[cut:]])
    return {pair: (shapes[pair], names[pair]) for pair in names}


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


def named_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, by their plain names.

    Example:
        >>> named_tensors({"_orig_mod.weight": torch.zeros(1), "epoch": 3})
        {'weight': tensor([0.])}
    """
    return {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}


def fit_state(
    content: Mapping[str, Any],
    own: Mapping[str, Tensor],
    head: Collection[str] = (),
    source: str = "the weights",
    prefixes: tuple[str, str] | None = None,
) -> tuple[dict[str, Tensor], WeightReport]:
    """Pick what of a state dict fits a module; nothing is copied or changed.

    The head fits as a whole or stays as it is: a bias of other classes is of no use beside a new weight.

    Args:
        content: Names and tensors; what is no tensor is reported as unexpected.
        own: The module's state dict; where it is made with ``keep_vars=True``, tied tensors are known, and one name of
            theirs in the file is enough.
        head: The names in it that belong to the classifier.
        source: What the report calls the weights.
        prefixes: Where the weights stand in the file and in the module; None to find out.

    Returns:
        The tensors to load, by the module's names, and the report.

    Example:
        >>> module, other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), nn.Sequential(nn.Linear(4, 3))
        >>> print(fit_state(other.state_dict(), module.state_dict(), head=["1.weight", "1.bias"])[1])
        the weights: 2 of 4 tensors loaded
          left as they were (the head, or another part) (2): 1.weight; 1.bias
    """
    state = named_tensors(content)
    own = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    head = own.keys() & head
    theirs, mine = prefixes or find_prefixes(state, {plain_name(name): tensor for name, tensor in own.items()})
    plain = {name: plain_name(name) for name in own}
    places = {name: theirs + plain[name][len(mine) :] for name in own if plain[name].startswith(mine)}
    given = {name: state[place] for name, place in places.items() if place in state and _is_kept(name, state[place])}
    tied = {id(own[name]): tensor for name, tensor in reversed(given.items())}
    given |= {name: tied[id(tensor)] for name, tensor in own.items() if name not in given and id(tensor) in tied}
    alike = {
        name: given[name]
        for name, tensor in own.items()
        if name in given and _is_alike(given[name], tensor) and _is_equal(given[name], tied[id(tensor)])
    }
    head_fits = head <= alike.keys()
    fitting = {name: tensor for name, tensor in alike.items() if head_fits or name not in head}
    unused = state.keys() - places.values()
    return fitting, WeightReport(
        source,
        loaded=tuple(fitting),
        fresh=tuple(n for n in own if n not in places.keys() | given.keys() or (n in head and not head_fits)),
        missing=tuple(name for name in places if name not in given and not (name in head or name.endswith(COUNTER))),
        unexpected=tuple(name for name in content if plain_name(name) in unused or plain_name(name) not in state),
        mismatched=tuple((name, *_difference(given[name], own[name])) for name in given if name not in alike),
        file_prefix=theirs,
        module_prefix=mine,
        head=tuple(name for name in fitting if name in head),
        surplus=tuple(_surplus(list(state), unused)),
    )


def _is_kept(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor of a file still has its values: counters in a file of half precision are rounded."""
    return not (name.endswith(COUNTER) and tensor.is_floating_point())


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return is_lazy(other) or (one.shape == other.shape and one.is_floating_point() == other.is_floating_point())


def _surplus(names: Sequence[str], unused: Collection[str]) -> Iterable[str]:
    """The unused names within the parts that are used; not after the last used one: a head, or a longer end."""
    used = [name for name in names if name not in unused]
    if not used:
        return ()
    shared = max(cut for cut in _cuts(used[0]) if all(name.startswith(used[0][:cut]) for name in used))
    parts = tuple({used[0][:shared] + name[shared:].partition(".")[0] + "." for name in used})
    inner = names[: names.index(used[-1])]
    return (name for name in inner if name in unused and name.startswith(parts) and not name.endswith(COUNTER))


def _difference(one: Tensor, other: Tensor) -> tuple[str, str]:
    return ("another tensor", "a tied one") if _is_alike(one, other) else (_described(one), _described(other))


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


def renamed(module: nn.Module, state: Mapping[str, Any], match: Match) -> dict[str, Any]:
    """Return what the hooks before a module's loading make of a state dict: they know the names of older versions.

    Args:
        module: Whose hooks.
        state: Names and tensors.
        match: Where the weights stand in it, and where in the module they belong.

    Returns:
        Names and tensors, by the module's names where these are known.
    """
    tensors = named_tensors(state).items()
    made = {match.mine + name[len(match.theirs) :]: value for name, value in tensors if name.startswith(match.theirs)}
    for path, part in module.named_modules():
        if not isinstance(part, LazyModuleMixin):  # whose hook would settle its shape
            for hook in part._load_state_dict_pre_hooks.values():
                hook(made, plain_name(f"{path}." * bool(path)), {}, True, [], [], [])
    return made


def head_names(module: nn.Module, heads: Iterable[nn.Module]) -> frozenset[str]:
    """Return the names, in a module's state dict, of the tensors of some of its parts; none if that would be all.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> sorted(head_names(module, [module[1]]))
        ['1.bias', '1.weight']
    """
    own, inner = module.state_dict(keep_vars=True), {part for head in heads for part in head.modules()}
    outer = [part for part in module.modules() if part not in inner]
    # What the rest of the module holds as well, as a language model's embedding, is no head's.
    shared = {id(t) for part in outer for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))}
    tensors = {id(tensor) for part in inner for tensor in part.state_dict(keep_vars=True).values()} - shared
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


def find_heads(module: nn.Module, path: str | None = None) -> list[nn.Module]:
    """Return what makes a module's outputs of its features: the part at a path, timm's classifiers, or the last layer.

    Args:
        module: The module.
        path: Of a submodule; None: look for it.

    Raises:
        ValueError: If there is no such submodule.

    Example:
        >>> find_heads(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
        [Linear(in_features=4, out_features=2, bias=True)]
    """
    if path is None:
        network, classifiers = find_timm_network(module)
        return last_layer(module) if network is None else classifiers
    try:
        return [module.get_submodule(path)]
    except AttributeError as error:
        children = [name for name, _ in module.named_children()]
        raise ValueError(
            f"Expected `head` to be the path of a submodule, but {type(module).__name__} has no {path!r}. It has "
            f"{children}."
        ) from error
