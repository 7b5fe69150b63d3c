"""A step that computes everything: what comes to the cuts in it, and whether that is the same in every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedups.core.batch import tensors_in
from lightning_speedups.modules.frozen_part import after, before, different, is_frozen, is_untrained, memories
from lightning_speedups.tensors.feature_store import FeatureStore, Kind
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts, Refuse, places

States = Callable[[], dict[str, Any]]
"""Returns the random states, by generator."""


class Recording:
    """A step that computes everything. A feature is what comes to a cut, does not train, was not there before the step
    and has one row for each sample; what would make it another one in another step is refused.

    Args:
        samples: The batch's indices in the dataset, on the CPU.
        batch: The batch.
        cuts: The cuts in the module.
        watches: Whether to look at every module, rather than at the first cut alone.
        states: Returns the random states, by generator.
        refuse: Makes an exception of what was found and the way out.

    Attributes:
        features: Those that have come, by their place in the step.
    """

    def __init__(self, samples: Tensor, batch: Any, cuts: Cuts, watches: bool, states: States, refuse: Refuse) -> None:
        self.samples, self.cuts = samples, cuts
        self.features: dict[str, Tensor] = {}
        self._watches, self._states, self._refuse = watches, states, refuse
        self._known = memories([batch, cuts.parameters, cuts.still])
        self._noted: dict[tuple[int, int], Tensor] = {}  # by id and version
        self._touched = set[str]()  # names of the modules that were given nothing that trains
        self._calls, self._drawn = Counter[str](), dict[str, Any]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen in the modules while the context lasts."""
        inside, outside = self.cuts.inside, self.cuts.outside
        self._drawn = self._states()
        dropouts = {name: part for name, part in inside.items() if is_frozen(part)}
        with ExitStack() as hooks:
            hooks.enter_context(before(inside, self._note))
            hooks.enter_context(after(dropouts, _as_trained))
            if self._watches:
                hooks.enter_context(before(outside, self._look))
                hooks.enter_context(after(inside | outside, self._check_draws))
            yield

    @property
    def kinds(self) -> dict[str, Kind]:
        """What the features of a sample look like."""
        return {key: Kind(tuple(feature.shape[1:]), feature.dtype) for key, feature in self.features.items()}

    def moved(self) -> list[str]:
        """Return the names of tensors that changed during the step; refuse such as features may depend on."""
        moved = self.cuts.moved()
        if wrong := [name for name in moved if name.rpartition(".")[0] in self._touched]:
            raise self._refuse(f"{', '.join(wrong)} changed during the step", "Put the frozen part in evaluation mode")
        return moved

    def keep(self, store: FeatureStore, compares: bool) -> None:
        """Keep the features; refuse them if they are of other kinds than those that are kept.

        Args:
            store: Where.
            compares: Whether it has these samples, and must have the same features for them.
        """
        found = self.kinds
        if len(self.samples) == 1:  # where anything in one row may look like a feature
            found = {key: kind for key, kind in found.items() if key in store.kinds}
        if found != store.kinds:
            raise self._refuse(
                f"what comes to the trainable modules in this step has the shapes {shapes(self.kinds)}, and in the "
                f"first one it had {shapes(store.kinds)}",
                "Let all inputs have one size (texts be padded to one length, as by `padding='max_length'`), all steps "
                "call the same modules, and nothing but features have as many rows as the first batch",
            )
        features = {key: self.features[key] for key in found}
        if compares:
            self._compare(store, features)
        store.write(self.samples, features)

    def _compare(self, store: FeatureStore, features: Mapping[str, Tensor]) -> None:
        for key, feature in features.items():
            apart = different(store.read(key, self.samples), feature.cpu()).max().item()
            if apart > (0.05 if feature.dtype.itemsize < 4 else 0.01):  # more than rounding
                raise self._refuse(
                    f"in this epoch it makes something else of the same samples than what is kept (by {apart:.0%}): "
                    "they, the network, or something that trains and goes into the features has changed",
                    "Leave out what changes from epoch to epoch, delete a `folder` of other samples",
                )

    def _note(self, name: str, module: nn.Module, given: Any) -> None:
        if self._watches or not self._calls:
            self._check_draws(name, module, given)
        for key, leaf in places(self._calls, name, given)[0].items():
            if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.shape[:1] != self.samples.shape:
                continue
            seen = id(leaf), leaf._version
            if seen not in self._noted and leaf.layout == torch.strided and not memories(leaf) <= self._known:
                self._noted[seen] = leaf  # the next cut may be given it too
                self.features[key] = leaf.detach().clone()

    def _look(self, name: str, module: nn.Module, given: Any) -> None:
        self._check_draws(name, module, given)
        if not is_untrained(given):
            return
        self._touched.add(name)
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise self._refuse(
                f"`{name}` ({type(module).__name__}) normalises by the statistics of the batch",
                "Put it in evaluation mode (`.eval()`, after every `.train()`, as FreezeBackboneFinetune does)",
            )

    def _check_draws(self, name: str, module: nn.Module, values: Any) -> None:
        """Refuse random numbers that were drawn since the last look, unless something that trains came after them."""
        last, self._drawn = self._drawn, self._states()
        if last != self._drawn and is_untrained(values):
            drew = next(generator for generator in last if last[generator] != self._drawn[generator])
            raise self._refuse(
                f"something random goes into it, in or before `{name}` ({type(module).__name__}"
                f"{'' if module.training else ', in evaluation mode'}): dropout, or augmentation in the model (it drew "
                f"from the generator of {drew})",
                "Switch it off there (`.eval()`, as FreezeBackboneFinetune does), move dropout behind the first "
                "trainable layer, into one module with it, let what has nothing to do with the features draw from "
                "a generator of its own",
            )


def _as_trained(name: str, module: nn.Module, made: Any) -> None:
    """Let what is made of a random tensor pass for what trains: it is no feature, and may be random."""
    for tensor in tensors_in(made):
        tensor.requires_grad_()


def shapes(kinds: Mapping[str, Kind]) -> str:
    """Return the shapes of features in words.

    Args:
        kinds: By their place in the step.

    Example:
        >>> shapes({"head 0 0": Kind((6,), torch.float32)}), shapes({})
        ('(6,) for `head`', 'none')
    """
    return ", ".join(f"{kind.shape} for `{key.split()[0]}`" for key, kind in kinds.items()) or "none"
