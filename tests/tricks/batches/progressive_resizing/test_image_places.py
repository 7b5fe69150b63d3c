"""What of a batch is resized, to which size, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import ProgressiveResizing
from lightning_speedups.core.resizing import resize_images, resize_maps
from lightning_speedups.tricks.batches.progressive_resizing.image_places import ImagePlaces, in_proportion


def places(inputs=0, maps=None, antialias=True, multiple=4):
    return ImagePlaces(ProgressiveResizing(), inputs, maps, antialias, multiple)


def test_images_and_maps_are_resized_and_the_batch_itself_is_left_alone():
    batch = {"x": torch.randn(2, 3, 16, 16), "map": torch.randint(0, 5, (2, 16, 16)), "y": torch.arange(2)}
    before = dict(batch)
    found = places("x", "map", antialias=False)
    assert found.size_in(batch) == (16, 16)
    small = found.resized(batch, (8, 8))
    assert torch.equal(small["x"], resize_images(batch["x"], (8, 8), antialias=False))
    assert torch.equal(small["map"], resize_maps(batch["map"], (8, 8)))
    assert small["y"] is batch["y"]
    assert all(batch[key] is before[key] for key in batch)


def test_what_has_another_size_than_the_first_images_keeps_its_proportion():
    batch = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 24, 24), torch.zeros(2, 6, 6)]
    small = places([0, 1], 2).resized(batch, (16, 16))
    assert [tuple(part.shape[-2:]) for part in small] == [(16, 16), (12, 12), (3, 3)]
    assert [tuple(part.shape[-2:]) for part in places([0, 1], 2, multiple=8).resized(batch, (16, 16))][1] == (16, 16)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_a_size_in_proportion_is_never_above_the_full_one_and_full_with_the_others(own, first, side, multiple):
    side = min(side, first)
    new = in_proportion((own, own), (first, first), (side, side), multiple)
    assert new == (side, side) if own == first else new[0] <= own
    assert in_proportion((own, own), (first, first), (first, first), multiple) == (own, own)


@pytest.mark.parametrize(
    ("options", "batch", "reason"),
    [
        ({"inputs": 1}, [torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"inputs=1\) .*\(N, ..., H, W\), but found torch.float32 of"),
        ({}, [[1, 2]], "but found list"),
        ({}, [torch.zeros(2, 8, 8, dtype=torch.int64)], "but found torch.int64 .*maps="),
        ({"maps": 1}, [torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"maps=1\) "),
        ({"inputs": "x"}, [torch.zeros(2, 3, 8, 8)], "no part 'x'"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_its_place(options, batch, reason):
    with pytest.raises(MisconfigurationException, match=r"ProgressiveResizing\(.*" + reason):
        places(**options).resized(batch, (4, 4))


@pytest.mark.parametrize("wrong", [[], [0, 0], None, 1.5, [("a",), "a"]])
def test_what_is_no_place_is_named(wrong):
    with pytest.raises(ValueError, match="`inputs`"):
        places(wrong)
