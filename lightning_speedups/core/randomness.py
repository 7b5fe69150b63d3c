"""Random streams that depend on nothing but their coordinates, so that a resumed run redraws the same numbers."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *coordinates: int) -> torch.Generator:
    """Make a CPU generator whose stream is fixed by a seed and a place in the run.

    Args:
        seed: The run's seed, any integer.
        *coordinates: What tells this stream from its neighbours, such as rank and batch number.

    Returns:
        A fresh generator. Neighbouring coordinates give unrelated streams.

    Example:
        >>> a = torch.rand(3, generator=generator_for(1, 0, 7))
        >>> b = torch.rand(3, generator=generator_for(1, 0, 7))
        >>> c = torch.rand(3, generator=generator_for(1, 0, 8))
        >>> bool((a == b).all()), bool((a == c).any())
        (True, False)
    """
    # Hashed, because Mersenne Twister streams of neighbouring seeds start out alike.
    digest = hashlib.blake2b(repr((seed, *coordinates)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
