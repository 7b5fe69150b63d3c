"""BatchNorm's statistics of full images, for the time of a validation (Touvron et al., arXiv:1906.06423)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_speedups.attach.batches import BatchTrick, rest_of_pipeline
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.rehearsal import Statistics, fresh_statistics, norms_of, swap_statistics


def give_statistics(trainer: Any, trick: BatchTrick, batches: Sequence[Callable[[], Any]]) -> Statistics:
    """Give BatchNorm the statistics that some batches have at full size, and return its own.

    Args:
        trainer: A fitting Trainer, before its validation.
        trick: Who resizes.
        batches: Each gives a batch as it comes to the trick, with full images; without any the statistics stay.

    Raises:
        NoCopyError: If no step can be run without a trace.
    """
    module = trainer.lightning_module
    if not batches or not norms_of(module):
        return {}
    with same_randomness(trainer):
        seen = [rest_of_pipeline(trainer, trick, batch()) for batch in batches]
    return swap_statistics(module, fresh_statistics(trainer, module, seen))
