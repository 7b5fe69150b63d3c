import pytest

from lightning_speedups.core.counts import counted


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "epoch", "1 epoch"),
        (2, "epoch", "2 epochs"),
        (0, "batch", "0 batches"),
        (1, "optimizer step", "1 optimizer step"),
        (1500, "optimizer step", "1,500 optimizer steps"),
    ],
)
def test_one_is_one_and_others_are_many(count, noun, text):
    assert counted(count, noun) == text
