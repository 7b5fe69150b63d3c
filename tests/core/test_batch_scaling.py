"""How the learning rate follows the batch size."""

import math

import pytest

from lightning_speedups.core.batch_scaling import scaling_factor


@pytest.mark.parametrize(
    ("optimizer", "rule", "power"),
    [("SGD", "auto", 1), ("Lion", "auto", 1), ("AdamW", "auto", 0.5), ("Lamb", "auto", 0.5), ("SGD", "sqrt", 0.5), ("Adam", "linear", 1)],
)  # fmt: skip
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.5])
def test_it_is_a_power_of_the_ratio(optimizer, rule, power, ratio):
    assert scaling_factor(ratio, rule, optimizer) == pytest.approx(math.exp(power * math.log(ratio)))
