"""A tensor with shape, type, strides and device, but without values: what is computed from it costs next to nothing.

It says exactly what depends on values that are not there: nothing real can be made of it by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

_aten = torch.ops.aten


class Origin:
    """What all tensors without values have in common that were made for the same step.

    Args:
        error: Makes the exception, from what was tried.
    """

    def __init__(self, error: Callable[[str], Exception] = RuntimeError) -> None:
        self.error = error
        self.loaded = set[int]()  # memories of tensors that have their values by now
        self.is_written = False  # into something of which the values can be computed
        self.alive = WeakSet[Unloaded]()


class _MissingError(Exception):
    """An operation cannot do without values."""


class Unloaded(Tensor):
    """Stands in for a tensor whose values nobody needs.

    Every operation on it gives tensors of the same kind, of the right shape, type and device. What needs values is
    refused, by name: reading them, writing them into a real tensor, mixing them with a tensor that trains, an operation
    that draws random numbers. If it was given a way to get them, they and what is made of them alone, without other
    tensors, are computed then, rather than refused. With `load` it gets values, and is as good as real from then on.

    Make it with [of][lightning_speedups.tensors.unloaded.Unloaded.of].

    Attributes:
        origin: What it has in common with others.
        loaded: Its values, if it was given any.
    """

    origin: Origin
    loaded: Tensor | None
    _meta: Tensor
    _source: Any
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(
        tensor: Tensor,
        origin: Origin | None = None,
        device: torch.device | None = None,
        values: Callable[[], Tensor] | None = None,
    ) -> Unloaded:
        """Make a stand-in.

        Args:
            tensor: What it looks like.
            origin: What it has in common with others.
            device: Its device; None: that of the tensor.
            values: Returns its values, where they can be had at need.

        Example:
            >>> picture = Unloaded.of(torch.zeros(2, 3, 8, 8))
            >>> nn.Conv2d(3, 5, 3).requires_grad_(False)(picture).relu()
            Unloaded(shape=(2, 5, 6, 6), dtype=torch.float32, device=cpu)
        """
        device = device or tensor.device
        made: Unloaded = Tensor._make_wrapper_subclass(
            Unloaded, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=device
        )
        made._meta, made.origin, made.loaded, made._source = _on_meta(tensor), origin or Origin(), None, values
        made.origin.alive.add(made)
        return made

    def load(self, values: Tensor) -> Tensor:
        """Give it its values, and return them.

        Args:
            values: Of the same shape; on its device, and in its memory format, if possible.
        """
        self.origin.loaded.add(_memory(self._meta))
        self.loaded = torch.empty_like(self._meta, dtype=values.dtype, device=self.device).copy_(values)
        return self.loaded

    def known(self) -> Tensor | None:
        """Return its values, if it was given any or they can be had."""
        return self._source() if self.loaded is None and self._can_be_had else self.loaded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute what comes out but for the values."""
        args, kwargs = tree_map_only(Unloaded, lambda o: o if o.loaded is None else o.loaded, (args, kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        missing = _missing(tensors)
        if not missing:
            return func(*args, **kwargs)

        def real() -> Any:
            return _call(func, args, kwargs, Unloaded, Unloaded.known)

        can_be_had = all(one._can_be_had for one in missing)
        try:
            made = cls._imagine(func, args, kwargs, tensors, missing)
        except _MissingError as error:
            if not can_be_had:
                raise missing[0].origin.error(str(error)) from None
            return real()
        if can_be_had and len(missing) == len(tensors):
            for place, one in enumerate(tree_leaves(made)):
                if isinstance(one, Unloaded) and one._source is None:
                    one._source = partial(lambda at: tree_leaves(real())[at], place)
        return made

    @classmethod
    def _imagine(
        cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], missing: list[Unloaded]
    ) -> Any:
        origin, device = missing[0].origin, kwargs.get("device") or missing[0].device
        given = _given(func, args, kwargs)
        _check(func, given, tensors, origin)
        _check_writes(func, given, origin)
        on_meta = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs
        try:
            made = _call(func, args, on_meta, Tensor, _meta_of)
        except NotImplementedError as error:  # an operation of which torch does not know what comes out
            if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags):
                raise _MissingError(f"`{func}` needs them ({error})") from error
            made = _call(func, args, kwargs, Unloaded, _zeros)
        except RuntimeError as error:
            raise _MissingError(f"`{func}` needs them ({error})") from error
        if any(one._meta.shape != one.shape for one in missing):
            raise origin.error(f"`{func}` changes their shape in place")
        own = {id(one._meta): one for one in missing}  # an operation in place gives back what it was given
        return tree_map_only(Tensor, lambda one: own[id(one)] if id(one) in own else cls.of(one, origin, device), made)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unloaded(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __format__(self, spec: str) -> str:
        return format(self._needed("format"), spec) if spec else repr(self)

    def __deepcopy__(self, memo: Any) -> Unloaded:
        return self

    @property
    def _can_be_had(self) -> bool:
        return self._source is not None and not self.origin.is_written

    def _needed(self, name: str) -> Tensor:
        values = self.known()
        if values is None:
            raise self.origin.error(f"`{name}` needs them")
        return values

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._needed("pickle").__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, **options: Any) -> Any:
        """Return the values, if there are any."""
        return self._needed("numpy").numpy(**options)

    def tolist(self) -> Any:
        """Return the values, if there are any."""
        return self._needed("tolist").tolist()


