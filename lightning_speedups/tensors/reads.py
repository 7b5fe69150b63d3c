"""What a training step makes of targets of which it sees one of two: whether its loss depends on which one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class Reads:
    """What a step has made of the mixed targets of one batch; shared by all that was made from them.

    Args:
        follows: Whether to follow what is computed from one of two targets until it meets a gradient. Where that
            happens at once it is seen in any case.

    Attributes:
        count: How often a loss has read the mixture.
        is_used: Whether anything else has been computed from the targets.
        misread: Names of the functions through which a loss depends on which of two targets was taken, as far as its
            backward pass has come.
        selections: By what targets were selected.
    """

    def __init__(self, follows: bool = False) -> None:
        self.follows = follows
        self.count, self.is_used = 0, False
        self.misread: list[str] = []
        self.selections: list[Tensor] = []
        self._marked: list[weakref.ref[OneOfTwo]] = []

    def mark(self, computed: Tensor) -> Tensor:
        """Return a plain tensor as one that is followed from here on: the same, changed.

        Args:
            computed: What was computed from one of two targets, or what that was written into.
        """
        plain = computed.detach()
        computed.__class__ = OneOfTwo
        computed._labels, computed.reads = plain, self  # type: ignore[attr-defined]
        self._marked.append(weakref.ref(computed))  # type: ignore[arg-type]
        return computed

    def close(self) -> None:
        """Follow nothing any more; what was followed is plain again."""
        self.follows = False
        for reference in self._marked:
            if (marked := reference()) is not None:
                del marked._labels, marked.reads
                marked.__class__ = Tensor  # type: ignore[assignment]
        self._marked.clear()
        self.selections.clear()


class OneOfTwo(Tensor):
    """A tensor computed from one of two targets, and another one for the other: the plain tensor to everything.

    While its reads are followed, what is computed from it is such a tensor too. Where it meets what requires a
    gradient, the backward pass tells the reads. A mask of what is ignored, say, may be the same for both targets: it
    is followed no further. Nothing is told of metrics, as no backward pass goes through them.

    Attributes:
        reads: Who is told.
    """

    _labels: Tensor
    _other: Tensor | None = None  # the other targets, where it is a target itself
    reads: Reads

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute on the plain tensor, and follow what comes of it."""
        return call_plain(func, args, kwargs or {})


def on_part(part: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call with one plain part in the place of all tensors that have it, and with the plain tensor else.

    Args:
        part: ``"_labels"``, ``"_other"`` or another attribute.
        func: What to call.
        args: Its arguments.
        kwargs: The same by name.
    """

    def plain(one: OneOfTwo) -> Tensor:
        found = getattr(one, part, None)
        return one._labels if found is None else found

    args, kwargs = tree_map_only(OneOfTwo, plain, (args, kwargs))
    return func(*args, **kwargs)


def call_plain(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call with the plain tensors, and follow what comes of them, though not in a graph that is being compiled.

    Args:
        func: What to call.
        args: Its arguments.
        kwargs: The same by name.
    """
    sources = [one for one in tree_leaves((args, kwargs)) if isinstance(one, OneOfTwo)]
    if torch.compiler.is_compiling():
        sources[0].reads.is_used = True
        return on_part("_labels", func, args, kwargs)
    if any([_leads_to_gradient(one) for one in sources]):
        return func(*args, **kwargs)
    result = on_part("_labels", func, args, kwargs)
    if _takes_form_only(func, args) or isinstance(result, torch.Size):  # a tree to torch, which would make it a tuple
        return result
    if isinstance(result, Tensor) or func.__name__ in _USES:
        sources[0].reads.is_used = True
    if args and func.__name__ in WRITES:
        return follow(func, sources, None, args[0], written=True)
    is_comparison = func.__name__ in _COMPARES and all(one._other is not None for one in sources)
    other = on_part("_other", func, args, kwargs) if sources[0].reads.follows and is_comparison else None
    return tree_map_only(Tensor, partial(follow, func, sources, other), result)


def follow(
    func: Callable[..., Any], sources: Sequence[OneOfTwo], other: Tensor | None, computed: Tensor, written: bool = False
) -> Tensor:
    """Let the reads learn where it goes what was computed from one of two targets.

    Args:
        func: What computed it.
        sources: Of what.
        other: What it would be of the other targets, if that is known.
        computed: A plain tensor; where it requires a gradient, the loss can depend on it.
        written: Whether it was there before, and was written into.

    Returns:
        The plain tensor, or one of two; a number for a whole batch says too little of its targets to be followed.
    """
    reads, pairs = sources[0].reads, [(one._labels, one._other) for one in sources]
    if computed.requires_grad:
        if torch.is_grad_enabled():
            _listen(computed, reads, func.__name__, pairs)
    elif reads.follows and computed.ndim and type(computed) is Tensor:
        differs = any(_differ(*pair) for pair in pairs) if other is None else _differ(computed, other)
        if differs:  # what was not written into may be the very tensor that a source holds
            return reads.mark(computed if written else computed.detach())
    return computed


def _leads_to_gradient(one: OneOfTwo) -> bool:
    """Let a marked tensor be a plain one again that has come out of an `autograd.Function` with a gradient."""
    with torch._C.DisableTorchFunctionSubclass():
        if type(one) is not OneOfTwo or not one.requires_grad:
            return False
        _listen(one, one.reads, "autograd.Function", [(one._labels, None)])
    one.__class__ = Tensor  # type: ignore[assignment]
    return True


def _listen(result: Tensor, *told: Any) -> None:
    result.register_hook(partial(_tell, *told))  # type: ignore[no-untyped-call]


def _tell(reads: Reads, name: str, pairs: Sequence[tuple[Tensor, Tensor | None]], gradient: Tensor) -> None:
    """Note, in a backward pass, a function through which the loss depends on the targets that were taken."""
    for own, other in pairs if name not in reads.misread else ():
        # What selects targets along with their scores is no target; it may be computed twice, and be two tensors.
        selections = [one for one in reads.selections if (one.device, one.dtype) == (own.device, own.dtype)]
        if _differ(own, other) and not any(torch.equal(own, one) for one in selections):
            reads.misread.append(name)
            return


def _differ(own: Tensor, other: Tensor | None) -> bool:
    return other is None or not torch.equal(own, other)


def _takes_form_only(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Tell whether a function takes nothing but the shape, type or place of one of two targets."""
    name = func.__name__
    takes_another = (name.endswith("_as") or name == "to") and not isinstance(args[0], OneOfTwo)
    return takes_another or name.startswith("new_") or name.endswith("_like")


WRITES = {name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")} | {"__setitem__"}
WRITES |= {name for name in dir(Tensor) if name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1))}
"""Names of the functions that write into their first argument."""
_USES = WRITES | {"tolist", "item", "numpy", "__array__", "__int__", "__float__", "__index__", "__bool__"}
_COMPARES = {"isin", *(form.format(name) for name in ("eq", "ne", "lt", "le", "gt", "ge") for form in ("{}", "__{}__"))}
