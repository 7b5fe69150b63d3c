"""Boxes as torchvision draws them, and crops as torchvision, PIL and torch resize them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from lightning_speedups.core.randomness import generator_for
from lightning_speedups.core.resized_crops import random_boxes, resized_crops

SCALE, RATIO, DRAWS = (0.08, 1.0), (3 / 4, 4 / 3), 1500


def pictures(count, channels=3, height=20, width=26, dtype=torch.uint8):
    return torch.randint(256, (count, channels, height, width), generator=generator_for(1)).to(dtype)


def boxes(count, size=(20, 26), scale=SCALE, ratio=RATIO, seed=0):
    return random_boxes(count, size, scale, ratio, generator_for(seed))


def theirs(count, size, scale, ratio):
    """torchvision's own boxes, one by one."""
    image = torch.empty(1, *size)
    return torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]).T


@pytest.mark.parametrize("size", [(20, 26), (64, 64)])
@pytest.mark.parametrize(("scale", "ratio"), [(SCALE, RATIO), ((0.35, 1.0), RATIO), ((0.1, 0.3), (0.5, 0.8))])
def test_boxes_are_distributed_as_torchvisions(size, scale, ratio):
    torch.manual_seed(0)
    ours, other = boxes(DRAWS, size, scale, ratio), theirs(DRAWS, size, scale, ratio)
    assert ours.dtype == torch.int64
    for one, row, side in zip(ours, other, (*size, *size), strict=True):
        one, row = one.double() / side, row.double() / side
        limit = 4.5 * (2 / DRAWS) ** 0.5
        assert abs(one.mean() - row.mean()) <= limit * max(row.std(), 1e-9) + 1e-9
        assert abs(one.std() - row.std()) < 0.03
        for place in torch.linspace(0, 1, 11):  # the shares below ten places
            assert abs((one <= place).double().mean() - (row <= place).double().mean()) < limit * 0.5 + 1e-9


@pytest.mark.parametrize("size", [(20, 26), (7, 3), (1, 1)])
def test_boxes_lie_in_the_image_and_reach_its_border(size):
    top, left, height, width = boxes(2000, size)
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() == size[0]
    assert (left + width).max() == size[1]


@pytest.mark.parametrize("size", [(10, 100), (100, 10), (30, 31)])
def test_where_no_box_fits_it_is_the_whole_image(size):
    ours = boxes(5, size, (1.0, 1.0), RATIO if size != (30, 31) else (0.5, 0.6))
    assert torch.equal(ours, torch.tensor([0, 0, *size]).view(4, 1).expand(4, 5))


def test_the_generator_alone_decides():
    assert torch.equal(boxes(9, seed=3), boxes(9, seed=3))
    assert not torch.equal(boxes(9, seed=3), boxes(9, seed=4))


@pytest.mark.parametrize("size", [(9, 9), (20, 26), (40, 33), (5, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_crops_of_numbers_are_those_of_torchvision(dtype, size):
    images, where = pictures(30, dtype=dtype), boxes(30)
    before = images.clone()
    ours = resized_crops(images, where, size)
    assert ours.dtype == dtype
    assert torch.equal(images, before)
    for one, image, box in zip(ours, images, where.T.tolist(), strict=True):
        other = V.resized_crop(image.double(), *box, list(size), antialias=True)
        tolerance = {torch.float16: 0.2, torch.bfloat16: 1.1}.get(dtype, 1e-3)
        assert (one.double() - other).abs().max() < tolerance


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crops_of_bytes_are_those_of_pillow_to_a_rounding(channels, layout):
    images = pictures(30, channels).contiguous(memory_format=layout)
    ours = resized_crops(images, boxes(30), (12, 15))
    assert ours.dtype == torch.uint8
    assert ours.shape == (30, channels, 12, 15)
    for one, image, (top, left, height, width) in zip(ours, images, boxes(30).T.tolist(), strict=True):
        for ours_, channel in zip(one, image, strict=True):
            cut = Image.fromarray(channel[top : top + height, left : left + width].numpy().copy())
            other = np.asarray(cut.resize((15, 12), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(ours_.numpy().astype(int) - other).max() <= 1


def test_bytes_and_numbers_are_cut_alike():
    images, where = pictures(40), boxes(40)
    ours = resized_crops(images, where, (14, 14)).double()
    assert (ours - resized_crops(images.double(), where, (14, 14))).abs().max() <= 1


def test_everything_stays_on_the_images_device():
    for dtype in (torch.uint8, torch.float16):
        images = torch.empty(4, 3, 20, 26, dtype=dtype, device="meta")
        crops = resized_crops(images, boxes(4), (8, 9))
        assert (crops.device.type, crops.dtype, crops.shape) == ("meta", dtype, (4, 3, 8, 9))
