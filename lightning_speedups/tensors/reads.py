"""What a training step makes of targets of which it sees one of two: whether its loss depends on which one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


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
    """

    def __init__(self, follows: bool = False) -> None:
        self.follows = follows
        self.count, self.is_used = 0, False
        self.misread: list[str] = []
        self.written: list[Tensor] = []
        self.selections: list[Tensor] = []

    def close(self) -> None:
        """Follow nothing any more; tensors into which something was written are plain again."""
        self.follows = False
        while self.written:
            written = self.written.pop()
            written.__class__ = Tensor
            for name in ("_labels", "_other", "_roots", "reads"):
                delattr(written, name)


class OneOfTwo(Tensor):
    """A tensor computed from one of two targets: the plain tensor to everything.

    While its reads are followed, what is computed from it is such a tensor too. Where it meets what requires a
    gradient, the backward pass tells the reads, provided that the tensor differs between the two targets: a mask of
    what is ignored, say, may be the same for both. Nothing is told of metrics, as no backward pass goes through them.

    Attributes:
        reads: Who is told.
    """

    _labels: Tensor
    _other: Tensor | None = None  # the same of the other targets, where that is known
    _roots: tuple[OneOfTwo, ...] = ()  # what else it was computed from, of which that is known
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

    @property
    def roots(self) -> tuple[OneOfTwo, ...]:
        """The tensors on whose difference between the two targets its own depends."""
        return self._roots if self._other is None else (self, *self._roots)

    def settle(self) -> None:
        """Make it one that does not depend on the targets, as it selects targets along with their scores."""
        self.reads.selections.append(self._labels)
        self._other, self._roots = None, ()


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
    if torch.compiler.is_compiling():
        args, kwargs = tree_map_only(OneOfTwo, _used, (args, kwargs))
        return func(*args, **kwargs)
    if _takes_form_only(func, args):
        return on_part("_labels", func, args, kwargs)
    sources: list[OneOfTwo] = []

    def plain(one: OneOfTwo) -> Tensor:
        sources.append(one)
        return one._labels

    plain_args, plain_kwargs = tree_map_only(OneOfTwo, plain, (args, kwargs))
    result, reads = func(*plain_args, **plain_kwargs), sources[0].reads
    if args and func.__name__ in WRITES:
        return _follow_write(func, args, kwargs, sources, result)
    if isinstance(result, Tensor) or func.__name__ in _LEAVES_TENSORS:
        reads.is_used = True
    other = None
    if reads.follows and func.__name__ in _COMPARES and all(one._other is not None for one in sources):
        other = on_part("_other", func, args, kwargs)
    if isinstance(result, torch.Size):  # to torch a tree, which it would make a tuple
        return result
    return tree_map_only(Tensor, partial(follow, func, sources, other), result)


def _used(one: OneOfTwo) -> Tensor:
    one.reads.is_used = True
    return one._labels


def follow(func: Callable[..., Any], sources: Sequence[OneOfTwo], other: Tensor | None, result: Tensor) -> Tensor:
    """Return what was computed from one of two targets such that its reads learn where it goes.

    Args:
        func: What computed it.
        sources: Of what.
        other: What it would be of the other targets, if that is known.
        result: A plain tensor.

    Returns:
        The plain tensor, or one of two; a number for a whole batch says too little of its targets to be followed.
    """
    reads = sources[0].reads
    if result.requires_grad:
        _listen(result, func, sources)
    elif reads.follows and result.ndim:
        plain, result = result, result.as_subclass(OneOfTwo)
        _set_up(result, plain, sources, other)
    return result


def _follow_write(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], sources: Sequence[OneOfTwo], result: Any
) -> Any:
    """Follow what something computed from one of two targets was written into, and return that."""
    target, reads = args[0], sources[0].reads
    if target.requires_grad and torch.is_grad_enabled():
        _listen(target, func, sources)
    if not reads.follows or target.requires_grad:
        return result
    if isinstance(target, OneOfTwo):
        if all(type(one) is OneOfTwo and one._other is not None for one in sources):
            with suppress(RuntimeError, IndexError):  # masks of other sizes: the two differ, and stay so
                on_part("_other", func, args, kwargs)
        else:
            target._roots = _roots_of((target, *sources), besides=target)
    elif type(target) is Tensor and target.ndim:
        plain = target.detach()
        target.__class__ = OneOfTwo
        _set_up(target, plain, sources, None)  # type: ignore[arg-type]
        reads.written.append(target)
    return None if result is None else target


def _roots_of(sources: Sequence[OneOfTwo], besides: OneOfTwo | None = None) -> tuple[OneOfTwo, ...]:
    return tuple({id(root): root for one in sources for root in one.roots if root is not besides}.values())


def _listen(result: Tensor, func: Callable[..., Any], sources: Sequence[OneOfTwo]) -> None:
    told = partial(_tell, sources[0].reads, func.__name__, tuple(sources))
    result.register_hook(told)  # type: ignore[no-untyped-call]


def _set_up(one: OneOfTwo, plain: Tensor, sources: Sequence[OneOfTwo], other: Tensor | None) -> None:
    one._labels, one._other, one.reads = plain, other, sources[0].reads
    one._roots = () if other is not None else _roots_of(sources)


def _tell(reads: Reads, name: str, sources: Sequence[OneOfTwo], gradient: Tensor) -> None:
    """Note, in a backward pass, a function through which the loss depends on the targets that were taken."""
    if name in reads.misread:
        return
    for root in _roots_of(sources):
        # A mask that is written twice, for the scores and for the labels, is two tensors.
        if not any(torch.equal(root._labels, same) for same in (root._other, *reads.selections) if same is not None):
            reads.misread.append(name)
            return


def _takes_form_only(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Tell whether a function takes nothing but the shape, type or place of one of two targets."""
    name = func.__name__
    if name.startswith("new_") or name.endswith("_like"):
        return True
    return (name.endswith("_as") or name == "to") and not isinstance(args[0], OneOfTwo)


WRITES = {name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")} | {"__setitem__"}
WRITES |= {name for name in dir(Tensor) if name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1))}
"""Names of the functions that write into their first argument."""
_LEAVES_TENSORS = {"tolist", "item", "numpy", "__array__", "__int__", "__float__", "__index__", "__bool__"}
_COMPARES = {"isin", *(form.format(name) for name in ("eq", "ne", "lt", "le", "gt", "ge") for form in ("{}", "__{}__"))}
