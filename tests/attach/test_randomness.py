"""Random states are read without drawing, and put back."""

import random

import numpy as np
import pytest
import torch

from lightning_speedups.attach.randomness import load_twice, plain_states, put_states, random_states, same_randomness
from zoo import trainer


@pytest.mark.parametrize(
    ("draw", "same"),
    [
        (lambda: None, True),
        (lambda: torch.rand(3, generator=torch.Generator()), True),
        (lambda: torch.rand(1), False),
        (random.random, False),
        (lambda: np.random.rand(), False),  # noqa: NPY002
    ],
)
def test_random_states_are_equal_as_long_as_nobody_draws(draw, same):
    one = trainer()
    before = random_states(one)
    draw()
    assert (random_states(one) == before) == same


def test_the_states_are_put_back_also_after_an_exception():
    one = trainer()
    before = random_states(one)

    def draw():
        with same_randomness(one):
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw()
    assert random_states(one) == before


OWN = torch.Generator()


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (lambda: [torch.ones(2), "text"], None),
        (lambda: torch.rand(2), "are different when they are loaded twice"),
        (lambda: torch.rand(2, generator=OWN), "are different when they are loaded twice"),
        (lambda: (random.random(), torch.ones(2))[1], "draw random numbers when loaded"),
        (lambda: (np.random.rand(), torch.ones(2))[1], "draw random numbers when loaded"),  # noqa: NPY002
    ],
)
def test_what_is_loaded_twice_shows_whether_it_is_random(load, found):
    one = trainer()
    before = random_states(one)
    known, told = load_twice(one, load)
    assert told == found
    assert random_states(one) == before
    if found is None:
        assert load_twice(one, load) == (known, None)
        assert load_twice(one, lambda: [torch.zeros(2), "text"])[0] != known


def test_states_that_went_through_a_checkpoint_are_put_back():
    one = trainer()

    def draws():
        return [torch.rand(2).tolist(), torch.randn(1).item(), random.gauss(0, 1), np.random.randn(3).tolist()]  # noqa: NPY002

    random.gauss(0, 1), np.random.randn()  # noqa: NPY002  # both keep half of a pair
    torch.save({**plain_states(one), "of another": [1]}, "states.pt")
    first = draws()
    assert draws() != first
    put_states(one, torch.load("states.pt", weights_only=True))
    assert draws() == first
