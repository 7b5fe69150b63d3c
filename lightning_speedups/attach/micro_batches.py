"""A training batch in micro-batches: as many forward and backward passes as it takes for one to fit in memory.

Lightning's closure runs ``training_step``, zeroes the gradients of the step before and goes backward, so that those of
passes in a loop inside ``training_step`` would be lost: another closure stands in its place, and runs again when memory
runs out. The optimizer takes as much memory whatever the batch, and runs out of it in its first step, where it makes
its state: that is tried once more with the gradients that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_speedups.attach.packages import class_of
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.batch import tensors_in
from lightning_speedups.core.micro_batches import micro_sizes, split_batch

AUTOMATIC = "loops.optimization.automatic"


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out.

    Args:
        error: What was raised.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), is_out_of_memory(RuntimeError("a shape"))
        (True, False)
    """
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


def remembered(held: Iterable[tuple[Any, str]], device: str | None = None) -> Callable[[], None]:
    """Return what puts back attributes and random states, as often as it is called.

    Args:
        held: Objects and the names of attributes: tensors, which get their values back in place, lists, or else.
        device: Where the copies of tensors are to be, as ``"cpu"``; None for where these are.
    """
    random = _collect_rng_states(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    kept = [(one, name, getattr(one, name)) for one, name in held]
    copies = [x.to(device or x.device, copy=True) if isinstance(x, Tensor) else copy(x) for _, _, x in kept]

    @torch.inference_mode()  # validation leaves tensors of its own in metrics
    def put_back() -> None:
        _set_rng_states(random)
        for (one, name, value), content in zip(kept, copies, strict=True):
            setattr(one, name, value.copy_(content) if isinstance(value, Tensor) else copy(content))

    return put_back


def changed_by_passes(trainer: Trainer, keeps: bool) -> list[tuple[Any, str]]:
    """Return the attributes that forward and backward passes change, also where an exception ends them.

    Args:
        trainer: A fitting Trainer.
        keeps: Whether there are gradients of batches before, which are not zeroed.
    """
    module, wrapper = trainer.lightning_module, trainer.strategy.model
    held: list[tuple[Any, str]] = [(module, "_current_fx_name")]  # which would stay that of a hook
    if isinstance(wrapper, DistributedDataParallel):
        held.append((wrapper, "require_forward_param_sync"))  # or one process would wait for another's buffers
    for part in module.modules():
        held += [(part, name) for name, _ in part.named_buffers(recurse=False)]
        if isinstance(part, Metric):
            held += [(part, name) for name in (*part._defaults, "_update_count")]
    return held + [(p, "grad") for p in module.parameters() if keeps]


@dataclass
class MicroSize:
    """What a checkpoint holds.

    Attributes:
        size: Samples in a micro-batch; None as long as that given at the start does.
    """

    size: int | None = None


@dataclass
class UnderWay:
    """What belongs to a run.

    Attributes:
        stations: Where the trick stands.
        share: How much of its batch the micro-batch under way is; None between batches.
        means: What was logged for micro-batches, as one for all.
        options: How, by hook and name.
    """

    stations: list[Station] = field(default_factory=list)
    share: float | None = None
    means: _ResultCollection = field(default_factory=lambda: _ResultCollection(training=True))
    options: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)


