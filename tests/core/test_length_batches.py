"""Every plan has each sample once, keeps the budget, and gives all processes as many batches of nearly one length."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_speedups.core.length_batches import LEAST, as_lengths, into_buckets, length_of, padding_share


def plan_of(buckets, seed=0):
    return buckets.plan(torch.Generator().manual_seed(seed))


def lists(plan):
    return [[batch.tolist() for batch in step] for step in plan]


def text_like(count, seed=0):
    draws = random.Random(seed)
    return [min(512, max(1, round(draws.lognormvariate(4, 1)))) for _ in range(count)]


def plainly_cut(lengths, size_of, count, ranks):
    """The sizes of the batches by a slow walk down the sorted samples, batch by batch, without dropping any."""
    left = sorted(lengths, reverse=True)
    buckets = []
    while left:
        size, own = size_of(left[0]), []
        if len(left) >= 2 * count * size:
            own = [size] * count
        else:
            batches = math.ceil(len(left) / size)
            while batches % ranks:
                batches += 1
            own = [len(left) // batches + (place < len(left) % batches) for place in range(batches)]
        buckets.append(own)
        left = left[sum(own) :]
    return buckets


any_lengths = st.lists(st.integers(0, 60), min_size=1, max_size=150)
options = st.fixed_dictionaries(
    {
        "batch_size": st.none() | st.integers(1, 12),
        "max_tokens": st.none() | st.integers(60, 400),
        "most": st.integers(1, 12),
        "ranks": st.integers(1, 3),
        "drop_last": st.booleans(),
        "least": st.integers(1, 5),
    }
)


@given(any_lengths, options, st.integers(0, 99))
def test_all_batches_hold_the_budget_and_each_sample_comes_once(lengths, options, seed):
    numbers = torch.tensor(lengths, dtype=torch.float64)
    try:
        buckets = into_buckets(numbers, **options)
    except ValueError:
        # No batch for each process, however they are cut.
        assert options["ranks"] > 1 or options["drop_last"]
        assume(False)
    plan, ranks = lists(plan_of(buckets, seed)), options["ranks"]
    assert len(plan) == buckets.steps >= 1
    assert all(len(step) == ranks for step in plan)
    batches = [batch for step in plan for batch in step]
    seen = sorted(sample for batch in batches for sample in batch)
    size, budget = options["batch_size"] or len(lengths), options["max_tokens"] or math.inf
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len(batch) * max(lengths[sample] for sample in batch) <= budget
    if options["drop_last"]:
        assert len(seen) == len(set(seen))
        out = set(range(len(lengths))) - set(seen)
        last = {len(batch) for batch in batches if min(lengths[s] for s in batch) <= min(lengths[s] for s in seen)}
        assert len(out) < ranks * max(last | {1}) * 2
    else:
        assert seen == [*range(len(lengths))]
    again = lists(plan_of(buckets, seed + 1))
    assert sorted(map(len, batches)) == sorted(len(batch) for step in again for batch in step)
    assert len(again) == len(plan)


@given(any_lengths, options)
def test_the_sizes_are_those_of_a_slow_walk_from_the_longest_to_the_shortest(lengths, options):
    options = options | {"drop_last": False}
    size, budget, ranks = options["batch_size"], options["max_tokens"], options["ranks"]

    def size_of(longest):
        fits = budget // longest if budget and longest else len(lengths)
        return min(fits, size or len(lengths))

    about = max(len(lengths) / (size or len(lengths)), sum(lengths) / (budget or math.inf))
    count = max(options["least"], math.ceil(about / options["most"]))
    while count % ranks:
        count += 1
    expected = plainly_cut(lengths, size_of, count, ranks)
    if any(0 in own for own in expected):
        with pytest.raises(ValueError, match=f"a batch in each of {ranks} processes"):
            into_buckets(torch.tensor(lengths, dtype=torch.float64), **options)
        return
    buckets = into_buckets(torch.tensor(lengths, dtype=torch.float64), **options)
    assert [sorted(own) for own in map(list, buckets.sizes)] == [sorted(own) for own in expected]
    assert buckets.mean_size == max(1, round(len(lengths) / sum(map(len, expected))))


def test_processes_get_neighbours_in_length_at_the_same_time():
    lengths = torch.tensor(text_like(4000), dtype=torch.float64)
    for ranks in (2, 4):
        buckets = into_buckets(lengths, max_tokens=4096, ranks=ranks, most=6)
        assert len(buckets.sizes[0]) >= 4 * ranks
        longest = [[float(lengths[batch].max()) for batch in step] for step in plan_of(buckets)]
        waits = [1 - min(step) / max(step) for step in longest]
        assert sum(waits) / len(waits) < 0.05
        for members in buckets.members:  # in a bucket no other batch stands between two of one step
            own = {float(lengths[sample]) for sample in members.tolist()}
            inside = sorted(step for step in map(sorted, longest) if set(step) <= own)
            assert all(one[-1] <= other[0] for one, other in itertools.pairwise(inside))


def test_most_padding_goes_and_steps_get_fewer():
    lengths = torch.tensor(text_like(4000), dtype=torch.float64)
    mixed = torch.randperm(4000, generator=torch.Generator().manual_seed(1)).split(32)
    before = padding_share(lengths, mixed)
    assert before > 0.6
    by_size = into_buckets(lengths, batch_size=32)
    assert by_size.steps == len(mixed)
    assert padding_share(lengths, [b for step in plan_of(by_size) for b in step]) < 0.1
    budget = sum(len(batch) * float(lengths[batch].max()) for batch in mixed) / len(mixed)
    by_tokens = into_buckets(lengths, max_tokens=budget)
    assert by_tokens.steps < 0.45 * len(mixed)
    assert padding_share(lengths, [b for step in plan_of(by_tokens) for b in step]) < 0.15


def test_epochs_differ_in_who_meets_and_in_the_order_of_lengths_and_a_seed_gives_the_same_again():
    lengths = torch.tensor(text_like(1000), dtype=torch.float64)
    buckets = into_buckets(lengths, batch_size=10)
    first, again, other = lists(plan_of(buckets)), lists(plan_of(buckets)), lists(plan_of(buckets, 1))
    assert first == again

    def meetings(plan):
        return {frozenset((one, two)) for step in plan for b in step for one in b for two in b if one != two}

    shared = len(meetings(first) & meetings(other)) / len(meetings(first))
    assert shared < 1.2 / LEAST
    longest = torch.tensor([float(lengths[step[0]].max()) for step in first])
    ranks = longest.argsort().argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([ranks, torch.arange(len(ranks)).double()]))[0, 1])) < 0.5


def test_with_drop_last_all_batches_are_whole_and_others_are_left_out_in_each_epoch():
    lengths = torch.tensor(text_like(1003), dtype=torch.float64)
    buckets = into_buckets(lengths, batch_size=8, ranks=2, drop_last=True)
    assert buckets.steps == 1003 // 16
    out = []
    for seed in range(4):
        batches = [batch for step in lists(plan_of(buckets, seed)) for batch in step]
        assert {*map(len, batches)} == {8}
        out.append(frozenset(range(1003)) - {sample for batch in batches for sample in batch})
    assert {*map(len, out)} == {1003 % 16}
    assert len({*out}) == 4


def test_a_sample_above_the_budget_and_too_few_samples_are_refused():
    with pytest.raises(ValueError, match=r"Expected no sample above 8, but got 9 for sample 2\."):
        into_buckets(torch.tensor([3.0, 8.0, 9.0]), max_tokens=8)
    into_buckets(torch.tensor([3.0, 8.0, 8.0]), max_tokens=8)
    with pytest.raises(ValueError, match="a batch in each of 4 processes, but got 3 in batches of 2"):
        into_buckets(torch.ones(3), batch_size=2, ranks=4)
    with pytest.raises(ValueError, match="a batch in each of 1 processes, but got 3 in batches of 4"):
        into_buckets(torch.ones(3), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="but got 0"):
        into_buckets(torch.ones(0), batch_size=4)


def test_lengths_are_found_where_the_rule_says():
    ids = torch.ones(7, 2)
    for sample, length in [
        (ids, 7),
        ((ids, 3), 7),
        ((3, ids), 7),
        ([ids, torch.ones(2)], 7),
        ([1, 2, 3], 3),
        (([1.5, 2.5], "label"), 2),
        (([], 1), 0),
        ({"label": torch.ones(4), "input_ids": [1, 2]}, 2),
        ({"label": 1, "tokens": np.ones(5)}, 5),
        ((("text", torch.tensor(1)), {"input_ids": torch.ones(6)}), 6),
    ]:
        assert length_of(sample) == length
    for sample in ("text", ("text", 1), (1, 2), torch.tensor(3), {"text": "some", "label": 1}, None):
        with pytest.raises(LookupError, match=f"a {type(sample).__name__} has neither `input_ids`"):
            length_of(sample)


def test_lengths_are_checked():
    for values in ([1, 2, 3], (1.0, 2.0, 3.0), np.arange(1, 4), torch.tensor([1, 2, 3])):
        assert as_lengths(values, 3).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"Expected `lengths` to have 4 numbers, one a sample, but got 3\."):
        as_lengths([1, 2, 3], 4)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"of 0 or more, but got .* for sample 1\."):
            as_lengths([1.0, wrong], 2)


def test_padding_is_what_a_loop_counts():
    lengths = text_like(50)
    batches = [[*range(begin, begin + 10)] for begin in range(0, 50, 10)]
    padded = [
        [*([1] * lengths[s]), *([0] * (max(lengths[i] for i in batch) - lengths[s]))]
        for batch in batches
        for s in batch
    ]
    cells = [cell for row in padded for cell in row]
    assert padding_share(torch.tensor(lengths).double(), batches) == pytest.approx(cells.count(0) / len(cells))
    assert padding_share(torch.zeros(4), [[0, 1], [2, 3]]) == 0.0
