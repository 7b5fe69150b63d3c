"""Short sequences first, full ones after a part of the run (Li et al., arXiv:2108.06084; Press et al.,
arXiv:2012.15832).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.batches import BatchOrder, BatchTrick, batch_number
from lightning_speedups.attach.run_length import run_length
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch import Place, check_places, path_of, places_of_tensors
from lightning_speedups.core.sequence_lengths import LengthGrowth, first_positions, shorter_rows


@dataclass
class Run:
    """What belongs to a run.

    Attributes:
        batches: How many it has.
    """

    batches: int = 1


class SequenceLengthWarmup(BatchTrick):
    """Trains on short sequences first and lets them grow to their full length, which takes less time and is steadier.

    The length grows linearly from ``start`` to the full one, which is reached at ``full_from`` of the run; it depends
    on the place in the run alone, so that a resumed run goes on exactly. Sequences are cut on the device, in training
    only; evaluation always sees full ones. Token targets, masks and whatever else has the sequences' length are cut
    alike. Of batches that are padded to lengths of their own, each grows to its own.

    ``mode="truncate"`` keeps the first positions, so that a step has fewer tokens while sequences are short, at the
    same learning rate, as in Li et al. ``mode="reshape"`` parts each sequence into rows that follow each other: all
    tokens are used, a step has as many as ever, and the learning rate fits as before; attention, which costs the square
    of the length, gets cheaper. Lengths are then those into which full sequences can be parted: for 128 positions 8,
    16, 32 and 64; for a length that is a prime number of multiples, only the shortest.

    The module must take shorter sequences: positions counted from 0 and masks made for the batch's own length do,
    whole ``(T, T)`` masks in the batch do not. A compiled module compiles anew for some of the lengths;
    [LengthGrowth.lengths][lightning_speedups.core.sequence_lengths.LengthGrowth.lengths] lists them, and a larger
    ``multiple`` makes them fewer.

    When not to use it: text padded on the left; pairs that must be whole, as in translation, and single labels of
    sequences that are not told by their beginnings; sequence lengths in the batch beside them; networks that carry
    their state from row to row; short sequences, whose cost is in the layers and not in attention, with ``reshape``.

    Args:
        start: Length at the start, in positions, 1 or more.
        full_from: Fraction of the run, in (0, 1], from which on sequences are full.
        multiple: Lengths are multiples of this, 1 or more, except the full one: 8 fits the tensor cores of GPUs, 64
            their matrix products best.
        mode: ``"truncate"``: keep the first positions. ``"reshape"``: ``(N, T)`` becomes ``(N * T / length, length)``,
            for language models on a stream of tokens.
        dim: Which dimension of the tensors is the sequence, 1 or more.
        inputs: Where the sequences ``(N, ..., T, ...)`` and what goes along with them stand in the batch: an index,
            key, attribute or path (a tuple of these), or a list of such places. None: at ``"input_ids"``, else at the
            first tensor of more than ``dim`` dimensions, and wherever a tensor has the same length; name them where
            another one, such as features of a sample, may have it by chance.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the length of the run is unknown; in the first step, if the batch
            has no such sequences, or with ``mode="reshape"`` labels of whole sequences.

    Source:
        Li et al., arXiv:2108.06084 (growing lengths); Press et al., arXiv:2012.15832 (short sequences first, all tokens
        used).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SequenceLengthWarmup(start=16, mode="reshape")])
    """

    batch_order = BatchOrder.RESIZE
    run_as = Run
    run: Run

    def __init__(
        self,
        start: int = 8,
        full_from: float = 0.3,
        multiple: int = 8,
        mode: Literal["truncate", "reshape"] = "truncate",
        dim: int = 1,
        inputs: Place | list[Place] | None = None,
    ) -> None:
        super().__init__()
        check_number("start", start, 1, whole=True)
        check_number("full_from", full_from, 0, 1, above=True)
        check_number("multiple", multiple, 1, whole=True)
        check_number("dim", dim, 1, whole=True)
        check_choice("mode", mode, ("truncate", "reshape"))
        self.growth = LengthGrowth(int(start), full_from, int(multiple), mode == "reshape")
        self.dim, self.inputs = int(dim), None if inputs is None else check_places("inputs", inputs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the length of the run."""
        super().on_train_start(trainer, pl_module)
        batches = run_length(trainer).batches
        if batches is None:
            what = "lets sequences grow over the run, whose length is unknown here"
            raise self.refusal(what, "Give `max_steps`, or `max_epochs` and a loader with a length.")
        self.run.batches = max(1, batches)

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Cut the sequences."""
        parts = self.sequences(batch)
        full = next(iter(parts.values())).shape[self.dim]
        length = self.growth.length(batch_number(trainer) / self.run.batches, full)
        if not self.has_changed and self.growth.length(0.0, full) == full:
            rank_zero_warn(
                f"{self.name} finds nothing to do in the first batch: sequences of length {full} are full from the "
                "start. Lower `start` or `multiple`."
            )
        self.require_whole_meaning(batch, parts)
        cut = shorter_rows if self.growth.reshape else first_positions
        for place, part in parts.items() if length < full else ():
            batch = self.with_part(batch, place, cut(part, length, self.dim), "inputs")
        return batch

    def sequences(self, batch: Any) -> dict[Place, Tensor]:
        """Return what is cut, by places."""
        if self.inputs is None:
            found = {at: one for at, one in places_of_tensors(batch) if not one.is_nested and one.ndim > self.dim}
            tokens = [one for at, one in found.items() if path_of(at)[-1:] == ("input_ids",)]
            first = next(iter([*tokens, *found.values()]), None)
            parts = {at: one for at, one in found.items() if one.shape[self.dim] == first.shape[self.dim]}  # type: ignore[union-attr]
        else:
            parts = {place: self.tensor_of(batch, place, "inputs") for place in self.inputs}
        lengths = {one.shape[self.dim] if one.ndim > self.dim else None for one in parts.values()}
        if len(lengths) != 1 or None in lengths:
            shapes = " and ".join(str(tuple(one.shape)) for one in parts.values()) or "none"
            what = f"expected sequences of one length in dimension {self.dim} of tensors, but found {shapes}"
            raise self.misplaced(what, batch, "", inputs=None if self.inputs is None else [*self.inputs], dim=self.dim)
        return parts

    def require_whole_meaning(self, batch: Any, parts: dict[Place, Tensor]) -> None:
        """Refuse what would no longer be true of the sequences."""
        counts = {len(one) for one in parts.values()}
        for place, one in places_of_tensors(batch):
            if path_of(place)[-1:] == ("cu_seqlens",):
                what = f"cuts sequences, but what is at {place!r} counts whole ones"
                raise self.refusal(what, "Take `cu_seqlens` out of the batch, and use `block_mask`.")
            if self.growth.reshape and place not in parts and one.ndim and len(one) in counts:
                what = f"parts sequences into several, but what is at {place!r} belongs to whole ones"
                raise self.refusal(what, "Use `mode='truncate'`, or name it too with `inputs=`.", mode="reshape")
