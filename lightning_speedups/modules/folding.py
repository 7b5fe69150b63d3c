"""Fold frozen batch norms into the convolutions before them, for as long as both are frozen (Jacob et al., 2018,
arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import warnings
import weakref
from collections import Counter
from collections.abc import Container, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_speedups.modules.frozen_part import is_compiled

Pair = tuple[nn.Module, nn.Module]
"""A convolution, and the batch norm that alone takes its output."""

_FITS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_CONVS, _NORMS = tuple(_FITS), (*_FITS.values(), nn.SyncBatchNorm)
# What is known of methods defined here: convolutions are linear in their weights, timm's norms end with `drop`, `act`.
_KNOWN = {"torch.nn.modules.conv", "timm.layers.conv2d_same", "torch.nn.modules.batchnorm", "timm.layers.norm_act"}


def conv_norm_pairs(root: nn.Module, shared: Iterable[object] = ()) -> list[Pair]:
    """Find the convolutions whose output goes to one batch norm and nowhere else, each called once in a forward.

    A copy of the module is traced with torch.fx, in training and in eval mode; where it cannot be traced, its children
    are, one by one. What cannot be folded with certainty is left out: modules with hooks or a ``forward`` put on them,
    compiled, scripted, lazy or parametrized ones, transposed convolutions, and subclasses with a ``forward`` of their
    own other than timm's ``Conv2dSame`` and ``BatchNormAct2d``.

    Args:
        root: The module to look through; it is not changed.
        shared: Objects that the copy shares with it instead of copying them, such as a trainer that it refers to.

    Returns:
        Pairs in the order of ``root.modules()``.

    Example:
        >>> conv_norm_pairs(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)))
        [(Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1)), BatchNorm2d(2, eps=1e-05, ...))]
    """
    if not may_hold_pairs(root.modules()):
        return []
    cuda = {tensor.device.index for tensor in _tensors(root) if tensor.device.type == "cuda"}
    # A forward may draw random numbers and warn; a search does neither.
    with warnings.catch_warnings(), torch.random.fork_rng(cuda), torch.no_grad(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(random.setstate, random.getstate())
        pairs, _ = _search(root, list(shared))
    norms, times = dict(pairs), Counter(itertools.chain(*pairs))
    return [(conv, norms[conv]) for conv in root.modules() if conv in norms and times[conv] == times[norms[conv]] == 1]


def may_hold_pairs(modules: Iterable[nn.Module]) -> bool:
    """Tell whether there are convolutions and batch norms at all, so that it is worth to trace what they are in.

    Args:
        modules: All of them, as from ``root.modules()``.

    Example:
        >>> may_hold_pairs(nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(2)).modules())
        False
    """
    modules = list(modules)
    return all(any(isinstance(one, kinds) for one in modules) for kinds in (_CONVS, _NORMS))


class FoldedNorms:
    """Folds batch norms into convolutions until it is undone.

    Each module gets a stand-in for its ``forward``: the convolution's computes with folded weights, the norm's passes
    its input on. No parameter or buffer is added or changed, so checkpoints stay as they are. Folded weights are made
    anew when anything they come from has changed, has moved or has been replaced; a pair that trains, or has hooks,
    computes as if it were not folded.

    Args:
        pairs: From ``conv_norm_pairs``. Pairs that cannot be folded are left alone.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval().requires_grad_(False)
        >>> images = torch.ones(1, 1, 4, 4)
        >>> before = model(images)
        >>> folded = FoldedNorms(conv_norm_pairs(model))
        >>> len(folded), torch.allclose(model(images), before)
        (1, True)
        >>> folded.undo()
        >>> torch.equal(model(images), before)
        True
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs: list[tuple[_Convolves, _PassesOn]] = []
        for conv, norm in pairs:
            if _foldable(conv, norm):
                convolves = _Convolves(conv, norm)
                self._pairs.append((convolves, _PassesOn(norm, convolves)))

    def __len__(self) -> int:
        """Return the number of folded pairs."""
        return len(self._pairs)

    def forget(self) -> None:
        """Fold anew at the next call: for weights that were written to through ``.data``, which nothing tells."""
        for convolves, _ in self._pairs:
            convolves.made_from = None

    def undo(self) -> None:
        """Take all stand-ins away."""
        for pair in self._pairs:
            for stand_in in pair:
                if stand_in.module.__dict__.get("forward") is stand_in:
                    del stand_in.module.__dict__["forward"]
        self._pairs = []


