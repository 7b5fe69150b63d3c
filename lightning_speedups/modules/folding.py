"""Fold frozen batch norms into the convolutions before them, for as long as both are frozen (Jacob et al., 2018,
arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.fusion import fuse_conv_bn_weights

Pair = tuple[nn.Module, nn.Module]
"""A convolution, and the batch norm that alone takes its output."""

_DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A norm that trains writes to its statistics without a sign of it; the count of batches alone gives it away.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def conv_norm_pairs(root: nn.Module, shared: Iterable[object] = ()) -> list[Pair]:
    """Find the convolutions whose output goes to one batch norm and nowhere else, each called once in a forward.

    A copy of the module is traced with torch.fx, in training and in eval mode; where it cannot be traced, its children
    are, one by one. What cannot be folded with certainty is left out: modules with hooks or a ``forward`` put on them,
    compiled, scripted, lazy or parametrized ones, transposed convolutions, and subclasses that compute something else.

    Args:
        root: The module to look through; it is not changed.
        shared: Objects that the copy shares with it instead of copying them, such as a trainer that it refers to.

    Returns:
        Pairs in the order of ``root.modules()``.

    Example:
        >>> conv_norm_pairs(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)))
        [(Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1)), BatchNorm2d(2, eps=1e-05, ...))]
    """
    cuda = sorted({tensor.device.index for tensor in _tensors(root) if tensor.device.type == "cuda"})
    state = random.getstate()
    # A forward may draw random numbers and warn; a search does neither.
    with warnings.catch_warnings(), torch.random.fork_rng(cuda), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            norms, _ = _search(root, list(shared))
            return [(conv, norms[conv]) for conv in root.modules() if conv in norms and _foldable(conv, norms[conv])]
        finally:
            random.setstate(state)


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
        self._stand_ins: list[_Convolves | _PassesOn] = []
        for conv, norm in pairs:
            if _foldable(conv, norm):
                convolves = _Convolves(conv, norm)
                for stand_in in (convolves, _PassesOn(norm, convolves)):
                    stand_in.module.__dict__["forward"] = stand_in
                    self._stand_ins.append(stand_in)

    def __len__(self) -> int:
        """Return the number of folded pairs."""
        return len(self._stand_ins) // 2

    def forget(self) -> None:
        """Fold anew at the next call: for weights that were written to through ``.data``, which nothing tells."""
        for stand_in in self._stand_ins:
            if isinstance(stand_in, _Convolves):
                stand_in.forget()

    def undo(self) -> None:
        """Take all stand-ins away."""
        for stand_in in self._stand_ins:
            if stand_in.module.__dict__.get("forward") is stand_in:
                del stand_in.module.__dict__["forward"]
        self._stand_ins = []


class _Convolves:
    """Stands in for the ``forward`` of a convolution: decides for both whether this pass is folded."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        self.module, self.norm = conv, norm
        self.forget()

    def forget(self) -> None:
        self.passed = False  # whether the norm's next input comes out of a folded convolution
        self.made_from: tuple[Any, ...] | None = None
        self.held: list[Tensor] = []  # what it was made from lives on, so that nothing else comes to lie at its address
        self.folded: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "norm": self.norm}  # a copy folds its own weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.norm = state["module"], state["norm"]
        self.forget()

    def __call__(self, input: Tensor) -> Tensor:
        conv: Any = self.module
        # Without a batch dimension a norm would take channels for images.
        self.passed = self._ready() and input.dim() == len(conv.kernel_size) + 2
        return _convolve(conv, input, self.folded) if self.passed else type(conv).forward(conv, input)

    def _ready(self) -> bool:
        """Return whether the pair is frozen, with folded weights at hand."""
        conv: Any = self.module
        norm: Any = self.norm
        if norm.training or torch.compiler.is_compiling() or _hooked(conv) or _hooked(norm):
            return False
        tensors = [
            conv._parameters.get("weight"),
            conv._parameters.get("bias"),
            norm._parameters.get("weight"),
            norm._parameters.get("bias"),
            *(norm._buffers.get(name) for name in _STATISTICS),
        ]
        if any(tensors[i] is None for i in (0, 4, 5, 6)) or any(t is not None and t.requires_grad for t in tensors):
            return False
        try:
            # What has neither an address nor a version cannot be followed: tensors of vmap, of inference mode.
            made_from = (
                norm.eps,
                *(None if t is None else (t.data_ptr(), t._version, t.dtype, t.device) for t in tensors),
            )
        except RuntimeError:
            return False
        if made_from != self.made_from:
            # Validation runs in inference mode; its tensors could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = _fold(*tensors[:6], eps=norm.eps)
                self.held = [t.detach() for t in tensors if t is not None]
            self.folded, self.made_from = {"weight": weight, "bias": bias}, made_from
        return True


