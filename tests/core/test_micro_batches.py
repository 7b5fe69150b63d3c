"""Micro-batches have every sample once, in its order, in the container that the batch had."""

import itertools
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_speedups.core.micro_batches import micro_sizes, split_batch

Pair = namedtuple("Pair", "inputs labels")


@dataclass
class Sample:
    inputs: Any
    labels: Any


MAKE = {
    "tensor": lambda x, y: x,
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "named": lambda x, y: Pair(x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "mapping": lambda x, y: UserDict({"x": x, "y": y}),
    "dataclass": lambda x, y: Sample(x, y),
    "nested": lambda x, y: {
        "views": [x, (x, None)],
        "y": {"y": y},
        "scale": torch.tensor(2.0),
        "names": list("abcdefgh"),
        "array": np.arange(16).reshape(8, 2),
    },
}


def leaves(part):
    """All tensors, arrays and lists of names, in their order."""
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return [part]
    if isinstance(part, list) and isinstance(part[0], str):
        return [part]
    inner = (
        part if isinstance(part, (list, tuple)) else part.values() if hasattr(part, "values") else vars(part).values()
    )
    return [leaf for one in inner if not (one is None or isinstance(one, str)) for leaf in leaves(one)]


@pytest.mark.parametrize("sizes", [[8], [4, 4], [3, 3, 2], [1] * 8])
@pytest.mark.parametrize("kind", MAKE)
def test_put_behind_each_other_they_are_the_batch_and_the_batch_stays_as_it_was(kind, sizes):
    x, y = torch.randn(8, 2, 3), torch.arange(8)
    batch = MAKE[kind](x, y)
    micros = split_batch(batch, sizes)
    assert [type(micro) for micro in micros] == [type(batch)] * len(sizes)
    for whole, *parts in zip(leaves(batch), *map(leaves, micros), strict=True):
        if isinstance(whole, list):
            assert [*itertools.chain(*parts)] == whole
        elif isinstance(whole, np.ndarray):
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        elif whole.ndim:
            assert [len(part) for part in parts] == sizes
            assert torch.equal(torch.cat(parts), whole)
            assert parts[0].data_ptr() == whole.data_ptr()  # a view
        else:
            assert all(part is whole for part in parts)
    assert leaves(batch)[0] is x


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(8, 2), torch.ones(3)),  # class weights, say
        [torch.ones(3, 5, 5), torch.ones(3, 7, 4), torch.ones(2)],
        {"nodes": torch.ones(8, 2), "edges": torch.ones(2, 40)},
        [torch.ones(8, 2), np.ones(3)],
    ],
)
def test_tensors_of_another_length_are_refused_by_shape(batch):
    with pytest.raises(ValueError, match=r"Expected each tensor to have the batch's 8 samples first, but got \("):
        split_batch(batch, [4, 4])


@pytest.mark.parametrize("samples", range(1, 30))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, None])
def test_sizes_are_as_few_and_as_even_as_can_be(samples, size):
    sizes = micro_sizes(samples, size)
    most = size or samples
    assert sum(sizes) == samples
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert (len(sizes) - 1) * most < samples  # one less would not do
