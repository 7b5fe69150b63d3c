"""Which samples of an epoch to keep, given the loss that each had when it was last seen, and what each then counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Subset(NamedTuple):
    """A part of the samples.

    Attributes:
        places: Where the kept ones stand, int64, ascending.
        weights: What each of all the samples counts where it is kept, float32, ``(N,)``.
    """

    places: Tensor
    weights: Tensor


def draw_uniform(losses: Tensor, kept: int, generator: torch.Generator) -> Subset:
    """Keep samples at random, each with the same probability.

    Args:
        losses: The samples' last losses, ``(N,)``; only their number counts.
        kept: How many to keep, in [0, N].
        generator: Source of randomness, on the CPU.

    Example:
        >>> draw_uniform(torch.zeros(4), 2, torch.Generator().manual_seed(0))
        Subset(places=tensor([0, 1]), weights=tensor([1., 1., 1., 1.]))
    """
    places = torch.randperm(len(losses), generator=generator)[:kept].sort().values
    return Subset(places, torch.ones(len(losses)))


def draw_unbiased(losses: Tensor, kept: int, generator: torch.Generator, max_drop: float = 0.5) -> Subset:
    """Drop samples whose loss is below the mean, and weigh those of them that stay for the dropped ones.

    Of L such samples D = N − kept are dropped, each with probability D/L, and the others count 1/(1 − D/L): the
    expected weighted sum over the kept samples, of losses or gradients, is the plain sum over all. Where D is more than
    ``max_drop·L``, more samples count as low ones, those with the lowest losses first.

    Args:
        losses: The samples' last losses, ``(N,)``; what is not finite is unknown and counts as high.
        kept: How many to keep, in [1, N].
        generator: Source of randomness, on the CPU.
        max_drop: Largest share of the low ones to drop, in (0, 1).

    Example:
        >>> losses = torch.tensor([0.1, 9.0, 0.1, 0.1, 8.0, 0.1])
        >>> places, weights = draw_unbiased(losses, 4, torch.Generator().manual_seed(0))
        >>> (losses[places] < 1).sum(), weights  # two of the four low ones stand for all four
        (tensor(2), tensor([2., 1., 2., 2., 1., 2.]))
    """
    losses = torch.where(losses.isfinite(), losses.double(), math.inf)
    dropped = len(losses) - kept
    if dropped == 0:
        return Subset(torch.arange(kept), torch.ones(kept))
    low = losses < losses[losses.isfinite()].mean()
    enough = min(math.ceil(dropped / max_drop), len(losses))
    if int(low.sum()) < enough:  # by the value, so that equal losses are treated alike
        low = losses <= losses.kthvalue(enough).values
    candidates = low.nonzero().squeeze(1)
    gone = candidates[torch.randperm(len(candidates), generator=generator)[:dropped]]
    stays = torch.ones(len(losses), dtype=torch.bool)
    stays[gone] = False
    weights = torch.where(low, len(candidates) / (len(candidates) - dropped), 1.0).float()
    return Subset(stays.nonzero().squeeze(1), weights)


def draw_hard(losses: Tensor, kept: int, generator: torch.Generator, beta: float = 1.0) -> Subset:
    """Keep the samples with high losses more often: with chances in proportion to the percentile of the loss, to a
    power.

    Each sample counts 1, so that an epoch's gradient is biased towards hard samples, on purpose.

    Args:
        losses: The samples' last losses, ``(N,)``; what is not finite is unknown and counts as the highest.
        kept: How many to keep, in [0, N].
        generator: Source of randomness, on the CPU.
        beta: The power, 0 or more; 0 for equal chances.

    Example:
        >>> losses = torch.linspace(0, 1, 1000)
        >>> places, _ = draw_hard(losses, 500, torch.Generator().manual_seed(0), beta=2.0)
        >>> bool(losses[places].mean() > 0.6)
        True
    """
    losses = torch.where(losses.isfinite(), losses.double(), math.inf)
    percentile = torch.searchsorted(losses.sort().values, losses, right=True) / len(losses)
    # The smallest of independent exponential times, at rates p, come from drawing one after the other in proportion
    # to p (Efraimidis and Spirakis, 2006).
    times = torch.empty(len(losses), dtype=torch.float64).exponential_(generator=generator) / percentile**beta
    return Subset(times.argsort(stable=True)[:kept].sort().values, torch.ones(len(losses)))
