"""Batches of like length, so that little of them is padding.

Buckets of lengths (Khomenko et al., arXiv:1708.05604) under a budget of tokens (Ott et al., arXiv:1904.01038).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_speedups.attach.batches import Seed
from lightning_speedups.attach.lengths import measured_lengths, told_lengths
from lightning_speedups.attach.loaders import LoaderGrip, Selection, each_once, goes_on
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.length_batches import Buckets, as_lengths, into_buckets, length_of, padding_share
from lightning_speedups.core.randomness import generator_for

LITTLE = 0.1
"""Share of padding in random batches below which there is little to gain."""


@dataclass
class Standing(Seed):
    """What a checkpoint holds.

    Attributes:
        done: How many batches of the epoch are done; 0 between two epochs.
        in_epoch: How many batches an epoch has.
    """

    done: int = 0
    in_epoch: int = 0


@dataclass
class Known:
    """What else belongs to a run.

    Attributes:
        dataset: Of which the lengths are known.
        buckets: Its samples by their lengths.
        planned: The seed and the epoch of which the batches are known.
        batches: This rank's.
    """

    dataset: Any = None
    buckets: Buckets | None = None
    planned: tuple[int | None, int] = (None, -1)
    batches: list[list[int]] = field(default_factory=list)


class LengthBatches(Trick):
    """Makes the training batches of samples of like length, so that little is padded; each sample once an epoch.

    Loader, DataModule, ``collate_fn``, which pads each batch to its longest sample as ever, and workers stay as they
    are. Samples are put into buckets by their lengths. In each epoch every bucket is shuffled and cut into batches, and
    all batches of the epoch are shuffled: which samples meet, and when, is another each time, but for their lengths.
    Batches have the loader's size, or, with ``max_tokens``, as many samples as fit into that with their padding: long
    ones come in small batches, and memory is bounded. The sizes of a bucket's batches are the same in every epoch, so
    that all epochs have as many, and ``trainer.estimated_stepping_batches`` is right from ``configure_optimizers`` on.

    A log line says how much padding there was and is. Under DDP all processes make the same plan from seed and epoch,
    without asking each other; they have equally many batches, and at the same time those of the nearest lengths, so
    that none waits. A run that is resumed within an epoch goes on with the next batch. Validation stays as it is. On
    functions of Python's own library it had three times the tokens a second (``benchmarks/length_batches.py``).

    The last batches of the shortest samples are made a little smaller, so that no sample is left out or comes twice;
    with ``drop_last=True`` of the loader all have one size, and some of the shortest are left out, others each time.

    A loss that is a mean over the batch stays one: with ``max_tokens`` a sample in a batch of few counts more in it
    than one in a batch of many, while tokens count about the same. Other tricks are told the mean number of samples
    then; ``EffectiveBatchSize`` cannot count on it.

    When not to use it: where all samples have about one length, or the ``collate_fn`` pads to a fixed one; with
    contrastive losses, which learn to tell lengths apart; where the length tells the label, so that batches become
    one-sided (with BatchNorm, above all).

    Args:
        batch_size: Most samples of a batch, in one process, 1 or more. None: the loader's own, or with ``max_tokens``
            no limit.
        max_tokens: Most that a batch may hold in one process, in the unit of the lengths: its samples times the longest
            of them, above 0.
        lengths: A function of a sample, or a number for each sample. None: ``lengths`` of the dataset, if it has that
            attribute, else the length of ``"input_ids"`` in a mapping, or of the first tensor, array or list of numbers
            in a sample. Where each sample has to be looked at, that is done once for a dataset, by the loader's workers
            if it has some; all processes do it.
        buckets: About how many buckets, 1 or more. With more of them less is padded, and the same samples meet more
            often; each has two batches at least.
        seed: Seed of the order. None: the seed of torch's generator (what ``seed_everything`` sets), kept in
            checkpoints.

    Attributes:
        padding: Share of its batches that is padding, in [0, 1); None before the first fit.
        padding_before: The same in random batches of the loader's size.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if there is no single DataLoader of a map-style dataset with torch's
            BatchSampler; if its sampler does not hand out each sample once, or in several processes is no
            ``DistributedSampler``; if a sample has no length, or is longer than ``max_tokens``; if there are fewer
            samples than processes need; beside tricks that choose samples or set sizes of batches, such as
            ``SubsetTraining``; or with ``overfit_batches``.

    Source:
        Khomenko et al., arXiv:1708.05604; Ott et al., arXiv:1904.01038.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LengthBatches(max_tokens=16_384)])
    """

    saved_as, run_as = Standing, Known
    saved: Standing
    run: Known

    def __init__(
        self,
        batch_size: int | None = None,
        max_tokens: float | None = None,
        lengths: Callable[[Any], float] | Sequence[float] | Tensor | None = None,
        buckets: int = 50,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, 1, whole=True, optional=True)
        check_number("max_tokens", max_tokens, 0, above=True, optional=True)
        check_number("buckets", buckets, 1, whole=True)
        check_number("seed", seed, whole=True, optional=True)
        if lengths is not None and not callable(lengths) and not hasattr(lengths, "__len__"):
            raise ValueError(f"Expected `lengths` to be a function, numbers or None, but got {lengths!r}.")
        self.batch_size, self.max_tokens, self.lengths = batch_size, max_tokens, lengths
        self.buckets, self.seed = buckets, seed
        self.padding: float | None = None
        self.padding_before: float | None = None
        self._loader = _Plans(self, any_loader=True)
        self._loader.sizes_differ, self._loader.planned_size = max_tokens is not None, batch_size
        self.grips = (self._loader,)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A resumed run has gone on."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.saved.done = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the place in the epoch into the checkpoint."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["callbacks"][self.state_key]["done"] = self._done()

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the place for checkpoints saved after the fit or its failure."""
        self.saved.done = self._done()
        super().undo(trainer, pl_module)

    def _done(self) -> int:
        """Return how many batches of the epoch are done; of a resumed run that has not gone on, the checkpoint's."""
        return self.saved.done or (self._loader.batches_done() if self._loader.is_under_way else 0)

    def plan(self, epoch: int, rank: int) -> list[list[int]]:
        """Return the batches of one process in an epoch."""
        run, asked = self.run, (self.saved.seed, epoch)
        if run.planned != asked:
            assert run.buckets is not None
            steps = run.buckets.plan(generator_for(self.saved.seed or 0, epoch))
            run.planned, run.batches = asked, [step[rank].tolist() for step in steps]
        return run.batches

    def settle(self, trainer: Trainer, loader: DataLoader[Any], selection: Selection) -> Buckets:
        """Measure the samples of a loader, and put them into buckets."""
        lengths, own_size = self._lengths_of(trainer, loader), selection.own_size
        size = own_size if self.batch_size is None and self.max_tokens is None else self.batch_size
        ranks, drops = getattr(selection.source, "num_replicas", 1), selection.batcher.drop_last
        try:
            buckets = into_buckets(lengths, size, self.max_tokens, self.buckets, ranks, drops)
        except ValueError as error:
            way_out = f"{error} Give smaller batches or a larger `max_tokens`."
            raise self.refusal("cannot make the batches", way_out, max_tokens=self.max_tokens) from error
        mixed = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
        planned = buckets.plan(torch.Generator().manual_seed(0))
        self.padding_before = padding_share(lengths, mixed.tensor_split(list(range(own_size, len(mixed), own_size))))
        self.padding = padding_share(lengths, [batch for step in planned for batch in step])
        told = f"{self.name}: padding {self.padding_before:.0%} → {self.padding:.0%}"
        rank_zero_info(f"{told}, {buckets.steps} batches an epoch, of {buckets.mean_size} samples on average.")
        if self.padding_before < LITTLE:
            rank_zero_warn(f"{told}: there is little to gain. Leave it out.")
        return buckets

    def _lengths_of(self, trainer: Trainer, loader: DataLoader[Any]) -> Tensor:
        """Return the lengths of a dataset's samples, measured if need be."""
        try:
            told = told_lengths(loader.dataset) if self.lengths is None else self.lengths
            with same_randomness(trainer):
                if told is None or callable(told):
                    told = measured_lengths(loader, told or length_of)
            return as_lengths(told, len(loader.dataset))  # type: ignore[arg-type]
        except Exception as error:  # of somebody's dataset or function, too
            what = f"needs the length of each sample, but failed: {str(error).removesuffix('.')}"
            raise self.refusal(what, "Give `lengths=`: a function of a sample, or a number for each.") from error


