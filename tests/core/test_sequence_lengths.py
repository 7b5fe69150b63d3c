"""How long sequences are when, and what is left of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.sequence_lengths import LengthGrowth, first_positions, shorter_rows

growths = st.builds(
    LengthGrowth, st.integers(1, 200), st.floats(0.01, 1), st.integers(1, 64), st.booleans()
)  # start, full_from, multiple, reshape


@given(growths, st.integers(1, 1100), st.floats(0, 1))
def test_lengths_are_multiples_up_to_the_full_one_and_never_fall(growth, full, progress):
    length = growth.length(progress, full)
    assert length == full or (0 < length < full and length % growth.multiple == 0)
    assert growth.length(min(1.0, progress + 0.01), full) >= length
    assert growth.length(growth.full_from, full) == full
    if growth.reshape:
        assert full % length < growth.multiple


@given(growths, st.integers(1, 1100), st.floats(0, 1))
def test_the_length_is_the_multiple_next_to_a_line(growth, full, progress):
    start = min(growth.start, full)
    line = start + (full - start) * min(1.0, progress / growth.full_from)
    length = growth.length(progress, full)
    if growth.multiple < length < full and not growth.reshape:
        assert abs(length - line) <= growth.multiple * (0.5 if length + growth.multiple <= full else 1) + 1e-6


@pytest.mark.parametrize("reshape", [False, True])
def test_the_lengths_of_a_run_are_all_that_come_in_it(reshape):
    growth = LengthGrowth(12, 0.4, 8, reshape)
    met = [growth.length(batch / 5000, 136) for batch in range(5000)]
    assert growth.lengths(136) == sorted(set(met)) == ([8, 136] if reshape else [*range(16, 137, 8)])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_sequences_are_cut_as_lists_are(dim):
    shape = [3, 2, 2, 2]
    shape[dim] = 11
    part = torch.arange(torch.Size(shape).numel()).view(shape)
    rows = [one.movedim(dim - 1, 0).tolist() for one in part]
    cut, parted = first_positions(part, 4, dim), shorter_rows(part, 4, dim)
    assert [one.movedim(dim - 1, 0).tolist() for one in cut] == [row[:4] for row in rows]
    assert [one.movedim(dim - 1, 0).tolist() for one in parted] == [row[i : i + 4] for row in rows for i in (0, 4)]
    assert cut.is_contiguous()
    assert parted.is_contiguous()
    assert first_positions(part, 11, dim) is part
    assert shorter_rows(part, 11, dim) is part
