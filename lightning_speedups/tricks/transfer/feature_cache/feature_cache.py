"""Compute what a frozen network makes of each sample once, and train on that (Donahue et al., arXiv:1310.1531)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.copies import may_split_model
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.attach.packages import MisconfigurationException
from lightning_speedups.attach.randomness import random_states
from lightning_speedups.attach.rehearsal import rehearsal
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, check_place, replace_part
from lightning_speedups.core.counts import counted
from lightning_speedups.modules.frozen_part import is_compiled
from lightning_speedups.tensors.feature_store import FeatureStore, bytes_needed
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts
from lightning_speedups.tricks.transfer.feature_cache.probe import probe
from lightning_speedups.tricks.transfer.feature_cache.recorder import Recording, shapes
from lightning_speedups.tricks.transfer.feature_cache.replay import Replay


class Phase(Enum):
    """What happens to the next batch.

    Attributes:
        WATCH: It is computed, and shows what the features are, and whether they can be kept.
        COMPARE: It is computed, and must give what was kept if its samples are known; from then on that is trusted.
        TRUST: It runs on features if its samples are known.
        OFF: Nothing, until something else is frozen: there are no features, or no room for them.
    """

    WATCH = auto()
    COMPARE = auto()
    TRUST = auto()
    OFF = auto()


@dataclass
class Caching:
    """What belongs to a run of FeatureCache.

    Attributes:
        phase: Where it stands.
        epoch: In which it has looked at modules and data; -1: in none.
        cuts: What it has seen of the modules.
        data: And of the data.
        store: The features; None before the first step has shown what they are.
        fingerprint: Of all that they depend on.
        step: The batch under way.
        hooks: By which it listens.
    """

    phase: Phase = Phase.WATCH
    epoch: int = -1
    cuts: Cuts = field(default_factory=lambda: Cuts(nn.Module()))
    data: str = ""
    store: FeatureStore | None = None
    fingerprint: str = ""
    step: Recording | Replay | None = None
    hooks: ExitStack = field(default_factory=ExitStack)


class FeatureCache(BatchTrick):
    """Computes what the frozen part of a network makes of each sample once, and hands it to the trainable part.

    What is frozen is what has ``requires_grad=False``, whoever froze it, and it may change during the run. The features
    are what comes to the largest modules of which every parameter trains, and to dropout beside these: there the steps
    of the first epoch note them, and they are kept on the CPU. They must have one size: texts may be padded to the
    longest of each batch where what trains gets one vector a text, as a BERT's classifier does, and must be padded to
    one length where it gets one for each token.
    When all samples of a batch are known, ``training_step`` gets, in place of the inputs, tensors of their shape
    without values; frozen layers make others of them at no cost, and the trainable modules get the features. Nothing in
    the module or in ``training_step`` changes, weights end as without the cache (to the last digits, where a device
    rounds a sample differently in another batch), and validation runs the whole model. The inputs themselves can be
    read. Whatever else would need values that are not there stops the run with an error; a trial after the first step
    tells, rather than the second epoch.

    Features are kept by sample, so that shuffling, a DistributedSampler or a resumed run change nothing. They are
    computed anew when the frozen weights, the modules around them, the precision or the data (in each epoch it looks at
    the sums of the weights and at a sample of the data) are others. In the 2nd, 4th, 8th, 16th ... epoch the first
    batch that could do without its inputs is computed all the same, and must give what was kept: what else changes from
    epoch to epoch is found out then, or not at all. The loader goes on loading the inputs: with features at hand that
    is what an epoch takes (``InMemoryLoader``).

    When not to use it: with random augmentation, or dropout in a part that was frozen by hand and left in training mode
    (it refuses; FreezeBackboneFinetune switches it off); for fewer than three epochs; where adapters, prompts or single
    layers train all over a frozen network, so that hardly anything stands before the first of them; for networks that
    are called with batches of another size than the loader's.

    Args:
        folder: Where to keep the features in files, for this run and others; each combination of weights and data has
            a subfolder of its own, which can be deleted at any time. Delete it when you replace single samples of the
            data, and after a power failure. None: in memory, for a run in one process.
        max_gib: Largest size of the features, in GiB, 0 or more. A run that needs more trains without the cache.
        inputs: Where the inputs stand in the batch: index, key (``"input_ids"``) or attribute, or a tuple of these, a
            path.

    Attributes:
        hits: Batches of the run that needed no frozen part.
        misses: Batches that were computed as always.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, beside a trick that changes inputs, with compiled modules, with LBFGS,
            in several processes without a ``folder``, under strategies that split the model, or with a loader whose
            samples are not known; in the first step, if
            something random or a normalisation by the batch goes into the features, or if they are not all that
            ``training_step`` needs; later, if features turn out to change from epoch to epoch.

    Source:
        Donahue et al., arXiv:1310.1531.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FeatureCache(max_gib=8)])
    """

    batch_order = BatchOrder.REPLACE
    run_as = Caching
    run: Caching

    def __init__(self, folder: str | Path | None = None, max_gib: float = 4.0, inputs: Place = 0) -> None:
        super().__init__()
        if folder is not None and not (isinstance(folder, (str, Path)) and str(folder)):
            raise ValueError(f"Expected `folder` to be a path or None, but got {folder!r}.")
        check_number("max_gib", max_gib, 0)
        check_place("inputs", inputs)
        self.folder, self.max_gib, self.inputs = folder, max_gib, inputs
        self.hits = self.misses = 0
        self._source = LoaderGrip(self, reads_rows=True)
        self.grips = (self._source,)

    def _cannot(self, what: str, way_out: str) -> MisconfigurationException:
        """Return the error that says why features would be wrong, or are not enough."""
        rule = "keeps what a frozen network makes of each sample"
        return self.refusal(f"{rule}, but {what}", f"{way_out}, or leave out {self.name}.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join loader and batch pipeline; refuse what cannot go together."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        changing = (BatchOrder.CUT, BatchOrder.AUGMENT, BatchOrder.RESIZE, BatchOrder.MIX)
        for other in callbacks_of(trainer):
            if isinstance(other, BatchTrick) and other.batch_order in changing:
                raise self._cannot(f"{other.name} changes the samples from step to step", f"Leave out {other.name}")
        if may_split_model(trainer):
            raise self.refusal(
                f"needs the whole model in each process, but {type(trainer.strategy).__name__} may split it",
                "Use `strategy='ddp'` (or a single device).",
            )
        if trainer.world_size > 1 and self.folder is None:
            what = f"keeps features in memory, which the run's {trainer.world_size} processes do not share"
            raise self.refusal(what, "Give a `folder`.", folder=None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse compiled modules, and an optimizer that runs a step several times."""
        super().on_fit_start(trainer, pl_module)
        self.hits = self.misses = 0
        for name, part in pl_module.named_modules():
            if is_compiled(part):
                raise self.refusal(
                    f"hands tensors without values to the modules, but `{name}` ({type(part).__name__}) is compiled",
                    f"Leave out `torch.compile` or {self.name}.",
                )
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in raw_optimizers(trainer)):
            what = "knows features by their place in a step, but LBFGS runs `training_step` several times in each"
            raise self.refusal(what, f"Use another optimizer, or leave out {self.name}.")

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Replace the inputs if the features of all samples are known."""
        run = self.run
        run.hooks.close()
        run.step = None
        self._follow(trainer, pl_module)
        if run.phase is Phase.OFF:
            return batch
        inputs = self.part_of(batch, self.inputs, "inputs")
        samples = self._samples(inputs)
        if run.phase is Phase.TRUST and run.store is not None and run.store.has(samples):
            self.hits += 1
            run.step = Replay(samples, run.cuts, run.store, self._cannot)
            return self.with_part(batch, self.inputs, run.step.stand_ins(inputs), "inputs")
        self.misses += 1
        states, watches = partial(random_states, trainer), run.phase is Phase.WATCH
        run.step = Recording(samples, batch, run.cuts, watches, states, self._cannot)
        return batch

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at modules and data in a new epoch, and when something was frozen, thawed or changed."""
        run, last, epoch = self.run, self.run.cuts, trainer.current_epoch
        is_same = last.train_as_then() and (run.phase is Phase.OFF or not last.moved())
        if is_same and run.epoch == epoch:
            return
        run.epoch, run.cuts = epoch, Cuts(pl_module, last)
        if run.phase is Phase.OFF and run.cuts.flags == last.flags:
            return
        if all(run.cuts.flags):
            self._turn_off("no parameter is frozen (`requires_grad=False`)")
            return
        last_data, run.data = run.data, probe(trainer, self._source.loader, self._cannot)
        if last_data not in ("", run.data):
            rank_zero_warn(
                "FeatureCache: the data or its preprocessing is not what it was. It computes the features anew."
            )
        if run.data != last_data or not run.cuts.is_like(last):
            run.phase = Phase.WATCH
        elif run.phase is Phase.TRUST and (epoch + 1).bit_count() == 1:
            run.phase = Phase.COMPARE

    def _samples(self, inputs: Any) -> Tensor:
        """Return the batch's indices in the dataset; refuse inputs that are not of these."""
        samples = self._source.rows_of_batch()
        found = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not found or any(shape[:1] != (len(samples),) for shape in found):
            raise self.refusal(
                f"expected tensors with one row for each of the batch's {counted(len(samples), 'sample')}, but found "
                f"{found or 'none'}",
                "Name the right place; a `collate_fn` that leaves samples out or repeats them does not go with "
                f"{self.name}.",
                inputs=self.inputs,
            )
        return torch.tensor(samples, dtype=torch.long)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen at the cuts."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.run.step is not None:
            self.run.hooks.enter_context(self.run.step.listening())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what came to the cuts."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        run, step = self.run, self.run.step
        run.hooks.close()
        run.step = None
        if not isinstance(step, Recording) or not run.cuts.train_as_then():
            return
        is_first = run.phase is Phase.WATCH
        if is_first:
            run.cuts = Cuts(pl_module, run.cuts, step.moved())
            self._settle(trainer, step)
        if run.store is None:
            return
        compares = run.phase is Phase.COMPARE and run.store.has(step.samples)
        step.keep(run.store, compares)
        if compares:
            run.phase = Phase.TRUST
        if is_first:
            self._rehearse(trainer, pl_module, batch, step.samples, run.store)
            run.cuts = Cuts(pl_module, run.cuts)  # a rehearsal writes buffers back

    def _settle(self, trainer: Trainer, step: Recording) -> None:
        """Find or make room for the features, when the first step has shown what they are."""
        run, kinds, samples = self.run, step.kinds, len(self._source.loader.dataset)
        if not kinds:
            self._turn_off("nothing that comes to the trainable modules is frozen, with one row for each sample")
            return
        run.phase = Phase.COMPARE
        found = run.cuts.fingerprint(str(trainer.precision), run.data)
        if run.store is not None and (found, kinds) == (run.fingerprint, run.store.kinds):
            return
        run.store = None
        need = bytes_needed(kinds, samples)
        try:
            if need > self.max_gib * 2**30:
                raise OSError(f"max_gib={self.max_gib:g}")
            folder = None if self.folder is None else Path(self.folder, found)
            run.store, run.fingerprint = FeatureStore(kinds, samples, folder), found
        except (OSError, RuntimeError) as error:  # torch's own, of a file that it cannot open
            rank_zero_warn(
                f"FeatureCache: the features of {counted(samples, 'sample')}, {shapes(kinds)}, need "
                f"{need / 2**30:.3g} GiB, which is too much ({error}). The run goes on without "
                "the cache. Give it a larger `max_gib` or a `folder` on a larger disk, or freeze "
                "up to a layer with smaller features."
            )
            run.phase = Phase.OFF

    def _rehearse(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, samples: Tensor, store: FeatureStore
    ) -> None:
        """See on a copy whether the features are all that a step needs."""
        inputs = self.part_of(batch, self.inputs, "inputs")
        try:
            with rehearsal(trainer, pl_module) as (twin, run):
                # Only a graph shows what trains.
                vars(twin)["training_step"] = torch.enable_grad()(twin.training_step)
                step = Replay(samples, Cuts(twin), store, self._cannot)
                with step.listening():
                    run(replace_part(batch, self.inputs, step.stand_ins(inputs)))
        except MisconfigurationException:
            raise
        except Exception as error:
            rank_zero_info(f"FeatureCache could not try a step on cached features: {error}.")

    def _turn_off(self, reason: str) -> None:
        if self.hits + self.misses <= 1:
            rank_zero_warn(f"FeatureCache finds nothing to do: {reason}.")
        else:
            saved = f"{self.hits} of {counted(self.hits + self.misses, 'batch')} came from the cache"
            rank_zero_info(f"FeatureCache rests from epoch {self.run.epoch} on, as {reason}; {saved}.")
        self.run.store, self.run.phase = None, Phase.OFF

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, and free the features."""
        self.run.hooks.close()
        super().undo(trainer, pl_module)
