"""A number in its range passes; anything else is refused by name, rule and value."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_speedups.core.arguments import check_choice, check_number


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0, {"low": 0}),
        (0.5, {"low": 0, "high": 1}),
        (1, {"low": 0, "high": 1}),
        (np.float32(0.5), {"low": 0, "above": True}),
        (np.int64(3), {"low": 1, "whole": True}),
        (Fraction(1, 2), {"low": 0}),
        (None, {"low": 0, "optional": True}),
        (-3, {}),
    ],
)
def test_what_is_in_range_passes(value, rule):
    check_number("x", value, **rule)


@pytest.mark.parametrize(
    ("value", "rule", "told"),
    [
        (-1, {"low": 0}, "Expected `x` to be a number of 0 or more, but got -1."),
        (0, {"low": 0, "above": True}, "Expected `x` to be a number above 0, but got 0."),
        (1.0, {"low": 0, "high": 1, "below": True}, "Expected `x` to be a number in [0, 1), but got 1.0."),
        (0, {"low": 0, "high": 1, "above": True}, "Expected `x` to be a number in (0, 1], but got 0."),
        (2.5, {"low": 1, "whole": True}, "Expected `x` to be a whole number of 1 or more, but got 2.5."),
        (math.nan, {"low": 0, "optional": True}, "Expected `x` to be a number of 0 or more, or None, but got nan."),
        (math.inf, {"low": 0}, "but got inf."),
        ("3", {"low": 0}, "but got '3'."),
        (True, {"low": 0}, "but got True."),
        (None, {"low": 0}, "but got None."),
        (1j, {"low": 0}, "but got 1j."),
    ],
)
def test_what_is_not_is_refused(value, rule, told):
    with pytest.raises(ValueError) as caught:
        check_number("x", value, **rule)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "rule"), [(["a"], "'a'"), (["a", "b"], "'a' or 'b'"), (["a", "b", "c"], "'a', 'b' or 'c'")]
)
def test_a_word_that_is_no_choice_is_told_the_choices(choices, rule):
    check_choice("way", choices[-1], choices)
    check_choice("way", None, choices, optional=True)
    with pytest.raises(ValueError) as error:
        check_choice("way", "z", choices)
    assert str(error.value) == f"Expected `way` to be {rule}, but got 'z'."
    with pytest.raises(ValueError, match=f"{rule}, or None, but"):
        check_choice("way", "z", choices, optional=True)
