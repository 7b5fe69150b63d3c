"""Train on a part of the samples in most epochs: InfoBatch (Qin et al., arXiv:2303.04947) drops samples of low loss
without a bias, Selective Backprop (Jiang et al., arXiv:1910.00762) prefers those of high loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_speedups.attach.batches import BatchOrder, Seed, SeededBatchTrick
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.attach.run_length import ShorterRun
from lightning_speedups.attach.sample_losses import LossGrip
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.core.subsets import Subset, draw_hard, draw_unbiased, draw_uniform

Method = Literal["infobatch", "random", "loss"]


def full_again(stop_at: float, epochs: int) -> float:
    """Return the epoch from which on all have all samples; infinity where none does.

    Args:
        stop_at: Fraction of the run's epochs, in [0, 1].
        epochs: Epochs of the run; -1 for an open end, with ``stop_at`` 1.

    Example:
        >>> full_again(0.875, 20), full_again(1.0, -1)
        (17, inf)
    """
    return math.inf if stop_at == 1.0 else math.floor(stop_at * epochs)


def update(losses: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Replace the losses of samples that an epoch has shown by their means in it.

    Args:
        losses: Last known losses, ``(N,)``, NaN where unknown.
        total: Sum of the losses seen in the epoch, ``(N,)``.
        count: How many that were, ``(N,)``.

    Example:
        >>> update(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([0.0, 4.0, 8.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([1., 4., 4.])
    """
    return torch.where((count > 0) & total.isfinite(), total / count, losses)


@dataclass
class Known(Seed):
    """What a checkpoint holds.

    Attributes:
        losses: Each sample's loss in the last epoch that has shown it, ``(N,)``; NaN where unknown.
        total: Sum of the losses that the epoch under way has shown, ``(N,)``, on their device: no step waits for them.
        count: How many these were, ``(N,)``.
        epoch: The epoch under way.
        left_out: Samples that it leaves out in this process.
        samples_saved: Samples left out in the epochs that have ended, in all processes.
    """

    losses: Tensor = field(default_factory=partial(torch.empty, 0))
    total: Tensor = field(default_factory=partial(torch.empty, 0))
    count: Tensor = field(default_factory=partial(torch.empty, 0))
    epoch: int = 0
    left_out: int = 0
    samples_saved: int = 0


@dataclass
class Epoch:
    """What else belongs to a run.

    Attributes:
        full_from: The epoch from which on all have all samples.
        indices: Of the batch under way.
        weights: What each sample counts, in the epoch ``shortened``; None for 1.
        shortened: The last epoch that left something out.
    """

    full_from: float = math.inf
    indices: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.long))
    weights: Tensor | None = None
    shortened: int = -1


