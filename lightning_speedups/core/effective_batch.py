"""How many batches make one optimizer step, over the run, and what turns the sum of their gradients into a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def batches_in_step(samples: int, batch_size: int, processes: int = 1) -> int:
    """Return how many batches each process contributes to an optimizer step of so many samples.

    Args:
        samples: Of a step, in all processes together, 1 or more.
        batch_size: Of one process, in samples, 1 or more.
        processes: How many there are.

    Raises:
        ValueError: If whole batches do not make as many; the message names the nearest numbers that they make.

    Example:
        >>> batches_in_step(1024, 32, processes=4)
        8
        >>> batches_in_step(1000, 32, processes=4)
        Traceback (most recent call last):
        ValueError: Expected a multiple of 128 samples (a batch of 32 × 4 processes): 896 or 1024, but got 1000.
    """
    at_once = batch_size * processes
    batches, rest = divmod(samples, at_once)
    if rest == 0:
        return batches
    nearest = " or ".join(str(count * at_once) for count in (batches, batches + 1) if count)
    of_all = f" × {processes} processes" if processes > 1 else ""
    raise ValueError(
        f"Expected a multiple of {at_once} samples (a batch of {batch_size}{of_all}): {nearest}, but got {samples}."
    )


def checked_by_epoch(name: str, given: Any) -> dict[int, int]:
    """Return whole numbers above 0 by the epochs in which they begin to hold.

    Args:
        name: The argument's name.
        given: One number for the whole run, or a mapping of epochs, counted from 0, to numbers; Python's own.

    Raises:
        ValueError: If it is neither, or if nothing is said of epoch 0.

    Example:
        >>> checked_by_epoch("samples", 256), checked_by_epoch("samples", {0: 256, 10: 1024})
        ({0: 256}, {0: 256, 10: 1024})
    """
    by_epoch = dict(given) if isinstance(given, Mapping) else {0: given}
    whole = all(type(one) is int for pair in by_epoch.items() for one in pair)
    if not whole or min(by_epoch, default=None) != 0 or min(by_epoch.values()) < 1:
        raise ValueError(
            f"Expected `{name}` to be a whole number of 1 or more, or a dict of such numbers by the epoch from which "
            f"they hold, with one for epoch 0, as {{0: 256, 10: 1024}}, but got {given!r}."
        )
    return by_epoch


def value_in_epoch(by_epoch: Mapping[int, int], epoch: int) -> int:
    """Return what holds in an epoch.

    Args:
        by_epoch: Values by the epochs in which they begin to hold, one of them 0.
        epoch: From 0.

    Example:
        >>> [value_in_epoch({0: 256, 10: 1024}, epoch) for epoch in (0, 9, 10, 99)]
        [256, 256, 1024, 1024]
    """
    return by_epoch[max(begin for begin in by_epoch if begin <= epoch)]


def factor_to_mean(total: float | Tensor, unit: float, times: int) -> float | Tensor:
    """Return what turns a weighed sum of means, ``Σ countᵢ / unit · meanᵢ / times``, into the mean of all that was
    counted, ``Σ countᵢ · meanᵢ / Σ countᵢ``; 1 where that is nothing.

    Args:
        total: ``Σ countᵢ``, 0 or more; a tensor is not waited for.
        unit: The count at which a mean weighs 1, above 0.
        times: What the sum was divided by.

    Example:
        >>> factor_to_mean(8, unit=4, times=2), factor_to_mean(5, unit=4, times=2)
        (1.0, 1.6)
        >>> factor_to_mean(torch.tensor(5.0), unit=4, times=2)
        tensor(1.6000)
    """
    if isinstance(total, Tensor):
        return torch.where(total > 0, unit * times / total, 1.0)
    return unit * times / total if total > 0 else 1.0
