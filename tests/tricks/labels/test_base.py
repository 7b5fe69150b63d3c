"""What the losses with label smoothing stand on: ε and the factor on it."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_speedups.tricks.labels.base import Smoothing, as_smoothing


def test_a_number_stays_a_number_and_is_pythons():
    for smoothing in (0.1, 0, np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
        assert as_smoothing(smoothing) == smoothing
        assert type(as_smoothing(smoothing)) in (int, float)
        assert Smoothing(smoothing).epsilon(torch.zeros(2, 3)) == smoothing
        assert Smoothing(smoothing).highest == float(smoothing)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([0.1, 0, 0.5], torch.float32),
        ((0.1, 0.0, 0.5), torch.float32),
        (np.array([0.1, 0.0, 0.5]), torch.float32),
        (torch.tensor([0.1, 0.0, 0.5]), torch.float32),
        (torch.tensor([0.1, 0.0, 0.5], dtype=torch.float64), torch.float32),
        (torch.tensor([0.1, 0.0, 0.5], dtype=torch.bfloat16), torch.float32),
        (torch.nn.Parameter(torch.tensor([0.1, 0.0, 0.5])), torch.float32),
    ],
)
def test_one_for_each_class_is_kept_as_a_tensor(given, dtype):
    values = as_smoothing(given)
    assert type(values) is torch.Tensor
    assert values.dtype == dtype
    assert not values.requires_grad
    torch.testing.assert_close(values.double(), torch.tensor([0.1, 0.0, 0.5]).double(), rtol=3e-3, atol=0)
    assert Smoothing(given).highest == 0.5


def test_it_is_a_copy_of_what_was_given():
    given = torch.tensor([0.1, 0.2])
    loss = Smoothing(given)
    given.fill_(0.9)
    assert loss.smoothing.tolist() == torch.tensor([0.1, 0.2]).tolist()


@pytest.mark.parametrize(
    ("smoothing", "told"),
    [
        (1.0, r"`smoothing` to be a number in \[0, 1\), but got 1.0"),
        (-0.1, "but got -0.1"),
        (float("nan"), "`smoothing`"),
        (True, "`smoothing`"),
        ("0.1", "`smoothing` to be a number in .* or such numbers for all classes, .* but got '0.1'"),
        (None, "but got None"),
        ([], r"but got \[\]"),
        ([[0.1, 0.2]], r"`smoothing\[0\]`"),
        (torch.tensor(1.5), r"but got tensor\(1.5000\)"),
        ([True, False], r"`smoothing\[0\]`"),
        ([0.1, "x"], r"`smoothing\[1\]`"),
        ([0.1 + 0j], r"`smoothing\[0\]`"),
        ([0.1, 1.0], r"`smoothing\[1\]` to be a number in \[0, 1\), but got 1.0"),
        ([-0.5, 0.1], r"`smoothing\[0\]` .* but got -0.5"),
        ([1 - 1e-12], r"`smoothing\[0\]` .* but got 1.0"),  # as float32
        ([0.1, 0.2, float("nan")], r"`smoothing\[2\]` .* but got nan"),
    ],
)
def test_what_is_no_smoothing_is_refused(smoothing, told):
    with pytest.raises(ValueError, match=told):
        Smoothing(smoothing)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (4,)])
def test_scores_of_another_number_of_classes_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"Expected scores of shape \(N, 3, ...\) for a `smoothing` of 3 values, one for"
    ):
        Smoothing([0.1, 0.2, 0.3]).epsilon(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_multiplies_in_the_scores_precision(dtype):
    scores = torch.zeros(2, 3, dtype=dtype)
    one, each = Smoothing(0.2), Smoothing([0.0, 0.2, 0.4])
    for loss, expected in ((one, 0.1), (each, [0.0, 0.1, 0.2])):
        loss.strength = torch.tensor(0.5)
        now = loss.epsilon(scores)
        assert now.dtype == dtype
        torch.testing.assert_close(now, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0)
        loss.strength = None
    assert one.epsilon(scores) == 0.2
    assert torch.equal(each.epsilon(scores), each.smoothing.to(dtype))


def test_it_moves_with_the_module_and_is_no_part_of_its_state():
    loss = Smoothing([0.1, 0.2])
    assert not loss.state_dict()
    assert loss.double().smoothing.dtype == torch.float64
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.smoothing, loss.smoothing)
        assert twin.strength is None
    assert Smoothing([0.1, 0.2]).to("meta").smoothing.is_meta