class SubsetTraining(SeededBatchTrick):
    """Trains on a part of the samples in most epochs, chosen by the loss that each had when it was last seen.

    The first epoch, and those from ``stop_at`` on, have all samples; the others have exactly ``round(keep·N)``, in the
    order of the loader's own sampler (its shuffling, a DistributedSampler's share), so that the length of the run is
    known before it starts and the package's schedules end where they should; where a per-step scheduler of the module's
    own counts on full epochs, as ``trainer.estimated_stepping_batches`` does, a warning names the true number of steps.
    ``training_step`` stays as it is: each sample's loss is read from torch's own loss functions, the modules built on
    them and this package's losses; that of tokens, ``cross_entropy(scores.view(-1, V), labels.view(-1))`` with an
    ``ignore_index``, is their mean over the sample's tokens that count. A loss of your own (Dice, quantiles) ends with
    ``lightning_speedups.mean_over_samples(losses)`` instead of ``losses.mean()``, see there; if the first batch shows
    no losses, the run stops with an error. Several losses in a step add up, and the sample's weight counts for each.

    - ``"infobatch"`` drops samples at random from those below the mean loss, and weighs the others of these so that the
      expected sum of an epoch's gradients is that of all samples: fewer steps, each larger by 1/``keep`` on average,
      and so is the training loss that they log. (In the paper each low sample is dropped with probability 1/2, so that
      an epoch's length is found out as it comes; here the probability follows from ``keep``.)
    - ``"random"`` keeps every sample with the same chance: the baseline that the others have to beat. It reads no
      losses, so that any ``training_step`` will do.
    - ``"loss"`` keeps samples the more often the higher their loss, and counts each as 1: biased on purpose.

    In eight epochs of CIFAR-10 (``benchmarks/smaller_batches.py``) ``"loss"`` gave 1.2 points more than fewer epochs in
    the same time, while ``"infobatch"`` and ``"random"`` gave no more than these. InfoBatch's paper reports no loss, in
    far longer runs.

    Beside ``MixupCallback`` a blend counts for the sample at its place in the batch, with that one's weight: the
    gradient is then unbiased only as far as the blend is that sample.

    When not to use it: in runs of a few epochs (the first and the last eighth are full), on small or noisy data, where
    ``"loss"`` in particular trains on wrong labels; for a GAN, where the losses of what is generated count as those of
    the samples at the same places, and tell nothing of these (``"random"`` will do); for one pass over endless data,
    where no sample comes back; where validation and other work that is done once an epoch costs most of the time.

    Args:
        keep: Share of the samples that the shortened epochs have, in (0, 1]. With 1.0 nothing changes.
        method: ``"infobatch"``, ``"random"`` or ``"loss"``.
        stop_at: Fraction of the run's epochs, in [0, 1], after which they have all samples again.
        max_drop: For ``"infobatch"``: largest share of the low-loss samples to drop, in (0, 1); where that is not
            enough, more samples count as low. The largest weight is about 1/(1 − max_drop).
        beta: For ``"loss"``: chances are in proportion to the percentile of the loss to this power, 0 or more.
        seed: Seed of the draws, which depend on it, the rank and the epoch alone. None: the seed of torch's generator
            (what ``seed_everything`` sets), kept in checkpoints.
        log: Log ``subset_kept``, ``subset_mean_loss`` and ``subset_samples_saved`` after each epoch.

    Attributes:
        kept: Share of the samples that the epoch under way has.
        mean_loss: Mean of the samples' last known losses; None before the end of the first epoch, and with
            ``"random"``.
        samples_saved: Samples left out in the epochs that have ended, in all processes.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the loader cannot be changed or its ``collate_fn`` hands out samples
            in another order, if an epoch has too few samples for a batch, or if ``stop_at`` is a fraction of an unknown
            number of epochs; in the first batch, if it shows no losses.

    Source:
        Qin et al., arXiv:2303.04947; Jiang et al., arXiv:1910.00762.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=40, callbacks=[SubsetTraining(keep=0.7)])
    """

    batch_order = BatchOrder.LOOK
    saved_as, run_as = Known, Epoch
    saved: Known
    run: Epoch

    def __init__(
        self,
        keep: float = 0.7,
        method: Method = "infobatch",
        stop_at: float = 0.875,
        max_drop: float = 0.5,
        beta: float = 1.0,
        seed: int | None = None,
        log: bool = False,
    ) -> None:
        super().__init__(seed)
        check_number("keep", keep, 0, 1, above=True)
        check_choice("method", method, get_args(Method))
        check_number("stop_at", stop_at, 0, 1)
        check_number("max_drop", max_drop, 0, 1, above=True, below=True)
        check_number("beta", beta, 0)
        self.keep, self.method, self.stop_at, self.max_drop, self.beta = keep, method, stop_at, max_drop, beta
        self.logs_facts = log
        self.kept = 1.0
        self.reads = method != "random" and keep < 1
        self.loader = _Selects(self, reads_rows=self.reads)
        if keep < 1:
            self.grips = (self.loader, ShorterRun(self), *([LossGrip(self)] if self.reads else []))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join loader, batch pipeline and training step; settle which epochs are shortened."""
        known = self.saved
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or not self.grips:
            return
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        if epochs < 0 and self.stop_at < 1.0:
            what = "is a fraction of the run's epochs, but this Trainer has no `max_epochs`"
            raise self.refusal(what, "Give it one, or use `stop_at=1.0`.", stop_at=self.stop_at)
        self.run.full_from, self.kept = full_again(self.stop_at, epochs), 1.0
        if trainer.current_epoch > 0:  # the same Trainer goes on
            self.saved = replace(known, epoch=trainer.current_epoch)

    @property
    def mean_loss(self) -> float | None:
        """Mean of the samples' last known losses."""
        mean = float(self.saved.losses.nanmean())
        return None if math.isnan(mean) else mean

    @property
    def samples_saved(self) -> int:
        """Samples left out in the epochs that have ended, in all processes."""
        return self.saved.samples_saved

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Note which samples these are."""
        if self.reads:
            self.run.indices = torch.tensor(self.loader.rows_of_batch(), dtype=torch.long)
        return batch

    def samples_in_step(self, trainer: Trainer) -> int:
        """Return how many samples the batch has."""
        return len(self.run.indices)

    def weights_in_step(self, trainer: Trainer) -> Tensor | None:
        """Return what each sample of the batch counts."""
        if self.run.weights is None or self.run.shortened != trainer.current_epoch:
            return None
        return self.run.weights[self.run.indices].to(trainer.strategy.root_device, non_blocking=True)

    def take_losses(self, trainer: Trainer, losses: Tensor) -> None:
        """Note the batch's losses."""
        indices = self.run.indices.to(losses.device, non_blocking=True)
        self.saved.total = self.saved.total.to(losses.device).index_add_(0, indices, losses)
        self.saved.count = self.saved.count.to(losses.device).index_add_(0, indices, torch.ones_like(losses))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange what the processes have seen."""
        super().on_train_epoch_end(trainer, pl_module)
        kept = self.kept
        self.close_epoch(trainer)
        if self.logs_facts:
            facts = {"kept": kept, "mean_loss": self.mean_loss, "samples_saved": float(self.samples_saved)}
            pl_module.log_dict({f"subset_{name}": fact for name, fact in facts.items() if fact is not None})

    def make_room(self, samples: int) -> None:
        """Begin to know the losses of so many samples, unless it does; data of another size are new."""
        if samples != len(self.saved.losses):
            self.saved.losses = torch.full((samples,), math.nan)
            self.saved.total, self.saved.count = torch.zeros(samples), torch.zeros(samples)
            self.run.weights, self.saved.left_out = None, 0

    def close_epoch(self, trainer: Trainer) -> None:
        """Take what all processes have seen in the epoch for what is known."""
        self.saved.losses = update(self.saved.losses, **self._of_all_processes(trainer))
        self.saved.total, self.saved.count = torch.zeros_like(self.saved.losses), torch.zeros_like(self.saved.losses)
        self.saved.samples_saved += int(_sum(trainer, torch.tensor(self.saved.left_out)))
        self.saved.left_out, self.saved.epoch, self.kept = 0, self.saved.epoch + 1, 1.0

    def _of_all_processes(self, trainer: Trainer) -> dict[str, Tensor]:
        return {"total": _sum(trainer, self.saved.total), "count": _sum(trainer, self.saved.count)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what all processes have seen."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["callbacks"][self.state_key].update(self._of_all_processes(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the interrupted run stood."""
        super().load_state_dict(state_dict)
        if getattr(rank_zero_only, "rank", 0) > 0:  # the first process stands for all that had seen them
            self.saved.total.zero_()
            self.saved.count.zero_()


