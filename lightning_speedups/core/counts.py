"""Counts in messages."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """Say how many there are of something.

    Args:
        count: How many.
        noun: Of what: one of them.

    Example:
        >>> counted(1, "epoch"), counted(0, "epoch"), counted(2000, "batch")
        ('1 epoch', '0 epochs', '2,000 batches')
    """
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('tch') else 's'}"