def _call(func: Any, args: Any, kwargs: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Call a function with all arguments of a kind changed."""
    args, kwargs = tree_map_only(kind, change, (args, kwargs))
    return func(*args, **kwargs)


def _given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operation, by name."""
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}


def _check(func: Any, given: Mapping[str, Any], tensors: Iterable[Tensor], origin: Origin) -> None:
    """Refuse what cannot be done without values."""
    if any(tensor.requires_grad for tensor in tensors):  # also if they can be had: the graph has kept these
        raise origin.error(f"`{func}` mixes them with what trains")
    is_off = any(given.get(name) == 0 for name in ("p", "dropout_p", "train", "training"))
    is_random = torch.Tag.nondeterministic_seeded in func.tags and func is not _aten._fused_sdp_choice.default
    if is_random and not is_off:
        raise origin.error(f"`{func}` draws random numbers")
    if given.get("training") and given.get("running_mean") is not None:
        raise origin.error(f"`{func}` takes the statistics of the batch")


def _check_writes(func: Any, given: Mapping[str, Any], origin: Origin) -> None:
    """Refuse to write into what others see, and note what is written."""
    arguments = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    targets = tree_leaves([given.get(name) for name in arguments])
    for target in (leaf for leaf in targets if isinstance(leaf, Tensor)):
        if not isinstance(target, Unloaded):
            raise _MissingError(f"`{func}` writes them into another tensor")
        if _memory(target._meta) in origin.loaded:
            raise origin.error(f"`{func}` writes into what a trainable module has already seen")
        if target._source is not None:
            origin.is_written = True


def _missing(values: Iterable[Any]) -> list[Unloaded]:
    return [value for value in values if isinstance(value, Unloaded) and value.loaded is None]


def _zeros(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _meta_of(tensor: Tensor) -> Tensor:
    return tensor._meta if isinstance(tensor, Unloaded) else _on_meta(tensor)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Shortcuts:
    """Lets modules return at once what they made of tensors without values when they were called like that before, with
    real tensors beside them or without: a module makes shapes of shapes.

    No shortcuts are taken over modules in which somebody listens with hooks, or which leave tensors elsewhere than in
    what they return.

    Args:
        modules: Modules without anything that trains.
        last: Shortcuts of before, which go on if they are over the same modules in the same modes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).requires_grad_(False)
        >>> shortcuts = Shortcuts([net])
        >>> with shortcuts.taken():
        ...     one, two = (net(Unloaded.of(torch.zeros(4, 2))) for _ in range(2))
        >>> two, shortcuts.count
        (Unloaded(shape=(4, 3), dtype=torch.float32, device=cpu), 1)
    """

    def __init__(self, modules: Iterable[nn.Module], last: Shortcuts | None = None) -> None:
        self.count = 0
        self._modules = [module for module in modules if not _is_watched(module)]
        self._modes = [(part, part.training) for module in self._modules for part in module.modules()]
        self._made: dict[Any, Any] = last._made if last is not None and last._modes == self._modes else {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take them, until the context ends."""
        own = [vars(module).get("forward") for module in self._modules]
        for module in self._modules:
            vars(module)["forward"] = partial(self._call, module, module.forward)
        try:
            yield
        finally:
            for module, forward in zip(self._modules, own, strict=True):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        given = _missing(leaves)
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not any(leaf is one for one in given)]
        if not given or any(isinstance(other, Unloaded) or other.requires_grad for other in others):
            return forward(*args, **kwargs)
        origin, device = given[0].origin, given[0].device
        casts = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (id(module), module.training, casts, str(spec), *map(_look, leaves))
        if key in self._made:
            self.count += 1
            looks, spec = self._made[key]
            return tree_unflatten([_remade(look, origin) for look in looks], spec)
        before, versions = set(map(id, origin.alive)), [other._version for other in others]
        made = forward(*args, **kwargs)
        leaves, spec = tree_flatten(made)
        may_read = bool(others) and any(not isinstance(leaf, Unloaded) for leaf in leaves if leaf is not None)
        is_written = versions != [other._version for other in others]
        if not may_read and not is_written and _is_apart(leaves, given, before, origin):
            self._made[key] = [_look(leaf) for leaf in leaves], spec
        return made


def _is_apart(leaves: list[Any], given: list[Unloaded], before: set[int], origin: Origin) -> bool:
    """Tell whether all that a module returns are plain values, and tensors that hang together with nothing else.

    Args:
        leaves: What it returns.
        given: What it was given.
        before: Ids of the tensors that were there before the call.
        origin: Of all these tensors.
    """
    fresh = _missing(leaves)
    others = [leaf for leaf in leaves if not any(leaf is one for one in fresh)]
    # One that is another one's view gets its values, and is written to, together with it.
    memories = {_memory(leaf._meta) for leaf in (*given, *fresh)}
    is_separate = len(memories) == len({id(leaf) for leaf in given}) + len(fresh)
    # What is still there was left elsewhere: in an attribute, a list, a cache; or what is returned is a view of it.
    left = {id(one) for one in origin.alive} - before - {id(one) for leaf in fresh for one in (leaf, leaf._base)}
    return is_separate and not left and all(isinstance(one, (bool, int, float, str, type(None))) for one in others)


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module)


def _look(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf))


def _remade(look: Any, origin: Origin) -> Any:
    if look[0] is not Unloaded:
        return look[1]
    _, shape, stride, dtype, device = look
    return Unloaded.of(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), origin, device)
