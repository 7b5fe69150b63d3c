"""A step on features, without the inputs' values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only, tree_unflatten

from lightning_speedups.modules.frozen_part import before
from lightning_speedups.tensors.feature_store import FeatureStore
from lightning_speedups.tensors.unloaded import Origin, Unloaded
from lightning_speedups.tricks.transfer.feature_cache.cuts import Cuts, Refuse, places


class Replay:
    """A step in which the cuts are given what is kept, and everything before them is given nothing.

    Args:
        samples: The batch's indices in the dataset, on the CPU.
        cuts: The cuts in the module.
        store: Features of these samples.
        refuse: Makes an exception of what was found and the way out.
    """

    def __init__(self, samples: Tensor, cuts: Cuts, store: FeatureStore, refuse: Refuse) -> None:
        self.samples, self.cuts, self.store = samples, cuts, store
        self._refuse = refuse
        self._origin = Origin(self._needs_values)
        self._calls = Counter[str]()

    def stand_ins(self, inputs: Any) -> Any:
        """Return what takes the place of the inputs; they themselves can be read from it.

        Args:
            inputs: Tensors and other things, nested as they may be.
        """
        return tree_map_only(Tensor, lambda one: Unloaded.of(one, self._origin, values=lambda: one.clone()), inputs)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hand features to the cuts while the context lasts."""
        with self.cuts.shortcuts.taken(), before(self.cuts.inside, self._fill):
            yield

    def _fill(self, name: str, module: nn.Module, given: Any) -> Any:
        found, spec = places(self._calls, name, given)
        return tree_unflatten([self._loaded(name, key, leaf) for key, leaf in found.items()], spec)

    def _loaded(self, name: str, key: str, leaf: Any) -> Any:
        if not isinstance(leaf, Unloaded):
            return leaf
        if leaf.origin is not self._origin:
            raise self._needs_values(f"the trainable `{name}` was given what an earlier step had made of its inputs")
        if leaf.loaded is not None:
            return leaf.loaded
        kind = self.store.kinds.get(key)
        is_kept = kind is not None and leaf.shape == (len(self.samples), *kind.shape)
        values = self.store.read(key, self.samples) if is_kept else leaf.known()
        if values is None:
            raise self._needs_values(
                f"the trainable `{name}` needs a tensor of the shape {tuple(leaf.shape)}, made of them, that is not "
                "among the features"
            )
        return leaf.load(values)

    def _needs_values(self, what: str) -> Exception:
        return self._refuse(
            f"in a step that has these and not the inputs' values {what}",
            "Only trainable modules may use what a frozen network makes of the inputs: not a loss, a metric, a log, a "
            "hook of a callback or a sum with what trains. Let them take it in, freeze other layers",
        )
