"""Compilation of a network by region: the blocks that stand in it repeatedly are compiled in place, each kind once.

A region costs a part of the seconds that the whole network does, as equal blocks share what was compiled for one. The
compiler is PyTorch 2's: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_speedups.modules.layers import is_norm

Backend = str | Callable[..., Any]
"""What ``torch.compile`` takes for one: a name, or a function of a graph and of its inputs."""
Kind = tuple[Any, ...]
VARIANTS = 8
"""What torch compiles of one function before it gives up, and we of each block: sizes, frozen or not, precision."""


def kind_of(module: nn.Module) -> Kind:
    """Return what is equal for modules that are compiled to the same code: their classes and the shapes in them.

    Example:
        >>> kind_of(nn.Linear(2, 3)) == kind_of(nn.Linear(2, 3)), kind_of(nn.Linear(2, 3)) == kind_of(nn.Linear(3, 3))
        (True, False)
    """
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    return type(module), tuple(type(part) for part in module.modules()), shapes


def find_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost blocks of a network that stand in it repeatedly, by their paths.

    A kind is repeated if two modules with submodules of their own, of one class and with parameters of the same shapes,
    stand in a ``Sequential`` or a ``ModuleList``; then all modules of that class are blocks. Where nothing is repeated,
    those children are that hold parameters and submodules.

    Args:
        root: A network, or what holds some.

    Example:
        >>> block = lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> list(find_blocks(nn.Sequential(nn.Linear(2, 4), block(), block(), nn.Linear(4, 2))))
        ['1', '2']
        >>> list(find_blocks(nn.ModuleDict({"body": block(), "head": nn.Linear(4, 2)})))
        ['body']
    """
    standing = [
        child
        for parent in root.modules()
        if isinstance(parent, (nn.Sequential, nn.ModuleList))
        for child in dict.fromkeys(parent.children())
        if _is_region(child)
    ]
    kinds = {kind for kind, count in Counter(map(kind_of, standing)).items() if count > 1}
    classes = {kind[0] for kind in kinds} - {nn.Sequential}  # which say nothing of what they hold
    found = dict(_outermost(root, lambda part: type(part) in classes or (bool(kinds) and kind_of(part) in kinds)))
    return found or dict(_outermost(root, lambda part: True))


def _is_region(module: nn.Module) -> bool:
    """Tell whether a module can be called, has parts, holds parameters, and is no norm with an activation in it."""
    is_called = type(module).forward is not nn.Module.forward  # unlike a ModuleList
    return (
        is_called
        and not is_norm(module)
        and any(True for _ in module.children())
        and any(True for _ in module.parameters())
    )


def _outermost(root: nn.Module, wanted: Callable[[nn.Module], bool], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in root.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if _is_region(child) and wanted(child):
            yield inner, child
        else:
            yield from _outermost(child, wanted, inner)


def pick_blocks(root: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules at some paths, without those in one another; a list's members in its place.

    Args:
        root: Where to look.
        paths: Such as ``"net.blocks"`` or ``"net.blocks.3"``.

    Raises:
        LookupError: If there is no module at a path; its argument is the path.

    Example:
        >>> net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
        >>> list(pick_blocks(net, ["blocks", "head", "blocks.1"]))
        ['blocks.0', 'blocks.1', 'head']
    """
    modules, picked = dict(root.named_modules()), dict[str, nn.Module]()
    for path in paths:
        if not path or path not in modules:
            raise LookupError(path)
        listed = isinstance(modules[path], nn.ModuleList)  # which cannot be called
        names = [f"{path}.{name}" for name, _ in modules[path].named_children()] if listed else [path]
        picked.update((name, modules[name]) for name in names)
    return {path: one for path, one in picked.items() if not any(path.startswith(f"{other}.") for other in picked)}


@dataclass
class ForgivingBackend:
    """A backend of ``torch.compile`` that runs a graph as it stands where another one cannot compile it.

    Forward and backward are compiled at once, so that both are known to work before either runs. After the first
    failure nothing more is tried.

    Attributes:
        backend: The other one.
        failure: Why it failed, in a line; None as long as it did not. Code is shared between backends that are equal.

    Example:
        >>> backend = ForgivingBackend(lambda graph, inputs: 1 / 0)
        >>> torch.compile(lambda x: 2 * x, backend=backend)(torch.ones(2)), backend.failure
        (tensor([2., 2.]), 'ZeroDivisionError: division by zero')
    """

    backend: Backend
    failure: str | None = None

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        """Compile a graph."""
        import torch._functorch.config as functorch
        from torch._dynamo import lookup_backend
        from torch._dynamo.exc import RestartAnalysis, SkipFrame

        if self.failure is None:
            try:
                with functorch.patch(force_non_lazy_backward_lowering=True):
                    return lookup_backend(self.backend)(graph, inputs)
            except (RestartAnalysis, SkipFrame):  # which the compiler's front end waits for
                raise
            except Exception as error:  # a backend may raise anything
                self.fail(error)
        return graph.forward  # type: ignore[no-any-return]

    def fail(self, error: Exception) -> None:
        """Note why the compiler failed."""
        line, _, _ = str(error).strip().partition("\n")
        self.failure = f"{type(error).__name__}: {line}"


class CompiledBlocks:
    """Blocks of a network that are compiled in place, and can be put back; their names and weights do not change.

    Args:
        blocks: By any name; none within another.
        backend: Of ``torch.compile``.
        when: Tells whether a call runs what was compiled, or the block as it is. With tensors of a subclass, which may
            pretend to be something else, a call always runs the block as it is.

    Example:
        >>> block = nn.Sequential(nn.Linear(2, 2))
        >>> blocks = CompiledBlocks({"block": block}, backend="eager")
        >>> blocks.compile()
        >>> block(torch.ones(1, 2)).shape, blocks.called, blocks.failure
        (torch.Size([1, 2]), True, None)
        >>> blocks.put_back()
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        backend: Backend = "inductor",
        when: Callable[[], bool] = lambda: True,
    ) -> None:
        self.blocks = dict(blocks)
        self.backend = ForgivingBackend(backend)
        self.when = when
        self.is_on = self.called = False
        self._switches = ExitStack()

    @property
    def failure(self) -> str | None:
        """Why the compiler failed, in a line, since when all blocks run as they are; None as long as it did not."""
        return self.backend.failure

    def compile(self) -> None:
        """Let the blocks be compiled as they are called; does nothing the second time."""
        if self.is_on:
            return
        from torch._dynamo import config
        from torch._dynamo.external_utils import wrap_inline

        self.is_on = True
        limit = max(config.recompile_limit, VARIANTS * len(self.blocks))  # which is for all blocks of a class
        self._switches.enter_context(config.patch(recompile_limit=limit))
        for block in self.blocks.values():
            plain: Any = block._call_impl
            # Torch 2.11 passes by the modules of its own, unless they are called by what it does not know.
            call = wrap_inline(plain) if type(block).forward.__module__.startswith("torch.") else plain
            compiled = torch.compile(call, backend=self.backend)
            vars(block)["_compiled_call_impl"] = partial(self._call, plain, compiled)

    def _call(self, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        if self.failure is not None or not self.when() or any(map(_is_subclass, tree_leaves((args, kwargs)))):
            return plain(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        self.called = True
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:  # before anything in the block has run
            self.backend.fail(error)
        return plain(*args, **kwargs)

    def put_back(self) -> None:
        """Leave the blocks as they were; may be called twice."""
        for block in self.blocks.values() if self.is_on else ():
            vars(block).pop("_compiled_call_impl", None)
        self.is_on = False
        self._switches.close()


def _is_subclass(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)
