"""What a user writes becomes an amount of a unit, and that becomes steps."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.durations import Duration, RunFacts


@pytest.mark.parametrize(
    ("value", "amount", "unit"),
    [
        (0, 0, "steps"),
        (500, 500, "steps"),
        (np.int64(7), 7, "steps"),
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("1step", 1, "steps"),
        (" 3  steps ", 3, "steps"),
        (0.0, 0.0, "fraction"),
        (0.25, 0.25, "fraction"),
        (1.0, 1.0, "fraction"),
        (np.float64(0.5), 0.5, "fraction"),
        ("10%", 0.1, "fraction"),
        ("100 %", 1.0, "fraction"),
        (".5%", 0.005, "fraction"),
        ("5 epochs", 5.0, "epochs"),
        ("1 epoch", 1.0, "epochs"),
        ("2.5epochs", 2.5, "epochs"),
        (Duration(3, "epochs"), 3, "epochs"),
    ],
)
def test_what_a_user_writes_is_read(value, amount, unit):
    assert Duration.parse("warmup", value) == Duration(amount, unit)
    assert isinstance(Duration.parse("warmup", value).amount, int) == (unit == "steps" or isinstance(amount, int))


@pytest.mark.parametrize(
    "value",
    [-1, -0.1, 1.1, True, None, "", "5", "5 seconds", "-5 steps", "0.5 steps", "500. steps", "1.2.3 epochs", "101%", "five epochs", "5 Steps", "1e3 steps", ". epochs",
     "5 steps 3", float("nan"), float("inf"), [5], 5j, "nan%"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_arguments_name_and_the_rule(value):
    told = f"Expected `cooldown` to be a whole number of optimizer steps, a float in [0, 1] as a fraction of the run, or a text like '500 steps', '5 epochs' or '10%', but got {value!r}."
    with pytest.raises(ValueError, match=re.escape(told)):
        Duration.parse("cooldown", value)


def run(steps=200, an_epoch=20):
    return RunFacts(steps=steps, steps_in_epochs=lambda epochs: None if an_epoch is None else round(an_epoch * epochs))


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_steps_are_themselves_whatever_the_run(steps, total):
    assert Duration.parse("x", steps).in_steps(run(total)) == steps
    assert Duration.parse("x", f"{steps} steps").in_steps(run(None, None)) == steps


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_a_fraction_is_of_the_run_or_of_a_given_total(fraction, total):
    assert Duration(fraction, "fraction").in_steps(run(total)) == fraction * total
    assert Duration(fraction, "fraction").in_steps(run(7), total) == fraction * total
    assert Duration(fraction, "fraction").in_steps(run(None), total) == fraction * total


def test_a_fraction_of_a_given_total_of_0_is_0_and_not_of_the_run():
    assert Duration(0.5, "fraction").in_steps(run(200), 0) == 0


def test_epochs_are_the_runs_own():
    assert Duration(2.5, "epochs").in_steps(run(200, 20)) == 50
    assert Duration(2.5, "epochs").in_steps(run(200, 20), 1000) == 50


def test_what_the_run_does_not_say_is_none():
    assert Duration(0.5, "fraction").in_steps(run(None)) is None
    assert Duration(1.0, "epochs").in_steps(run(200, None)) is None


@pytest.mark.parametrize("unit", ["steps", "epochs", "fraction"])
def test_nothing_is_nothing_also_in_a_run_of_unknown_length(unit):
    assert Duration(0, unit).in_steps(run(None, None)) == 0
