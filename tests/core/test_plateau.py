"""A metric that stands still, against a walk through its values, and what it may not be told."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.plateau import Plateau

VALUES = st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=12)


@given(VALUES, st.integers(1, 4), st.sampled_from([0.0, 0.5]), st.sampled_from(["min", "max"]))
def test_each_value_says_what_a_walk_through_all_before_it_says(values, patience, min_delta, mode):
    plateau, best, waited = Plateau("loss", mode, patience, min_delta), math.inf, 0
    record, since = math.inf, 0
    for value in values:
        best, waited, is_due = plateau.seen(value, best, waited)
        lower = value if mode == "min" else -value
        since = 0 if record - lower > min_delta or (record == math.inf and lower == lower) else since + 1
        record = lower if since == 0 else record
        assert (best, waited, is_due) == (record, since, since >= patience)


def test_settings_compare_by_what_they_say_and_do_not_change():
    assert Plateau("loss") == Plateau("loss", "min", 1, 0.0) != Plateau("loss", patience=2)
    with pytest.raises(AttributeError):
        Plateau("loss").patience = 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"monitor": ""}, "Expected `monitor` to be the name of a metric, but got ''"),
        ({"monitor": None}, "`monitor`"),
        ({"mode": "least"}, "Expected `mode` to be 'min' or 'max', but got 'least'"),
        ({"patience": 0}, "Expected `patience` to be a whole number of 1 or more, but got 0"),
        ({"patience": 1.5}, "`patience`"),
        ({"min_delta": -1.0}, "Expected `min_delta` to be a number of 0 or more, but got -1.0"),
        ({"min_delta": math.nan}, "`min_delta`"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Plateau(**{"monitor": "loss", **arguments})
