"""Lengths are measured once for a dataset, by the loader's workers, and anew if its settings change."""

import gc

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_speedups.attach.lengths import MEASURED, Lengths, measured_lengths, told_lengths

ASKED = []


class Texts(Dataset):
    """Notes which samples it is asked for, in this process."""

    def __init__(self, count=300):
        self.count, self.cut = count, 1000

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ASKED.append(index)
        return "x" * min(self.cut, index % 50)


EXPECTED = [float(number % 50) for number in range(300)]


def double(text):
    return 2 * len(text)


def test_a_dataset_is_measured_once_and_anew_when_a_setting_or_the_function_changes():
    texts = Texts()
    ASKED.clear()
    assert measured_lengths(DataLoader(texts), len).tolist() == EXPECTED
    assert sorted(ASKED) == [0, *range(300)]  # the first one twice, for its errors
    assert measured_lengths(DataLoader(texts, batch_size=7, shuffle=True), len).tolist() == EXPECTED
    assert len(ASKED) == 301
    texts.cut = 10
    assert measured_lengths(DataLoader(texts), len).tolist() == [min(10.0, one) for one in EXPECTED]
    assert measured_lengths(DataLoader(texts), double).tolist() == [min(20.0, 2 * one) for one in EXPECTED]
    texts.count = 20
    assert measured_lengths(DataLoader(texts), double).tolist() == [min(20.0, 2 * one) for one in EXPECTED[:20]]


def test_what_is_known_goes_with_the_dataset_and_a_list_is_measured_each_time():
    texts, before = Texts(4), len(MEASURED)
    measured_lengths(DataLoader(texts), len)
    assert len(MEASURED) == before + 1
    del texts
    gc.collect()
    assert len(MEASURED) == before
    plain = ["a", "bcd"]
    assert measured_lengths(DataLoader(plain), len).tolist() == [1.0, 3.0]
    plain[0] = "ab"
    assert measured_lengths(DataLoader(plain), len).tolist() == [2.0, 3.0]


def test_the_loaders_workers_do_it_and_draw_nothing_from_torchs_generator():
    texts, state = Texts(), torch.get_rng_state()
    ASKED.clear()
    assert measured_lengths(DataLoader(texts, num_workers=1), len).tolist() == EXPECTED
    assert ASKED == [0]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_the_first_sample_comes_as_it_is():
    with pytest.raises(TypeError, match="unsupported operand"):
        measured_lengths(DataLoader(Texts(), num_workers=1), lambda text: text - 1)
    assert Lengths(["a"], len)[0] == 1.0


def test_a_subset_knows_the_lengths_of_its_samples():
    class Told(Texts):
        lengths = EXPECTED

    inner = Subset(Told(), [4, 2, 9])
    assert told_lengths(inner).tolist() == [4.0, 2.0, 9.0]
    assert told_lengths(Subset(inner, torch.tensor([2, 0]))).tolist() == [9.0, 4.0]
    assert told_lengths(Texts()) is told_lengths(Subset(Texts(), [1])) is None
    Told.lengths = lambda self: EXPECTED
    assert told_lengths(Told()) is None