class _Selects(LoaderGrip):
    """Hands out the samples of an epoch, chosen by what the trick knows of their losses."""

    trick: SubsetTraining

    def samples_in_epoch(self, epoch: int, samples: int) -> int:
        """Return how many samples an epoch has, of all that this process has in an epoch."""
        if epoch == 0 or epoch >= self.trick.run.full_from:
            return samples
        return min(samples, max(1, round(self.trick.keep * samples)))

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Make room for the losses of the loader's dataset."""
        self.trick.run_seed(trainer)  # on all ranks at once; workers may ask for the samples before `on_train_start`
        self.trick.make_room(len(loader.dataset))
        if epoch > self.trick.saved.epoch:  # resumed behind the last batch of an epoch, whose end no hook saw
            self.trick.close_epoch(trainer)

    def select(self, trainer: Trainer, epoch: int, order: list[int]) -> list[int]:
        """Choose the epoch's samples."""
        trick, losses = self.trick, self.trick.saved.losses
        known = losses[self.require_numbers(order)] if trick.reads else torch.empty(len(order))
        kept = self.samples_in_epoch(epoch, len(order))
        generator = generator_for(trick.run_seed(trainer), trainer.global_rank, epoch, trick.batch_order)
        draws: dict[Method, Callable[[Tensor, int, torch.Generator], Subset]] = {
            "infobatch": partial(draw_unbiased, max_drop=trick.max_drop),
            "random": draw_uniform,
            "loss": partial(draw_hard, beta=trick.beta),
        }
        places, weights = draws[trick.method](known, kept, generator)
        trick.run.shortened, trick.kept, trick.saved.left_out = epoch, kept / len(order), len(order) - kept
        if trick.method == "infobatch":
            trick.run.weights = torch.ones(len(losses)).scatter(0, torch.tensor(order), weights)
        return [order[place] for place in places.tolist()]


def _sum(trainer: Trainer, values: Tensor) -> Tensor:
    """Add up over the processes."""
    return trainer.strategy.reduce(values.to(trainer.strategy.root_device, copy=True), reduce_op="sum").cpu()
