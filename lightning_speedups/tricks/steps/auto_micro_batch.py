"""Batches that do not fit in memory, in micro-batches (Huang et al., arXiv:1811.06965) of a size that finds itself."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import LBFGS

from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.micro_batches import MicroBatchTrick
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.sample_losses import LossGrip
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_number


class AutoMicroBatch(MicroBatchTrick):
    """Runs a batch in halves, quarters and so on when memory runs out, and trains as if it had fitted.

    An out-of-memory error in the forward or the backward pass is caught, gradients, random states, buffers and metrics
    are put back, and the batch runs again in micro-batches of half the size, one after the other, which add up their
    gradients for one step. The size is kept for the batches to come and in checkpoints; with ``start="full"`` a run
    that fits is left as it is. In float32 a step is that of the whole batch to about 1e-6 (relative), where the loss is
    a mean over samples; such roundings grow from step to step, as those of any other order of sums do. Accumulation,
    clipping, mixed precision and schedules see the same batches and steps as before. What is logged several times in a
    batch is logged once, as the mean over its samples, or as sum, smallest or largest, if ``reduce_fx`` says so; of a
    metric object that of the last micro-batch, and at the end of the epoch its exact value. Hooks of the backward pass
    run for each micro-batch. Tricks that change batches change the whole one before it is split.

    The optimizer makes its state in its first step: when memory runs out there, weights and gradients are put back
    (from copies on the CPU, made for this step alone), memory is cleared up, and the step is tried once more. Smaller
    batches would not help it, nor later steps; ``foreach=False`` or ``fused=True`` may.

    It buys memory, and no time: one batch in parts is slower than at once, and a smaller batch often trains as well
    (Marek et al., arXiv:2507.07101). It serves to keep the batch size of a recipe on a smaller device, or to survive
    the few batches that are larger than the others.

    Under DDP all processes take the same size as soon as one runs out of memory. To be sure that none waits for one
    that does, they exchange a number after each batch, and gradients after the backward pass instead of beside it.

    It is longer than other tricks, since gradients, the optimizer's first step, processes that wait for each other and
    values logged in parts each need a means of their own; without it a run that lacks memory for one batch ends there.

    When not to use it: with BatchNorm in small micro-batches, as it takes the statistics of each and counts each as a
    batch (keep ``min_size`` at 16 or more, or use another norm); with a loss that is a mean over something else than
    samples, as tokens that count, unless they are as many in each (or the sum is divided by a fixed number); with
    losses between the samples of a batch, such as contrastive ones, or a step in which processes wait for each other
    (``all_gather``); with dropout where the very masks matter, which are others than for the whole batch; where no
    batch is known to fit: a smaller batch size and ``accumulate_grad_batches`` then spare the failed attempt; with
    hooks that read what ``training_step`` returns beside the loss, which is left out for a batch in parts. What
    ``training_step`` writes into lists or other objects of its own is there once for each attempt.

    Args:
        start: Samples in a micro-batch at first, ``min_size`` or more; ``"full"`` for whole batches.
        min_size: Samples in a micro-batch, 1 or more, that are not halved any more: the run ends with an error.

    Attributes:
        size: Samples in a micro-batch; None for whole batches.

    Methods:
        grow: Double it.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, in manual optimization, with LBFGS, SyncBatchNorm or a static graph,
            under strategies that split the model, and beside ``FeatureCache`` and what reads each sample's loss; in the
            first batch, if it cannot be split, as one of graphs; later, if ``min_size`` does not fit.

    Source:
        Huang et al., arXiv:1811.06965; the idea of halving is that of Composer's ``device_train_microbatch_size``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AutoMicroBatch()])
    """

    def __init__(self, start: int | Literal["full"] = "full", min_size: int = 1) -> None:
        super().__init__()
        check_number("min_size", min_size, 1, whole=True)
        if start != "full":
            check_number("start", start, min_size, whole=True)
        self.start, self.min_size = start, min_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what does not go with micro-batches."""
        super().on_fit_start(trainer, pl_module)
        require_whole(self, trainer, "gradients")
        waits = trainer.world_size > 1 and any(isinstance(one, nn.SyncBatchNorm) for one in pl_module.modules())
        clashes = {
            "manual optimization": not pl_module.automatic_optimization,
            "LBFGS, which runs a step several times": any(isinstance(one, LBFGS) for one in raw_optimizers(trainer)),
            "SyncBatchNorm, in which processes wait for each other": waits,
            "DDP's `static_graph=True`": getattr(trainer.strategy.model, "static_graph", False),
        }
        for one in callbacks_of(trainer):  # of which some need to know which sample of a batch comes where
            follows = any(isinstance(grip, LossGrip) for grip in getattr(one, "grips", ()))
            replaces = getattr(one, "batch_order", None) is BatchOrder.REPLACE
            clashes[f"{type(one).__name__}, which follows single samples through a step"] = follows or replaces
        for clash in (what for what, is_there in clashes.items() if is_there):
            raise self.refusal(f"does not go with {clash}", "Leave out one of them.")
