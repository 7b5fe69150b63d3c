"""Sequences packed into rows of a fixed length, which need hardly any padding (Krell et al., arXiv:2107.02027)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.core.arguments import check_number

IGNORED = -100
"""The label that torch's losses leave out."""


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put sequences into rows: the longest first, each into the first row that has room for it.

    Args:
        lengths: Of the sequences, each in [1, ``size``].
        size: Length of a row.

    Returns:
        The numbers of the sequences in each row. Rows are at most 11/9 of the fewest possible and 6/9 of a row more.

    Raises:
        ValueError: If a sequence does not fit into a row, or is empty.

    Example:
        >>> first_fit_decreasing([3, 5, 4, 1, 2], 8)
        [[1, 0], [2, 4, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[number]
        if not 1 <= length <= size:
            raise ValueError(
                f"Expected sequences of 1 to {size} tokens, but got one of {length}. Cut it or leave it out in the "
                "dataset, or make rows longer."
            )
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(number)
        room[row] -= length
    return rows


def pack(
    max_length: int, pad: int = 0, shift: bool = True, varlen: bool = False
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return a ``collate_fn`` that packs the sequences of a batch into rows of a fixed length.

    The model must keep the sequences of a row apart, by a mask
    ([block_mask][lightning_speedups.core.packing.block_mask]) or by torch's variable-length attention, and take
    positions from ``position_ids``. `PackingCheck` refuses one that does not. The mean of the loss over tokens is then
    what it is over padded rows.

    When not to use it: attention that takes neither a mask nor ``cu_seqlens``, recurrent networks, norms over the
    positions of a row; sequences that all have one length. The number of rows changes from batch to batch. With a mask
    attention computes whole rows all the same; only variable-length attention, which torch has for CUDA, saves there.

    Args:
        max_length: Length of a row, in tokens, 1 or more; no sequence may be longer.
        pad: The token that fills rows up.
        shift: Whether the model itself compares each token with the next one's label, as those of Hugging Face do. Then
            the first label of each sequence, which belongs to nothing before it, is left out (−100). False: labels
            belong to the tokens at their own positions.
        varlen: Also tell what variable-length attention asks for (``torch.nn.attention.varlen.varlen_attn``):
            ``cu_seqlens``, int32, where sequences and padding begin and end in the flattened rows, and ``max_seqlen``,
            the longest of these. Give ``self.log`` its ``batch_size`` then, which Lightning cannot tell from them.

    Returns:
        A function that takes samples: the tokens ``(T,)``, or a mapping that has them as ``input_ids`` beside others of
        the same length, such as ``labels``, which are else the tokens. It returns a dict of such tensors, ``(R,
        max_length)``, where padding has the label −100, and of ``position_ids``, which begin anew with each sequence,
        and ``segment_ids``, which number the sequences of a row from 1 and are 0 in padding.

    Raises:
        ValueError: If an argument is out of range; for a batch, if a sequence is too long or has parts of other
            lengths.

    Source:
        Krell et al., arXiv:2107.02027.

    Example:
        >>> batch = pack(6, varlen=True)([[11, 12], [21, 22, 23, 24], [31, 32, 33]])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()[0]
        ([[21, 22, 23, 24, 11, 12], [31, 32, 33, 0, 0, 0]], [-100, 22, 23, 24, -100, 12])
        >>> batch["position_ids"].tolist()[0], batch["segment_ids"].tolist()[1], batch["cu_seqlens"].tolist()
        ([0, 1, 2, 3, 0, 1], [1, 1, 1, 0, 0, 0], [0, 4, 6, 9, 12])
    """
    check_number("max_length", max_length, 1, whole=True)
    check_number("pad", pad, whole=True)
    return partial(_packed, int(max_length), {"input_ids": int(pad), "labels": IGNORED}, shift, varlen)


def _packed(
    max_length: int, fill: Mapping[str, int], shift: bool, varlen: bool, samples: Sequence[Any]
) -> dict[str, Any]:
    parts = [_parts_of(sample, shift) for sample in samples]
    rows = first_fit_decreasing([len(one["input_ids"]) for one in parts], max_length)
    lengths = []
    for row in rows:
        for segment, one in enumerate((parts[i] for i in row), 1):
            one["segment_ids"] = torch.full_like(one["position_ids"], segment)
        used = [len(parts[i]["input_ids"]) for i in row]
        lengths += [*used, max_length - sum(used)] if sum(used) < max_length else used
    padded: dict[str, Any] = {}
    for name in parts[0]:
        several = (torch.cat([parts[i][name] for i in row]) for row in rows)
        filled = [F.pad(one, (0, max_length - len(one)), value=fill.get(name, 0)) for one in several]
        padded[name] = torch.cat(filled).view(len(rows), max_length)
    if not varlen:
        return padded
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {**padded, "cu_seqlens": ends, "max_seqlen": max(lengths)}


def _parts_of(sample: Any, shift: bool) -> dict[str, Tensor]:
    """Return what a sample has for each of its tokens, and their positions."""
    given = sample if isinstance(sample, Mapping) else {"input_ids": sample}
    parts = {name: torch.as_tensor(part) for name, part in given.items()}
    tokens = parts["input_ids"]
    parts.setdefault("labels", tokens)
    for name, part in parts.items():
        if part.ndim != 1 or part.shape != tokens.shape:
            raise ValueError(
                f"Expected `{name}` of a sample to have one value for each token, but got the shape "
                f"{tuple(part.shape)} beside tokens {tuple(tokens.shape)}. Leave it out of the samples."
            )
    if shift:
        parts["labels"] = torch.cat([parts["labels"].new_full((1,), IGNORED), parts["labels"][1:]])
    return {**parts, "position_ids": torch.arange(len(tokens))}


def block_mask(segment_ids: Tensor, causal: bool = True) -> Tensor:
    """Return which positions of packed rows attend to which: those of the same sequence.

    Args:
        segment_ids: Which sequence each position belongs to, ``(R, L)``.
        causal: Whether a position attends only to itself and those before it.

    Returns:
        True where one attends to the other, ``(R, 1, L, L)``, as ``scaled_dot_product_attention`` takes it; padding
        attends to padding.

    Example:
        >>> block_mask(torch.tensor([[1, 1, 2]])).int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    same = segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)
    return (same.tril() if causal else same).unsqueeze(1)


def with_other_neighbours(batch: Mapping[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """Return a packed batch in which only one sequence has labels, and the same with other tokens around that one.

    A model that keeps sequences apart has the same loss on all of them.

    Args:
        batch: What [pack][lightning_speedups.core.packing.pack] has made, on any device.
        count: How many others, 1 or more: that two losses are the same can be chance.

    Returns:
        The batches; none where no sequence with labels shares its row.

    Example:
        >>> one, other = with_other_neighbours(pack(5)([[1, 2, 3], [4, 5]]), count=1)
        >>> one["labels"].tolist(), one["input_ids"].tolist(), other["input_ids"].tolist()
        ([[-100, -100, -100, -100, 5]], [[1, 2, 3, 4, 5]], [[2, 3, 4, 4, 5]])
    """
    tokens, labels, segments = (batch[name] for name in ("input_ids", "labels", "segment_ids"))
    for row, last in enumerate(segments.amax(1).tolist()):
        own = torch.zeros_like(segments, dtype=torch.bool)
        own[row] = segments[row] == last  # the last: what comes before it reaches it in causal models too
        if last > 1 and (own & (labels != IGNORED)).any():
            alone = {**batch, "labels": labels.masked_fill(~own, IGNORED)}
            others = [torch.where(own, tokens, (tokens + i) % (tokens.max() + 1)) for i in range(count + 1)]
            return [{**alone, "input_ids": other} for other in others]
    return []
