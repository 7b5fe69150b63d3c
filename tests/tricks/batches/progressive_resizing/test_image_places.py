"""What of a batch is resized, to which size, and what is refused."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import ProgressiveResizing
from lightning_speedups.core.resizing import resize_images, resize_maps
from lightning_speedups.tricks.batches.progressive_resizing.image_places import ImagePlaces


def places(inputs=0, maps=None, antialias=True):
    return ImagePlaces(ProgressiveResizing(), inputs, maps, antialias)


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


@pytest.mark.parametrize(
    ("options", "batch", "reason"),
    [
        ({"inputs": 1}, [torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"inputs=1\) .*\(N, ..., H, W\), but found torch.float32 of"),
        ({}, [[1, 2]], "but found list"),
        ({}, [torch.zeros(2, 8, 8, dtype=torch.int64)], "but found torch.int64 .*maps="),
        ({"maps": 1}, [torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"maps=1\) "),
        ({"inputs": [0, 1]}, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 6, 6)], r"inputs=1\) .* of one size .*\(2, 3, 6, 6\)"),
        ({"maps": 1}, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4)], r"maps=1\) .* of one size .*\(2, 4, 4\)"),
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