class _PassesOn:
    """Stands in for the ``forward`` of the norm behind it."""

    def __init__(self, norm: nn.Module, convolves: _Convolves) -> None:
        self.module, self.convolves = norm, convolves

    def __call__(self, input: Tensor) -> Tensor:
        norm: Any = self.module
        if not self.convolves.passed:
            normed: Tensor = type(norm).forward(norm, input)
            return normed
        self.convolves.passed = False
        return input if _only_norms(norm) else _after_norm(norm, input)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    # In single precision at least: half would round the variance before its root is taken.
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight_, bias_, scale_, shift_ = (None if t is None else t.to(wide) for t in (weight, bias, scale, shift))
    assert weight_ is not None
    folded = fuse_conv_bn_weights(weight_, bias_, mean.to(wide), var.to(wide), eps, scale_, shift_)
    return folded[0].detach().to(weight.dtype), folded[1].detach().to(weight.dtype)


def _convolve(conv: nn.Module, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Run the convolution's own forward with other parameters, without writing to it."""
    ghost: Any = object.__new__(type(conv))
    ghost.__dict__ = {**conv.__dict__, "_parameters": {**conv._parameters, **parameters}}
    out: Tensor = type(conv).forward(ghost, images)
    return out


def _only_norms(norm: nn.Module) -> bool:
    return type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _after_norm(norm: Any, normed: Tensor) -> Tensor:
    out: Tensor = norm.act(norm.drop(normed))
    return out


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _sealed(module: nn.Module) -> bool:
    """Return whether the module runs code that stand-ins do not reach."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _closed(module: nn.Module) -> bool:
    """Return whether a tracer must not enter the module: it does more than its class says."""
    return _sealed(module) or _hooked(module) or "forward" in module.__dict__


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    if any(_closed(module) or isinstance(module, LazyModuleMixin) for module in (conv, norm)):
        return False
    if not isinstance(conv, _CONVOLUTIONS) or type(conv._parameters.get("weight")) is not nn.Parameter:
        return False
    if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
        return False
    if any(not isinstance(norm._buffers.get(name), Tensor) for name in _STATISTICS):
        return False
    # Whatever else makes a weight (a parametrization, weight_norm) takes the parameter's place.
    if any(name not in module._parameters for module in (conv, norm) for name in ("weight", "bias")):
        return False
    dimensions = next((n for kind, n in _DIMENSIONS.items() if isinstance(norm, kind)), len(conv.kernel_size))
    fits = dimensions == len(conv.kernel_size) and norm.num_features == conv.out_channels
    return fits and (_convolves_plainly(conv) or _is_linear(conv)) and (_only_norms(norm) or _is_norm_drop_act(norm))


def _convolves_plainly(conv: nn.Module) -> bool:
    return any(
        type(conv).forward is kind.forward and type(conv)._conv_forward is kind._conv_forward  # type: ignore[attr-defined]
        for kind in _CONVOLUTIONS
    )


def _is_linear(conv: Any) -> bool:
    """Try whether a subclass with a forward of its own scales and shifts its output with its weights."""
    try:
        weight = conv.weight.detach().to("cpu", torch.float64)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().to("cpu", torch.float64)
        scale = torch.linspace(0.5, 2, len(weight), dtype=torch.float64)
        channel = (-1, *[1] * len(conv.kernel_size))  # as it lies in the output
        sides = [d * (k - 1) + 3 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        images = torch.arange(1.0, 1 + 2 * conv.in_channels * torch.Size(sides).numel(), dtype=torch.float64).sin()
        images = images.reshape(2, conv.in_channels, *sides)
        twin = copy.deepcopy(conv, {id(parameter): parameter for parameter in conv.parameters()})
        before = _convolve(twin, images, {"weight": weight, "bias": bias})
        other = {"weight": weight * scale.reshape(*channel, 1), "bias": bias * scale + scale.flip(0)}
        expected = before * scale.reshape(channel) + scale.flip(0).reshape(channel)
        return torch.allclose(_convolve(twin, images, other), expected, rtol=1e-6, atol=1e-9)
    except Exception:
        return False


def _is_norm_drop_act(norm: Any) -> bool:
    """Try whether a subclass normalises, then applies its modules ``drop`` and ``act`` (as timm's do)."""
    if not all(isinstance(getattr(norm, name, None), nn.Module) for name in ("drop", "act")):
        return False
    try:
        twin: Any = copy.deepcopy(norm).to("cpu", torch.float64).eval()
        for i, tensor in enumerate((twin.running_mean, twin.running_var, twin.weight, twin.bias)):
            if tensor is not None:
                tensor.copy_(torch.linspace(0.5 + i, 2 - i / 4, len(tensor)))
        sides = [3] * next((n for kind, n in _DIMENSIONS.items() if isinstance(norm, kind)), 2)
        images = torch.arange(1.0, 1 + 2 * norm.num_features * torch.Size(sides).numel(), dtype=torch.float64).sin()
        images = 4 * images.reshape(2, norm.num_features, *sides)
        normed = F.batch_norm(images, twin.running_mean, twin.running_var, twin.weight, twin.bias, eps=twin.eps)
        return torch.allclose(twin(images.clone()), _after_norm(twin, normed), rtol=1e-6, atol=1e-9)
    except Exception:
        return False


def _search(root: nn.Module, shared: list[object]) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
    """Return the norm of each convolution in a module, and the modules in it that cannot be traced."""
    if _sealed(root):
        return {}, {root}
    norms: dict[nn.Module, nn.Module] = {}
    opaque = {module for module in root.modules() if module is not root and _closed(module)}
    # As a whole first; then with those children as black boxes that cannot be traced themselves.
    for parts in (list(opaque), list(root.children())):
        for part in parts:
            inner, shut = _search(part, shared)
            norms |= inner
            opaque |= shut
        try:
            traced, called = _traced(root, opaque, shared)
        except Exception:  # whatever a forward says to an input that is none
            continue
        seen = {conv: norm for conv, norm in norms.items() if conv not in called and norm not in called}
        return seen | traced, opaque
    return norms, opaque | {root}


def _traced(
    root: nn.Module, opaque: set[nn.Module], shared: list[object]
) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
    """Return the norm of each convolution, and all modules that are called, as they are in every way to call root."""
    if "forward" in root.__dict__:
        raise ValueError("a tracer would take the class's forward")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(root.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    found: list[dict[nn.Module, nn.Module]] = []
    called: set[nn.Module] = set()
    for training in (True, False):
        for given in (None, defaults) if defaults else (None,):
            twin = copy.deepcopy(root, _memo(root, shared))
            originals = dict(zip(twin.modules(), root.modules(), strict=True))
            tracer = _Tracer({module for module, original in originals.items() if original in opaque})
            for module in originals:
                module.training = training
                if isinstance(module, (_BatchNorm, _ConvNd)):
                    module.__dict__["forward"] = _refuse  # a call that goes past the tracer
            graph = tracer.trace(twin, given)
            calls = [node for node in graph.nodes if node.op == "call_module"]
            targets = {node: originals[twin.get_submodule(str(node.target))] for node in calls}
            times = Counter(targets.values())
            kept = {proxy.node for ref in tracer.proxies if (proxy := ref()) is not None}
            found.append({})
            for node in calls:
                before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else node
                conv, norm = targets.get(before), targets[node]
                alone = len(node.args) + len(node.kwargs) == 1 and list(before.users) == [node] and before not in kept
                if conv is not None and alone and times[conv] == times[norm] == 1:
                    found[-1][conv] = norm
            called |= set(times)
    return {conv: norm for conv, norm in found[0].items() if all(pairs.get(conv) is norm for pairs in found)}, called


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a forward that writes to a buffer writes to none

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.proxies: list[weakref.ref[fx.Proxy]] = []  # those alive after the trace were stored somewhere

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = m in self.opaque or isinstance(m, (_BatchNorm, _ConvNd))
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self.proxies.append(weakref.ref(made))
        return made


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("called by `forward`, which a tracer does not see")


def _tensors(root: nn.Module) -> Iterable[Tensor]:
    yield from root.parameters()
    yield from root.buffers()


def _memo(root: nn.Module, shared: list[object]) -> dict[int, Any]:
    """Return what a copy of the module shares with it: its tensors, as nothing is computed with them."""
    memo: dict[int, Any] = {id(one): one for one in [*_tensors(root), *shared]}
    for module in root.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses those that were computed (weight_norm)
    return memo