class _Convolves:
    """Stands in for the ``forward`` of a convolution: decides for both whether this pass is folded."""

    passed = False  # whether the norm's next input comes out of a folded convolution
    made_from: object = None

    def __init__(self, conv: Any, norm: Any) -> None:
        self.module, self.norm = conv, norm
        conv.__dict__["forward"] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "norm": self.norm}  # a copy folds its own weights

    def __call__(self, input: Tensor) -> Any:
        conv = self.module
        # Without a batch dimension a norm would take channels for images.
        self.passed = self._ready() and input.dim() == len(conv.kernel_size) + 2
        if self.passed:  # one like it with the folded parameters, so that nothing is written to its own
            conv = object.__new__(type(self.module))
            conv.__dict__ = {**vars(self.module), "_parameters": {**self.module._parameters, **self.folded}}
        return type(conv).forward(conv, input)

    def _ready(self) -> bool:
        """Return whether the pair is frozen, with folded weights at hand."""
        conv, norm = self.module, self.norm
        tensors = _sources(conv, norm)
        if tensors is None or norm.training or torch.compiler.is_compiling() or _hooked(conv) or _hooked(norm):
            return False
        if any(t is not None and t.requires_grad for t in tensors):
            return False
        # What changes whenever one of them does.
        versions = [t if t is None else (t.data_ptr(), t._version, t.dtype, t.device) for t in tensors]
        if self.made_from != (norm.eps, versions):
            self._fold(tensors)
            self.made_from = (norm.eps, versions)
        return True

    def _fold(self, tensors: list[Any]) -> None:
        dtype = tensors[0].dtype
        # In single precision at least: half would round the variance before its root is taken.
        wide = torch.promote_types(dtype, torch.float32)
        # Validation runs in inference mode; its tensors could not take part in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            # What they are made from lives on, so that nothing else comes to lie at its address.
            self.held = [t.detach() for t in tensors if t is not None]
            widened: list[Any] = [t if t is None else t.to(wide) for t in tensors]
            weight, bias, mean, var, scale, shift, _ = widened
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, self.norm.eps, scale, shift)
            self.folded = {"weight": weight.detach().to(dtype), "bias": bias.detach().to(dtype)}


class _PassesOn:
    """Stands in for the ``forward`` of the norm behind it."""

    def __init__(self, norm: Any, convolves: _Convolves) -> None:
        self.module, self.convolves = norm, convolves
        norm.__dict__["forward"] = self

    def __call__(self, input: Tensor) -> Any:
        norm = self.module
        if not self.convolves.passed:
            return type(norm).forward(norm, input)
        self.convolves.passed = False
        if _home(norm, "forward") == "timm.layers.norm_act":
            for name in ("drop", "act"):  # a synchronised one may have none
                input = getattr(norm, name)(input) if hasattr(norm, name) else input
        return input


def _sources(conv: nn.Module, norm: nn.Module) -> list[Any] | None:
    """Return what folded weights are made from; None if a parametrization is there instead, or no statistics are.

    The last gives away a norm that has trained: it counts batches, but writes to its statistics without a sign.
    """
    found: list[Any]
    try:
        found = [conv._parameters["weight"], conv._parameters["bias"]]
        found += [norm._buffers["running_mean"], norm._buffers["running_var"]]
        found += [norm._parameters["weight"], norm._parameters["bias"], norm._buffers["num_batches_tracked"]]
    except KeyError:
        return None
    return None if any(found[i] is None for i in (0, 2, 3, 6)) else found


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _closed(module: nn.Module) -> bool:
    """Return whether a tracer must not enter the module: it does more than its class says."""
    return is_compiled(module) or _hooked(module) or "forward" in module.__dict__


