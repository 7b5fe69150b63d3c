"""Compute what a frozen network makes of each sample once, and train on that (Donahue et al., arXiv:1310.1531)."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lightning_speedups.attach.batches import BatchOrder, BatchTrick, transferred
from lightning_speedups.attach.copies import NoCopyError, may_split_model
from lightning_speedups.attach.loaders import LoaderGrip, take_batch
from lightning_speedups.attach.randomness import random_states, same_randomness
from lightning_speedups.attach.rehearsal import rehearsal
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, check_place, replace_part
from lightning_speedups.modules.frozen_part import (
    after,
    before,
    checksum,
    different,
    find_cuts,
    find_outside,
    is_frozen,
    is_untrained,
    memories,
    random_transforms,
)
from lightning_speedups.tensors.feature_store import FeatureStore, Kind, bytes_needed, fingerprint, spread
from lightning_speedups.tensors.unloaded import Origin, Shortcuts, Unloaded

PROBES = 16
"""Samples that are loaded to see whether the data is random, and whether it has changed."""


class CannotCacheError(MisconfigurationException):
    """Cached features would be wrong, or are not enough."""


@dataclass
class _Step:
    """A batch on its way.

    Attributes:
        samples: Their indices in the dataset, on the CPU.
        origin: Of the stand-ins for its inputs; None: it has its inputs, and everything is computed.
        inputs: Memories of the inputs.
        others: Memories of what is no feature: other parts of the batch, frozen weights.
        versions: Of the tensors outside the cuts when it began.
        drawn: Random states when they were last looked at.
        calls: How often each cut was called.
        features: What came to the cuts.
        noted: The tensors that these are, and their versions.
        touched: Modules of the frozen part that were called.
        bypass: A cut that was given the inputs themselves.
        odd: What came to the cuts that has not one row for each sample.
    """

    samples: Tensor
    origin: Origin | None = None
    inputs: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    versions: dict[str, Any] = field(default_factory=dict)
    drawn: Any = None
    calls: Counter[str] = field(default_factory=Counter)
    features: dict[str, Tensor] = field(default_factory=dict)
    noted: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    bypass: str | None = None
    odd: set[str] = field(default_factory=set)


class FeatureCache(BatchTrick):
    """Computes what the frozen part of a network makes of each sample once, and hands it to the trainable part.

    What is frozen is what has ``requires_grad=False``, whoever froze it, and it may change during the run. The features
    are what comes to the largest modules of which every parameter trains: there the steps of the first epoch note them,
    and they are kept on the CPU.
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

    When not to use it: with random augmentation, or dropout in the frozen part (it refuses); for fewer than three
    epochs; where adapters, prompts or single layers train all over a frozen network, so that hardly anything stands
    before the first of them; for networks that are called with batches of another size than the loader's.

    Args:
        folder: Where to keep the features in files, for this run and others; each combination of weights and data has
            a subfolder of its own, which can be deleted at any time. None: in memory; in several processes, a temporary
            folder that they share. Delete it when you replace single samples of the data, and after a power failure.
        max_gib: Largest size of the features, in GiB, above 0. A run that needs more trains without the cache.
        inputs: Where the inputs stand in the batch: index, key or attribute, or a tuple of these, a path.

    Attributes:
        hits: Batches of the run that needed no frozen part.
        misses: Batches that were computed as always.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, beside a trick that changes inputs, with compiled modules, under
            strategies that split the model, or with a loader whose samples are not known; in the first step, if
            something random or a normalisation by the batch goes into the features, or if they are not all that
            ``training_step`` needs; later, if features turn out to change from epoch to epoch.

    Source:
        Donahue et al., arXiv:1310.1531.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FeatureCache(max_gib=8)])
    """

    batch_order = BatchOrder.REPLACE

    def __init__(self, folder: str | Path | None = None, max_gib: float = 4.0, inputs: Place = 0) -> None:
        super().__init__()
        if folder is not None and not (isinstance(folder, (str, Path)) and str(folder)):
            raise ValueError(f"Expected `folder` to be a path or None, but got {folder!r}.")
        check_number("max_gib", max_gib, 0, above=True)
        check_place("inputs", inputs)
        self.folder, self.max_gib, self.inputs = folder, max_gib, inputs
        self.hits = self.misses = 0
        self._source = LoaderGrip(self)
        self.grips = (self._source,)
        self._forget()

    def _forget(self) -> None:
        self._temporary: Path | None = None
        self._fingerprint = ""
        self._look_again()
        self._data = ""
        self._parameters: list[nn.Parameter] = []
        self._cuts: dict[str, nn.Module] = {}
        self._outside: dict[str, nn.Module] = {}
        self._still: dict[str, Tensor] = {}  # tensors outside the cuts that do not train
        self._moving = set[str]()  # names of those that change in a step, but are no part of the features
        self._versions: dict[str, Any] = {}
        self._sums = b""
        self._constant = set[str]()  # places of what has as many rows as a batch by chance
        self._step: _Step | None = None
        self._hooks: ExitStack | None = None
        self._is_off = False
        self._drop()

    def _look_again(self) -> None:
        self._flags: tuple[bool, ...] | None = None
        self._data_seen = False
        self._shortcuts: Shortcuts | None = None

    def _drop(self) -> None:
        if self._temporary is not None and self._fingerprint:
            shutil.rmtree(self._temporary / self._fingerprint, ignore_errors=True)
        self._store: FeatureStore | None = None
        self._fingerprint = ""
        self._is_settled = self._is_checked = False

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = None

    # Fit start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join loader and batch pipeline; refuse what cannot go together."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for other in callbacks_of(trainer):
            if isinstance(other, BatchTrick) and other.batch_order in (
                BatchOrder.AUGMENT,
                BatchOrder.RESIZE,
                BatchOrder.MIX,
            ):
                raise MisconfigurationException(
                    f"FeatureCache keeps what a frozen network makes of each sample, but {other.name} changes the"
                    " samples from step to step. Use one of them."
                )
        if may_split_model(trainer):
            raise MisconfigurationException(
                f"FeatureCache needs the whole model in each process, but {type(trainer.strategy).__name__} may split "
                "it. Use `strategy='ddp'` (or a single device)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse compiled modules."""
        super().on_fit_start(trainer, pl_module)
        self.hits = self.misses = 0
        for name, part in pl_module.named_modules():
            compiled = part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"
            if compiled or isinstance(part, torch.jit.ScriptModule):
                raise MisconfigurationException(
                    f"FeatureCache hands tensors without values to the modules, but `{name}` "
                    f"({type(part).__name__}) is compiled. Leave out `torch.compile` or FeatureCache."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let several processes share a folder."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and self.folder is None:
            made = tempfile.mkdtemp(prefix="feature-cache-") if trainer.is_global_zero else None
            self._temporary = Path(trainer.strategy.broadcast(made or ""))
            # By whichever process still can; those that Lightning has forked hear of no exception.
            Finalize(None, shutil.rmtree, (self._temporary, True), exitpriority=0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the modules and the data again, and now and then at the features."""
        super().on_train_epoch_start(trainer, pl_module)
        self._look_again()
        if (trainer.current_epoch + 1).bit_count() == 1:
            self._is_checked = False

    # Each batch

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Replace the inputs if the features of all samples are known."""
        self._unhook()
        self._step = None
        self._follow(trainer, pl_module)
        if self._is_off:
            return batch
        inputs = self.part_of(batch, self.inputs, "inputs")
        samples = self._samples(trainer, inputs)
        if self._store is not None and self._is_settled and self._is_checked and self._store.has(samples):
            self.hits += 1
            self._step = _Step(samples, Origin(_without_values))
            return self._without_inputs(batch, self._step)
        self.misses += 1
        own = memories(inputs)
        others = memories([batch, self._parameters, self._still]) - own
        self._step = _Step(samples, None, own, others, self._look())
        return batch

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notice that something was frozen or thawed, or that frozen weights or the data are others."""
        if self._flags is None:
            self._parameters = list(pl_module.parameters())
        flags = tuple(parameter.requires_grad for parameter in self._parameters)
        if flags != self._flags:
            self._flags = flags
            cuts = find_cuts(pl_module)
            if cuts != self._cuts:
                self._cuts, self._moving, self._constant = cuts, set(), set()
                self._drop()
            self._outside = find_outside(pl_module, cuts)
            self._still = {
                f"{name}.{own}".lstrip("."): tensor
                for name, part in self._outside.items()
                for own, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
                if not tensor.requires_grad and f"{name}.{own}".lstrip(".") not in self._moving
            }
        versions, data = self._look(), self._data
        if all(flags):
            self._turn_off("no parameter is frozen (`requires_grad=False`)")
        elif not self._data_seen:
            data, self._data_seen = self._probe(trainer), True
            if checksum(self._still.values()) != self._sums:  # `.data` has no versions
                self._is_settled = False
        if versions != self._versions or data != self._data:
            if self._data and data != self._data:
                rank_zero_warn(
                    "FeatureCache: the data or its preprocessing is not what it was. It computes the features anew."
                )
            self._versions, self._data = versions, data
            self._is_off, self._is_settled, self._shortcuts = all(flags), False, None

    def _look(self) -> dict[str, Any]:
        return {name: (tensor._version, tensor.data_ptr()) for name, tensor in self._still.items()}

    def _turn_off(self, reason: str) -> None:
        say = rank_zero_warn if self.hits + self.misses <= 1 and not self._is_off else rank_zero_info
        if not self._is_off:
            say(f"FeatureCache finds nothing to do: {reason}.")
        self._drop()
        self._is_off = True

    def _without_inputs(self, batch: Any, step: _Step) -> Any:
        inputs = self.part_of(batch, self.inputs, "inputs")
        return replace_part(
            batch,
            self.inputs,
            tree_map_only(Tensor, lambda one: Unloaded.of(one, step.origin, values=lambda: one.clone()), inputs),
        )

    def _samples(self, trainer: Trainer, inputs: Any) -> Tensor:
        samples = self._source.require_numbers(self._source.samples_of_batch())
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not shapes or any(not shape or shape[0] != len(samples) for shape in shapes):
            raise MisconfigurationException(
                f"FeatureCache(inputs={self.inputs!r}) expected tensors with one row for each of the batch's "
                f"{len(samples)} samples, but found {shapes or 'none'}. Name the right place; a `collate_fn` that "
                "leaves samples out or repeats them does not go with FeatureCache."
            )
        return torch.tensor(samples, dtype=torch.long)

    def _probe(self, trainer: Trainer) -> str:
        """Return a fingerprint of some samples as they come to the model; refuse random ones."""
        dataset = self._source.loader.dataset
        with same_randomness(trainer):
            before = random_states(trainer)
            indices = spread(PROBES, len(dataset))
            one, other = (fingerprint(transferred(trainer, take_batch(self._source.loader, indices))) for _ in range(2))
            drew = random_states(trainer) != before
        if drew or one != other:
            found = "are different when they are loaded twice" if one != other else "draw random numbers when loaded"
            names = random_transforms(dataset)
            raise CannotCacheError(
                f"FeatureCache keeps what a frozen network makes of each sample, but samples of the "
                f"{type(dataset).__name__} {found}{': it has ' + ', '.join(names) if names else ''}. Leave out random "
                "augmentation, in the dataset, in `collate_fn` and in the transfer hooks, or leave out FeatureCache."
            )
        return fingerprint([one, len(dataset)])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen at the cuts."""
        step = self._step
        if step is None:
            return
        self._hooks = ExitStack()
        if step.origin is not None:
            if self._shortcuts is None:
                frozen = (part for part in self._outside.values() if is_frozen(part))
                self._shortcuts = Shortcuts(frozen)
            self._hooks.enter_context(self._shortcuts.taken())
            self._hooks.enter_context(before(self._cuts, partial(self._fill, step)))
            return
        step.drawn = random_states(trainer)
        self._hooks.enter_context(before(self._cuts, partial(self._note, trainer, step)))
        if not self._is_settled:
            self._hooks.enter_context(before(self._outside, partial(self._watch, trainer, step)))
            self._hooks.enter_context(after(self._outside, partial(self._check_draws, trainer, step)))

    # A step that computes everything

    def _watch(self, trainer: Trainer, step: _Step, name: str, module: nn.Module, given: Any) -> None:
        self._check_draws(trainer, step, name, module, given)
        if not is_untrained(given):
            return
        step.touched.add(name)
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise CannotCacheError(
                f"FeatureCache keeps what a frozen network makes of each sample, but `{name}` ({type(module).__name__})"
                " normalises by the statistics of the batch. Put it in evaluation mode (`.eval()`, after every "
                "`.train()`, as FreezeBackboneFinetune does), or leave out FeatureCache."
            )

    def _check_draws(self, trainer: Trainer, step: _Step, name: str, module: nn.Module, given: Any) -> None:
        drawn = random_states(trainer)
        if drawn != step.drawn and is_untrained(given):
            whose = [*("Python", *["NumPy"] * 5), *["torch"] * len(drawn)]
            drew = [of for of, one, other in zip(whose, drawn, step.drawn, strict=False) if one != other]
            raise CannotCacheError(
                "FeatureCache keeps what a frozen network makes of each sample, but something random goes into it, in "
                f"or before `{name}` ({type(module).__name__}{'' if module.training else ', in evaluation mode'}): "
                f"dropout, or augmentation in the model (it drew from the generator of {drew[0]}). Switch it off there "
                "(`.eval()`), move dropout behind the first trainable layer, into one module with it, let what has "
                "nothing to do with the features draw from a generator of its own, or leave out FeatureCache."
            )
        step.drawn = drawn

    def _note(self, trainer: Trainer, step: _Step, name: str, module: nn.Module, given: Any) -> None:
        if not self._is_settled or not step.calls:
            self._check_draws(trainer, step, name, module, given)
        for key, leaf in _places(step, name, given):
            if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.layout != torch.strided or not leaf.ndim:
                continue
            (memory,) = memories([leaf])
            if memory in step.inputs:
                step.bypass = name
            if len(leaf) != len(step.samples):
                step.odd.add(key)
            if key in step.odd | self._constant or memory in step.others | step.inputs:
                continue
            if step.noted.get(id(leaf), (None, -1))[1] != leaf._version:  # else it came to another cut before
                step.noted[id(leaf)] = leaf, leaf._version
                step.features[key] = leaf.detach().clone()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Be ready for a step that is done again, as some optimizers ask for (LBFGS)."""
        if self._step is None or not pl_module.automatic_optimization:
            return
        self._step.calls.clear()
        if self._step.origin is None:
            self._step.drawn = random_states(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what came to the cuts."""
        self._unhook()
        step, self._step = self._step, None
        if step is None or step.origin is not None:
            return
        if tuple(parameter.requires_grad for parameter in self._parameters) != self._flags:
            return  # somebody has thawed something since
        if self._store is not None and (constant := step.odd & self._store.kinds.keys()):
            self._constant |= constant
            self._is_settled = False
        if not self._is_settled and not self._settle(trainer, step):
            return
        assert self._store is not None
        self._compare(step)
        features = {key: step.features[key] for key in self._store.kinds if key in step.features}
        others = step.features.keys() - features.keys() if len(step.samples) > 1 else ()
        if others or _kinds(features) != self._store.kinds:
            raise CannotCacheError(
                "FeatureCache keeps one set of features for each sample, but what comes to the trainable modules in "
                f"this step has the shapes {_shapes(_kinds(step.features))}, and in the first one it had "
                f"{_shapes(self._store.kinds)}. Let all inputs have one size and all steps call the same modules, or "
                "leave out FeatureCache."
            )
        self._store.write(step.samples, features)
        if not self._is_settled:
            self._is_settled = True
            self._rehearse(trainer, pl_module, batch, step.samples)
            self._versions = self._look()  # a rehearsal writes buffers back

    def _settle(self, trainer: Trainer, step: _Step) -> bool:
        """Find or make room for the features, when the first step has shown what they are."""
        moved = [name for name, version in self._look().items() if version != step.versions[name]]
        wrong = [name for name in moved if name.rpartition(".")[0] in step.touched]
        if wrong:
            raise CannotCacheError(
                f"FeatureCache keeps what a frozen network makes of each sample, but {', '.join(wrong)} changed during "
                "the step. Put the frozen part in evaluation mode, or leave out FeatureCache."
            )
        for name in moved:
            self._moving.add(name)
            del self._still[name]
        self._versions, self._sums = self._look(), checksum(self._still.values())
        if step.bypass is not None:
            self._turn_off(f"`{step.bypass}` trains, and takes the inputs themselves")
            return False
        if not step.features:
            self._turn_off("nothing that comes to the trainable modules is frozen, with one row for each sample")
            return False
        kinds, samples = _kinds(step.features), len(self._source.loader.dataset)
        found = self._print(trainer)
        if self._store is not None and (found, kinds) == (self._fingerprint, self._store.kinds):
            return True
        self._drop()
        need, limit = bytes_needed(kinds, samples), self.max_gib * 2**30
        try:
            if need > limit:
                raise OSError(f"max_gib={self.max_gib:g}")
            root = self._temporary if self.folder is None else Path(self.folder)
            self._store = FeatureStore(kinds, samples, root and root / found)
            self._fingerprint = found
        except (OSError, RuntimeError) as error:  # torch's own, of a file that it cannot open
            rank_zero_warn(
                f"FeatureCache: the features of {samples:,} samples, {_shapes(kinds)}, need {need / 2**30:.3g} GiB, "
                f"which is too much ({error}). The run goes on without the cache. Give it a larger `max_gib` or a "
                "`folder` on a larger disk, or freeze up to a layer with smaller features."
            )
            self._is_off = True
        return not self._is_off

    def _print(self, trainer: Trainer) -> str:
        modules = [
            (name, type(part).__qualname__, part.training, re.sub(" at 0x[0-9a-f]+", "", part.extra_repr()))
            for name, part in self._outside.items()
            if name
        ]
        return fingerprint([self._still, modules, list(self._cuts), str(trainer.precision), self._data])

    def _compare(self, step: _Step) -> None:
        """Compare a first batch with what is known of its samples."""
        assert self._store is not None
        if self._is_checked or not self._store.has(step.samples):
            return
        for key in self._store.kinds.keys() & step.features.keys():
            feature = step.features[key]
            apart = different(self._store.read(key, step.samples), feature.cpu()).max().item()
            if apart > (0.05 if feature.dtype.itemsize < 4 else 0.01):
                if self._store.was_there:
                    rank_zero_warn(
                        f"FeatureCache: the features in {self.folder} are not those of this run (by {apart:.0%}). It "
                        "computes them anew."
                    )
                    self._store = self._store.anew()
                    return
                raise CannotCacheError(
                    "FeatureCache keeps what a frozen network makes of each sample, but in this epoch it makes "
                    f"something else of the same samples (by up to {apart:.0%}): they, the network, or something that "
                    "trains and goes into the features has changed. Leave out what changes from epoch to epoch, or "
                    "FeatureCache."
                )
        self._is_checked = True
        self._store.was_there = False  # what is in it is of this run

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, batch: Any, samples: Tensor) -> None:
        """See on a copy whether the features are all that a step needs."""
        step = _Step(samples, Origin(_without_values))
        try:
            with rehearsal(trainer, pl_module) as (twin, run):
                # Only a graph shows what trains.
                vars(twin)["training_step"] = torch.enable_grad()(twin.training_step)
                with before({name: twin.get_submodule(name) for name in self._cuts}, partial(self._fill, step)):
                    run(self._without_inputs(batch, step))
        except NoCopyError:
            return
        except CannotCacheError:
            raise
        except Exception as error:
            rank_zero_info(f"FeatureCache could not try a step on cached features: {error}.")

    # A step on features

    def _fill(self, step: _Step, name: str, module: nn.Module, given: Any) -> Any:
        assert self._store is not None
        leaves, spec = tree_flatten(given)
        for place, (key, leaf) in enumerate(_places(step, name, given)):
            if not isinstance(leaf, Unloaded):
                continue
            if leaf.origin is not step.origin:
                raise _without_values(f"the trainable `{name}` was given what an earlier step had made of its inputs")
            if leaf.loaded is None:
                kind = self._store.kinds.get(key)
                if kind is None or leaf.shape != (len(step.samples), *kind.shape):
                    raise _without_values(
                        f"the trainable `{name}` needs a tensor of the shape {tuple(leaf.shape)}, made of them, that is"
                        " not among the features"
                    )
                leaf.load(self._store.read(key, step.samples))
            leaves[place] = leaf.loaded
        return tree_unflatten(leaves, spec)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, and free the features."""
        super().undo(trainer, pl_module)
        self._unhook()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary = None
        self._forget()


def _without_values(what: str) -> Exception:
    return CannotCacheError(
        f"FeatureCache ran `training_step` on cached features, without the inputs' values, but {what}. Only trainable "
        "modules may use what a frozen network makes of the inputs: not a loss, a metric, a log, a hook of a callback "
        "or a sum with what trains. Let them take it in, freeze other layers, or leave out FeatureCache."
    )


def _places(step: _Step, name: str, given: Any) -> list[tuple[str, Any]]:
    """Return what a cut was given, each under the name of its place in the step."""
    call = step.calls[name]
    step.calls[name] += 1
    return [(f"{name} {call} {place}", leaf) for place, leaf in enumerate(tree_leaves(given))]


def _kinds(features: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {key: Kind(tuple(feature.shape[1:]), feature.dtype) for key, feature in features.items()}


def _shapes(kinds: Mapping[str, Kind]) -> str:
    shown = [f"{tuple(kind.shape)} for `{key.split()[0]}`" for key, kind in kinds.items()]
    return ", ".join(shown) or "none"
