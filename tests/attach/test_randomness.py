"""Random states are read without drawing, and put back."""

import random

import numpy as np
import pytest
import torch

from lightning_speedups.attach.randomness import random_states, same_randomness
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
