"""Batches of samples of like length, the same plan for all processes and as many batches in every epoch.

Batches whose samples are drawn from one bucket of lengths (Khomenko et al., arXiv:1708.05604), under a budget of tokens
with the padding counted (``max_tokens`` of fairseq: Ott et al., arXiv:1904.01038).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LEAST = 2
"""Batches in a bucket, at least: with fewer the same samples would meet in every epoch."""


def length_of(sample: Any) -> int:
    """Return the length of a sample: of ``"input_ids"`` in a mapping, else of the first tensor or list of numbers.

    Args:
        sample: Of a dataset: a tensor, an array or a list of numbers, or a tuple, list or mapping with one in it.

    Raises:
        LookupError: If there is none; text has as many tokens as its tokenizer makes of it, which nobody knows here.

    Example:
        >>> length_of(([5, 3, 8], "label")), length_of({"label": 1, "input_ids": torch.ones(7)}), length_of([4, 4])
        (3, 7, 2)
    """
    if getattr(sample, "ndim", 0):
        return len(sample)
    if isinstance(sample, list) and (not sample or isinstance(sample[0], Real)):
        return len(sample)
    parts: Iterable[Any] = sample if isinstance(sample, (list, tuple)) else ()
    if isinstance(sample, Mapping):
        parts = [sample["input_ids"]] if "input_ids" in sample else sample.values()
    for part in parts:
        with suppress(LookupError):
            return length_of(part)
    raise LookupError(f"a {type(sample).__name__} has neither `input_ids` nor a tensor or a list of numbers")


def as_lengths(values: Any, samples: int) -> Tensor:
    """Return lengths as numbers that can be counted with, float64, ``(N,)``.

    Args:
        values: A sequence, an array or a tensor of numbers, of 0 or more.
        samples: How many there are to be.

    Raises:
        ValueError: If there are not as many, or if one is no such number.

    Example:
        >>> as_lengths([3, 2.5], 2)
        tensor([3.0000, 2.5000], dtype=torch.float64)
    """
    lengths = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if lengths.shape != (samples,):
        raise ValueError(f"Expected `lengths` to have {samples} numbers, one a sample, but got {lengths.numel()}.")
    if len(wrong := (~(lengths.isfinite() & (lengths >= 0))).nonzero()):
        first = int(wrong[0])
        raise ValueError(f"Expected `lengths` to be of 0 or more, but got {lengths[first]:g} for sample {first}.")
    return lengths


@dataclass(frozen=True)
class Buckets:
    """Samples in buckets of like length, each of which is cut into batches of the same sizes in every epoch.

    Attributes:
        lengths: Of all samples, ``(N,)``.
        members: The samples of each bucket, those of the longest first.
        sizes: The sizes of each bucket's batches, a multiple of ``ranks`` in number.
        ranks: Processes that share the batches.
    """

    lengths: Tensor
    members: tuple[Tensor, ...]
    sizes: tuple[tuple[int, ...], ...]
    ranks: int = 1

    @property
    def steps(self) -> int:
        """The batches of each process in an epoch."""
        return sum(map(len, self.sizes)) // self.ranks

    @property
    def mean_size(self) -> int:
        """The samples of a batch, on average."""
        return max(1, round(sum(map(sum, self.sizes)) / (self.steps * self.ranks)))

    def plan(self, generator: torch.Generator) -> list[list[Tensor]]:
        """Return the batches of an epoch: for each step those of all processes, which are neighbours in length.

        Args:
            generator: Source of randomness, on the CPU.

        Example:
            >>> buckets = into_buckets(torch.tensor([9.0, 8, 2, 1, 2, 9, 1, 8]), batch_size=2, most=2, least=1)
            >>> plan = buckets.plan(torch.Generator().manual_seed(0))
            >>> [[buckets.lengths[batch].tolist() for batch in step] for step in plan]
            [[[1.0, 2.0]], [[2.0, 1.0]], [[8.0, 8.0]], [[9.0, 9.0]]]
        """
        steps = []
        for members, sizes in zip(self.members, self.sizes, strict=True):
            drawn = members[torch.randperm(len(members), generator=generator)][: sum(sizes)]
            batches = sorted(drawn.split_with_sizes(sizes), key=lambda batch: float(self.lengths[batch].max()))
            steps += [batches[begin : begin + self.ranks] for begin in range(0, len(batches), self.ranks)]
        return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]


def into_buckets(
    lengths: Tensor,
    batch_size: int | None = None,
    max_tokens: float | None = None,
    most: int = 50,
    ranks: int = 1,
    drop_last: bool = False,
    least: int = LEAST,
) -> Buckets:
    """Put samples into buckets by their lengths, and settle the sizes of the batches that each is cut into.

    All but the bucket of the shortest have as many samples as whole batches take; that one is cut into batches of about
    one size. So no sample is left over, and every process has as many batches.

    Args:
        lengths: Of all samples, ``(N,)``, in any unit.
        batch_size: Most samples of a batch.
        max_tokens: Most that a batch may hold, padding included: its samples times the longest of them.
        most: About how many buckets, at most.
        ranks: Processes that share the batches.
        drop_last: Whether to have whole batches alone; what is left over is left out, of the shortest samples.
        least: Batches in a bucket, at least.

    Raises:
        ValueError: If a sample is longer than a batch may be, or if there are too few for a batch in each process.

    Example:
        >>> buckets = into_buckets(torch.tensor([9.0, 8, 2, 1, 2, 9, 1, 8]), max_tokens=18, most=2, least=1)
        >>> buckets.members, buckets.sizes
        ((tensor([0, 5, 1, 7]), tensor([2, 4, 3, 6])), ((2, 2), (4,)))
    """
    samples = len(lengths)
    order = lengths.argsort(descending=True, stable=True)
    ranked = lengths[order].tolist()
    if max_tokens is not None and samples and ranked[0] > max_tokens:
        raise ValueError(f"Expected no sample above {max_tokens:g}, but got {ranked[0]:g} for sample {int(order[0])}.")

    def size_at(place: int) -> int:
        fits = max_tokens // ranked[place] if max_tokens is not None and ranked[place] > 0 else math.inf
        return int(min(fits, batch_size or samples))

    about = max(samples / (batch_size or samples or 1), sum(ranked) / (max_tokens or math.inf))
    wanted = max(least, math.ceil(about / most))
    count = math.ceil(wanted / ranks) * ranks
    members, sizes, begin = [], [], 0
    while begin < samples:
        size = size_at(begin)
        is_last = samples - begin < 2 * count * size
        taken = samples - begin if is_last else count * size
        members.append(order[begin : begin + taken])
        sizes.append(_evenly(taken, size, ranks, drop_last))
        begin += taken
    if not members or not all(sizes):
        raise ValueError(
            f"Expected enough samples for a batch in each of {ranks} processes, but got {samples} in batches of "
            f"{size_at(samples - 1) if samples else 0}."
        )
    return Buckets(lengths, tuple(members), tuple(sizes), ranks)


def _evenly(samples: int, size: int, ranks: int, drop_last: bool) -> tuple[int, ...]:
    """Return the sizes of batches, as many for each process; none where there are too few samples."""
    if drop_last:
        return (size,) * (samples // size // ranks * ranks)
    batches = math.ceil(samples / (size * ranks)) * ranks
    if batches > samples:
        return ()
    share, more = divmod(samples, batches)
    return (share + 1,) * more + (share,) * (batches - more)


def padding_share(lengths: Tensor, batches: Iterable[Sequence[int] | Tensor]) -> float:
    """Return which part of batches is padding, if each is padded to its longest sample, in [0, 1).

    Args:
        lengths: Of all samples, ``(N,)``.
        batches: The samples of each.

    Example:
        >>> padding_share(torch.tensor([4.0, 1.0, 3.0, 1.0]), [[0, 2], [1, 3]])
        0.1
    """
    kept = padded = 0.0
    for batch in batches:
        own = lengths[torch.as_tensor(batch)]
        kept, padded = kept + float(own.sum()), padded + len(own) * float(own.max())
    return (padded - kept) / padded if padded else 0.0
