"""Each epoch's batches are of like length and within the budget, on all ranks alike, and everything else knows of it."""

from lightning_speedups import LengthBatches


def EXAMPLE():
    return {"callbacks": [LengthBatches(lengths=[1 + 7 * number % 32 for number in range(32)], buckets=4, seed=3)]}
