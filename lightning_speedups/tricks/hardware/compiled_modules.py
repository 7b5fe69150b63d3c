"""Compilation of the blocks that a network repeats (as in TorchTitan, Liang et al., arXiv:2410.06511) by PyTorch 2's
compiler, with what it costs and from which batch on it has paid.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.attach.batches import batch_number
from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.run_length import run_length
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.modules.compiling import CompiledBlocks, find_blocks, pick_blocks
from lightning_speedups.modules.frozen_part import is_compiled

WINDOW = 10
"""Compiled batches that are timed, compilation itself included."""


def compile_cost(seconds: list[float]) -> tuple[float, float]:
    """Return what compiling took, and what a batch takes, from the times of the first compiled batches.

    Args:
        seconds: Of each batch; in less than half of them something is compiled.

    Returns:
        Seconds beyond those of as many ordinary batches, and seconds of an ordinary one: the median.

    Example:
        >>> compile_cost([9.0, 0.5, 0.5, 2.0, 0.5])
        (10.0, 0.5)
    """
    usual = median(seconds)
    return max(0.0, sum(seconds) - len(seconds) * usual), usual


def break_even(cost: float, plain: float, compiled: float, begin: int = 0) -> float:
    """Return the batch of a run with which compiling has paid, or infinity if it never does.

    Args:
        cost: Seconds of compiling, 0 or more.
        plain: Seconds of a batch without.
        compiled: Seconds of a batch with it.
        begin: Batches before it began, which took the same either way.

    Example:
        >>> break_even(cost=20.0, plain=0.05, compiled=0.04, begin=10), break_even(20.0, plain=0.04, compiled=0.05)
        (2010, inf)
    """
    return begin + math.ceil(round(cost / (plain - compiled), 6)) if plain > compiled else math.inf


def verdict(pays_from: float, total: int | None) -> str:
    """Return what a user should know of the batch with which compiling has paid.

    Args:
        pays_from: The batch; infinity if it never does.
        total: Batches of the run; None if nobody knows.

    Example:
        >>> verdict(200, 1000)
        'pays from batch 200 on'
        >>> verdict(2000, 1000)
        'would pay from batch 2000 on, but the run has 1000; leave it out'
    """
    if pays_from == math.inf:
        return "never pays; leave it out"
    if total is not None and pays_from > total:
        return f"would pay from batch {pays_from} on, but the run has {total}; leave it out"
    return f"pays from batch {pays_from} on"


@dataclass
class Compilation:
    """What belongs to a run.

    Attributes:
        blocks: What is compiled; None when nothing is any more.
        plain: Seconds of batches before.
        compiled: Seconds of the batches after.
        since: When the batch under way began; None where it is not timed.
    """

    blocks: CompiledBlocks | None = None
    plain: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)
    since: float | None = None


class CompiledModules(Trick):
    """Compiles the blocks that the network repeats, in place, for training steps alone.

    Blocks are submodules of one class that stand in a ``Sequential`` or ``ModuleList``, two of them at least with the
    same shapes, such as a transformer's or a ResNet's; equal ones share their code. A network without any is compiled
    as a whole. The LightningModule itself is not, so that it may log. Names of weights, checkpoints and validation stay
    as they are, and nothing is left after the fit.

    The first batches run plainly. After ten compiled ones a line in the log tells what compiling cost, what a batch
    takes with and without, and from which batch on that pays. Batches are timed, and on a GPU waited for, only until
    then. Where the compiler fails, as without a C++ compiler, one warning says why, and training goes on
    plainly from that very batch.

    The compiler's own settings are those of ``torch._dynamo.config`` and ``torch._inductor.config``, such as
    ``max_autotune``; CUDA graphs must stay off. A second size of inputs compiles a second time, for all sizes; beyond
    eight variants for each block torch warns, and runs new ones plainly. Python numbers that change within a block,
    such as a rate of stochastic depth, compile anew for each value: keep them in tensors. Learning rates and the
    losses' ε are not in a block. Compiled and plain steps agree to rounding, except that dropout may draw other masks;
    a run that is resumed after the first batches compiles at once, for the numbers of the run that was not interrupted.

    When not to use it: short runs, which end before it pays; networks that spend their time in large convolutions or
    matrix products on a CPU, which the compiler does not make faster: its line in the log tells. Nor where the
    ``forward`` of a block is called, and not the block itself.

    Args:
        blocks: Paths of the modules to compile instead, such as ``"net.blocks"`` (its members, for a ``ModuleList``).
        backend: As for ``torch.compile``: a name, or a function.
        plain_batches: Batches at the run's start that run plainly and are timed, 0 or more; 0: there is no comparison.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if there is no such module, one is compiled already, the strategy may
            split modules, or there are two such callbacks.

    Source:
        The compiler: Ansel et al., https://doi.org/10.1145/3620665.3640366. By region: Liang et al., arXiv:2410.06511.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CompiledModules()])
    """

    run_as = Compilation
    run: Compilation

    def __init__(
        self,
        blocks: str | Iterable[str] | None = None,
        backend: str | Callable[..., Any] = "inductor",
        plain_batches: int = 10,
    ) -> None:
        super().__init__()
        check_number("plain_batches", plain_batches, 0, whole=True)
        if not (isinstance(backend, str) or callable(backend)):
            raise ValueError(f"Expected `backend` to be a name or a function, but got {backend!r}.")
        self.blocks = (blocks,) if isinstance(blocks, str) else blocks if blocks is None else tuple(blocks)
        self.backend, self.plain_batches = backend, plain_batches

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks, and refuse what cannot work."""
        super().on_fit_start(trainer, pl_module)
        if any(isinstance(one, CompiledModules) and one is not self for one in callbacks_of(trainer)):
            raise self.refusal("compiles a network, and there are two such callbacks", "Remove one.")
        require_whole(self, trainer, "modules")
        for name, part in pl_module.named_modules():
            if is_compiled(part):
                what = f"compiles modules itself, but {f'`{name}`' if name else type(part).__name__} is compiled"
                raise self.refusal(what, f"Leave out `torch.compile` or {self.name}.")
        try:
            blocks = find_blocks(pl_module) if self.blocks is None else pick_blocks(pl_module, self.blocks)
        except LookupError as error:
            what = f"finds no module {error.args[0]!r} in {type(pl_module).__name__}"
            raise self.refusal(what, "Give paths as `named_modules()` does.", blocks=self.blocks) from None
        if not blocks:
            rank_zero_warn(f"{self.name} finds no module with submodules in {type(pl_module).__name__}. Leave it out.")
            return
        self.run.blocks = CompiledBlocks(blocks, self.backend, when=lambda: trainer.training)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compile when it is time, and time the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        run = self.run
        if run.blocks is None:
            return
        if batch_number(trainer) > self.plain_batches:  # it counts this one already
            run.blocks.compile()
        run.since = _now(pl_module) if len(run.compiled) < WINDOW else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the batch, and tell what the first ones showed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        run, blocks = self.run, self.run.blocks
        if blocks is None:
            return
        if blocks.failure is not None:
            rank_zero_warn(f"{self.name} goes on without, as {_names(blocks)} do not compile: {blocks.failure}")
            self._put_back()
        elif run.since is not None:
            (run.compiled if blocks.is_on else run.plain).append(_now(pl_module) - run.since)
            run.since = None
            if len(run.compiled) == WINDOW:
                self._tell(trainer, blocks)

    def _tell(self, trainer: Trainer, blocks: CompiledBlocks) -> None:
        if not blocks.called:
            rank_zero_warn(f"{self.name}: no block was called in {WINDOW} batches, but perhaps its `forward`. Call it.")
            return
        (cost, compiled), plain = compile_cost(self.run.compiled), self.run.plain
        text = f"{self.name}: {_names(blocks)} compiled in {cost:.1f} s; a batch takes {1e3 * compiled:.1f}"
        if plain:
            begin = break_even(cost, median(plain), compiled, self.plain_batches)
            text += f" instead of {1e3 * median(plain):.1f} ms: {verdict(begin, run_length(trainer).batches)}"
        rank_zero_info(f"{text}." if plain else f"{text} ms.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run was too short to tell anything."""
        super().on_train_end(trainer, pl_module)
        if self.run.blocks is not None and len(self.run.compiled) < WINDOW:
            rank_zero_info(f"{self.name}: the run ended before it could be told from which batch on compiling pays.")

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the blocks as they were."""
        self._put_back()
        super().undo(trainer, pl_module)

    def _put_back(self) -> None:
        if self.run.blocks is not None:
            self.run.blocks.put_back()
            self.run.blocks = None


def _names(blocks: CompiledBlocks) -> str:
    """Return what is compiled, as ``12 × Block``."""
    kinds = Counter(type(block).__name__ for block in blocks.blocks.values())
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())


def _now(pl_module: LightningModule) -> float:
    """Return the seconds of a clock, when the device has done what it was given."""
    if pl_module.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