class MicroBatchTrick(Trick):
    """A trick that runs batches in micro-batches, of a size that is halved when memory runs out."""

    saved_as, run_as = MicroSize, UnderWay
    saved: MicroSize
    run: UnderWay
    start: int | Literal["full"]
    min_size: int

    @property
    def size(self) -> int | None:
        """Samples in a micro-batch; None for whole batches."""
        return self.saved.size or (self.start if isinstance(self.start, int) else None)

    def grow(self) -> None:
        """Try twice as many samples in a micro-batch from the next batch on; to be called in all processes."""
        self.saved.size = None if self.size is None else 2 * self.size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand where closures are made, values are logged and optimizers step for the first time."""
        super().on_train_start(trainer, pl_module)
        epoch = trainer.fit_loop.epoch_loop
        self._join(epoch.automatic_optimization, "_make_closure", partial(self._make, trainer))
        self._join(epoch._results, "log", self._log)
        for optimizer in (one for one in raw_optimizers(trainer) if not one.state):
            self._join(optimizer, "step", partial(self._step, optimizer))

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave."""
        for station in self.run.stations:
            station.leave(self)
        super().undo(trainer, pl_module)

    def _join(self, owner: Any, method: str, act: Callable[..., Any]) -> None:
        self.run.stations.append(Station.of(owner, method))
        self.run.stations[-1].join(self, act)

    def _make(self, trainer: Trainer, make: Callable[..., Any], kwargs: Any, *args: Any) -> Any:
        whole = make(kwargs, *args)
        if not self.is_active(trainer):
            return whole
        return class_of(trainer, f"{AUTOMATIC}.Closure")(partial(self._run_batch, trainer, whole, kwargs))

    def _run_batch(self, trainer: Trainer, whole: Any, kwargs: Any) -> Any:
        """Compute loss and gradients of a batch, again and again until it fits in memory in all processes."""
        epoch, batch = trainer.fit_loop.epoch_loop, kwargs.get("batch")
        samples = next((one.shape[0] for one in tensors_in(batch) if one.ndim), 0)
        if epoch.batch_idx == 0:  # rather than when memory runs out
            self._split(batch, micro_sizes(samples, samples // 2 or 1))
        put_back = remembered(changed_by_passes(trainer, keeps=whole._zero_grad_fn is None))
        while True:
            sizes = micro_sizes(samples or 1, self.size)
            result: Any = None
            reason = "in another process"
            try:
                with class_of(trainer, "loops.utilities._block_parallel_sync_behavior")(trainer.strategy):
                    result = self._passes(trainer, whole, kwargs, sizes)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = repr(error)
            failed = max(sizes) if result is None else 0
            if trainer.world_size > 1:
                everywhere = torch.tensor(failed, device=trainer.strategy.root_device)
                failed = int(trainer.strategy.reduce(everywhere, reduce_op="max"))
            if result is not None and not failed:
                break
            put_back()
            garbage_collection_cuda()
            self._shrink(failed, reason)
        send_gradients(trainer)
        for (fx, name), options in self.run.options.items():
            mean = self.run.means[f"{fx}.{name}"]
            epoch._results.log(fx, name, mean.compute() if mean.is_tensor else mean.value, **options)
        return result

    def _passes(self, trainer: Trainer, whole: Any, kwargs: Any, sizes: Sequence[int]) -> Any:
        """Do what a closure does, for one micro-batch after the other."""
        loop, losses = trainer.fit_loop.epoch_loop.automatic_optimization, list[Tensor]()
        micros = self._split(kwargs["batch"], sizes) if len(sizes) > 1 else [kwargs["batch"]]
        self.run.options.clear()
        self.run.means.reset(metrics=False)
        for i, micro in enumerate(micros):
            share = self.run.share = sizes[i] / sum(sizes)
            result = loop._training_step(kwargs | {"batch": micro})
            if whole._zero_grad_fn is not None and i == 0:
                whole._zero_grad_fn()
            if result.closure_loss is not None:
                losses.append(result.closure_loss.detach() * share)
                if whole._backward_fn is not None:
                    whole._backward_fn(result.closure_loss * share)
        self.run.share = None
        if len(sizes) == 1:
            return result
        return class_of(trainer, f"{AUTOMATIC}.ClosureResult")(torch.stack(losses).sum() if losses else None)

    def _split(self, batch: Any, sizes: Sequence[int]) -> list[Any]:
        try:
            return split_batch(batch, sizes)
        except ValueError as error:
            what = f"cuts batches between samples, which cannot be done with this one. {error}"
            way_out = (
                "Let `collate_fn` make batches of tensors with the samples first, or, where samples share a tensor (as "
                "graphs do), let the loader make smaller batches and add them up with `EffectiveBatchSize`"
            )
            raise self.refusal(what.removesuffix("."), f"{way_out}.") from error

    def _shrink(self, failed: int, reason: str) -> None:
        """Take half the size for the next attempt; refuse one that is too small."""
        if failed <= self.min_size:
            what = f"ran out of memory with {failed} of a batch's samples at a time ({reason})"
            raise self.refusal(what, "Take half precision, smaller samples or a smaller model.", min_size=self.min_size)
        self.saved.size = max(self.min_size, -(-failed // 2))
        rank_zero_info(f"{self.name}: out of memory; from now on {self.size} samples at a time, and not {failed}.")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as what it stands around
    def _log(self, log: Callable[..., None], fx: str, name: str, value: Any, **options: Any) -> None:
        """Log; what micro-batches log only once they are all through."""
        if (share := self.run.share) is None:
            log(fx, name, value, **options)
            return
        if options["batch_size"] is not None:
            options["batch_size"] = round(options["batch_size"] / share)  # of the whole batch
        self.run.options[fx, name] = options
        self.run.means.log(fx, name, value, reduce_fx=options["reduce_fx"], batch_size=share)

    def _step(self, optimizer: Optimizer, step: Callable[..., Any], closure: Any = None, **kwargs: Any) -> Any:
        """Step for the first time; once more if memory runs out, from the same gradients and weights."""
        Station.of(optimizer, "step").leave(self)
        loss = closure and closure()
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        put_back = remembered([(p, name) for p in weights for name in ("data", "grad")], device="cpu")

        def attempt() -> Any:
            ready = [loss]  # the closure may be asked for other gradients after these
            again = {} if closure is None else {"closure": lambda: ready.pop() if ready else closure()}
            return step(**again, **kwargs)

        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        put_back()
        optimizer.state.clear()
        garbage_collection_cuda()
        return attempt()


def send_gradients(trainer: Trainer) -> None:
    """Let DDP average the gradients that passes without it have gathered, where they are about to be used.

    Nothing is sent before all processes are through: one that runs out of memory in the middle would leave the others
    waiting. Buckets and hooks are DDP's own: zeros go backward into each parameter that has a gradient.

    Args:
        trainer: A fitting Trainer.
    """
    wrapper = trainer.strategy.model
    if isinstance(wrapper, DistributedDataParallel) and wrapper.require_backward_grad_sync:
        used = [p for p in wrapper.parameters() if p.requires_grad and p.grad is not None]
        ends = [p.view_as(p) for p in used]
        prepare_for_backward(wrapper, ends)
        torch.autograd.backward(ends, [p.new_zeros(()).expand_as(p) for p in used])