class _Plans(LoaderGrip):
    """Hands out the batches that the trick makes."""

    trick: LengthBatches
    makes_batches = True

    @property
    def is_under_way(self) -> bool:
        """Tell whether there is a place in an epoch."""
        return "loaders" in vars(self) and self.batches_planned is not None

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Get to know the samples, once."""
        trick, selection = self.trick, self.loaders.selection
        self._require_plain(trainer, selection)
        assert selection is not None
        trick.saved.settle(trainer, trick.seed)
        if trick.run.buckets is None or trick.run.dataset is not loader.dataset:
            trick.run = Known(loader.dataset, buckets := trick.settle(trainer, loader, selection))
            self.batches_planned = buckets.steps
            self.planned_size = buckets.mean_size if self.sizes_differ else trick.batch_size
        if trick.saved.in_epoch != self.batches_planned:
            trick.saved.done, trick.saved.in_epoch = 0, self.batches_planned or 0

    def _require_plain(self, trainer: Trainer, selection: Any) -> None:
        """Refuse a loader whose batches cannot be made in its place."""
        refusal, way_out = self.trick.refusal, "Leave one of them out."
        if selection is None:
            what = "needs one training DataLoader over a map-style dataset, batched by torch's own BatchSampler"
            raise refusal(what, "Give the DataLoader `batch_size=`; a stream has to be sorted where it is read.")
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise refusal("makes other batches in each epoch, but `overfit_batches` wants the same", way_out)
        chooses = ("samples_in_epoch", "batch_size_in_epoch", "batches_of")
        for grip in self.loaders.active_grips():
            if grip is not self and any(getattr(type(grip), one) is not getattr(LoaderGrip, one) for one in chooses):
                raise refusal(f"makes the batches of an epoch, and so does {grip.trick.name}", way_out)
        source = selection.source
        if trainer.world_size > 1 and not isinstance(source, DistributedSampler):
            what = f"shares the samples out among processes, but the sampler is a {type(source).__name__}"
            raise refusal(what, "Use a DistributedSampler, or let Lightning do so: `use_distributed_sampler=True`.")
        with same_randomness(trainer):
            if self.trick.run.dataset is not self.loader.dataset and not each_once(source, len(self.loader.dataset)):
                what = f"hands out each sample once an epoch, but the {type(source).__name__} does not"
                raise refusal(what, "Use `shuffle=True`, and give samples weights in the loss.")

    def batches_of(self, epoch: int) -> list[list[int]]:
        """Return this rank's batches."""
        return self.trick.plan(epoch, getattr(getattr(self.loaders.selection, "source", None), "rank", 0))

    def epoch_left(self) -> tuple[list[int], int] | None:
        """Return the samples of the epoch that a resumed run goes on with, and how many batches it has had."""
        if not self.trick.saved.done or self.batches_planned is None:
            return None
        order = [sample for batch in self.batches_of(self.loaders.epoch) for sample in batch]
        return order, 0 if goes_on(self.loader) else self.trick.saved.done

    def leave(self, trainer: Trainer) -> None:
        """Leave the batches to the loader."""
        super().leave(trainer)
        self.batches_planned = None