def _home(module: nn.Module, method: str) -> str:
    """Return in which file, as a dotted name, a module's method is defined."""
    return next(kind.__module__ for kind in type(module).__mro__ if method in vars(kind))


def _foldable(conv: Any, norm: Any) -> bool:
    if not any(isinstance(conv, kind) and isinstance(norm, (fits, nn.SyncBatchNorm)) for kind, fits in _FITS.items()):
        return False
    sources = _sources(conv, norm)
    plain = sources is not None and type(sources[0]) is nn.Parameter and not _closed(conv) and not _closed(norm)
    known = {_home(conv, "forward"), _home(conv, "_conv_forward"), _home(norm, "forward")} <= _KNOWN
    return plain and known and bool(norm.num_features == conv.out_channels)


def _search(root: nn.Module, shared: list[object]) -> tuple[set[Pair], set[nn.Module]]:
    """Return the pairs in a module, and the modules in it that cannot be traced."""
    pairs: set[Pair] = set()
    if is_compiled(root) or not any(isinstance(one, (_BatchNorm, _ConvNd)) for one in root.modules()):
        return pairs, {root}  # of no interest to whoever calls it, if it holds neither
    opaque = {module for module in root.modules() if module is not root and _closed(module)}
    # As a whole first; then with those children as black boxes that cannot be traced themselves.
    for parts in (list(opaque), list(root.children())):
        for part in parts:
            inner, shut = _search(part, shared)
            pairs |= inner
            opaque |= shut
        with suppress(Exception):  # whatever a forward says to an input that is none
            traced, called = _trace(root, opaque, shared)
            return {pair for pair in pairs if called.isdisjoint(pair)} | traced, opaque
    return pairs, opaque | {root}


def _trace(root: nn.Module, opaque: set[nn.Module], shared: list[object]) -> tuple[set[Pair], set[nn.Module]]:
    """Return what is a pair in every way to call a module, and all modules that it calls."""
    if "forward" in root.__dict__:
        raise ValueError("a tracer would take the class's forward")
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(root.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    ways = itertools.product((True, False), (None, options) if options else (None,))
    pairs, called = zip(*(_trace_once(root, opaque, shared, *way) for way in ways), strict=True)
    return set.intersection(*pairs), set.union(*called)


def _trace_once(
    root: nn.Module, opaque: set[nn.Module], shared: list[object], training: bool, options: dict[str, Any] | None
) -> tuple[set[Pair], set[nn.Module]]:
    twin = copy.deepcopy(root, {id(one): one for one in [*_tensors(root), *shared]})
    for module in twin.modules():
        module.training = training
        if isinstance(module, (_BatchNorm, _ConvNd)):
            module.__dict__["forward"] = None  # so that a call that goes past the tracer fails
    tracer = _Tracer({path for path, module in root.named_modules() if module in opaque})
    nodes = tracer.trace(twin, options).nodes
    calls = {node: root.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    return _neighbours(calls, tracer.stored), set(calls.values())


def _neighbours(calls: dict[fx.Node, nn.Module], stored: Container[fx.Node]) -> set[Pair]:
    """Return the foldable modules, each called once, of which the second alone takes what the first gives."""
    times = Counter(calls.values())
    pairs = set()
    for node, module in calls.items():
        inputs = node.all_input_nodes
        if len(inputs) == len(node.args) + len(node.kwargs) == 1 and inputs[0] in calls and inputs[0] not in stored:
            before = calls[inputs[0]]
            if len(inputs[0].users) == times[before] == times[module] == 1 and _foldable(before, module):
                pairs.add((before, module))
    return pairs


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a forward that writes to a buffer writes to none

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        # Nodes whose proxies live on after the trace: a forward has put them somewhere.
        self.stored: weakref.WeakValueDictionary[fx.Node, fx.Proxy] = weakref.WeakValueDictionary()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = module_qualified_name in self.opaque or isinstance(m, (_BatchNorm, _ConvNd))
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        self.stored[node] = made = super().proxy(node)
        return made


def _tensors(root: nn.Module) -> Iterable[Tensor]:
    return itertools.chain(root.parameters(), root.buffers())
