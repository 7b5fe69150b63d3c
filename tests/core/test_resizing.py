"""Sizes against closed forms, and resizing against torch's own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.core.resizing import (
    Growth,
    checked_stages,
    filled_batch,
    regularization,
    resize_images,
    resize_maps,
    side,
)

shares = st.floats(0.0, 1.0)


@given(shares, st.floats(0.05, 0.95), st.floats(0.0, 0.9), st.floats(0.05, 1.0))
def test_the_share_is_the_line_between_its_two_points(progress, start, grow_from, length):
    growth = Growth(start, grow_from, min(1.0, grow_from + length))
    expected = np.interp(progress, [growth.grow_from, growth.full_from], [start, 1.0])
    assert growth.share(progress, 224) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(1, 40))
def test_a_side_is_the_nearest_multiple_that_there_is(full, share, multiple):
    got = side(full, share, multiple)
    if share == 1:
        assert got == full
        return
    possible = [multiple * k for k in range(1, full // multiple + 1)] or [full]
    nearest = min(abs(one - share * full) for one in possible)
    assert got in possible
    assert abs(got - share * full) <= nearest + 1e-9


@given(
    st.integers(1, 300), st.integers(1, 300), shares, shares, st.sampled_from([None, 2, 4, (0.4, 0.7, 1.0), (20, 40)])
)
def test_images_never_shrink_in_the_course_of_a_run_and_never_grow_above_full(height, width, one, other, stages):
    growth, full = Growth(0.5, 0.2, 0.9, stages, 4), (height, width)
    early, late = (growth.size(progress, full) for progress in sorted((one, other)))
    assert all(a <= b <= whole for a, b, whole in zip(early, late, full, strict=True))


def test_one_stage_is_the_full_size():
    growth = Growth(start=0.5, stages=checked_stages(1))
    assert {growth.size(progress, (33, 17)) for progress in (0.0, 0.5, 1.0)} == {(33, 17)}


def test_stages_share_the_run_out_evenly_as_in_efficientnet_v2():
    growth = Growth(128 / 300, 0.0, 0.75, 4, 1)
    sizes = [growth.size(i / 1000, (300, 300))[0] for i in range(1000)]
    expected = [round(128 + (300 - 128) * stage / 3) for stage in range(4)]
    assert sizes == [size for size in expected for _ in range(250)]


def test_given_sizes_are_pixels_of_the_shorter_side_or_shares():
    pixels = Growth(stages=(64, 96, 128), multiple=1)
    assert [pixels.size(progress, (128, 256)) for progress in (0, 0.39, 0.41, 0.55)] == [(64, 128), (64, 128), (96, 192), (128, 256)]  # fmt: skip
    assert pixels.size(1.0, (100, 100)) == (100, 100)  # never above full
    assert Growth(stages=(0.5, 1)).size(1.0, (33, 17)) == (33, 17)
    assert Growth(stages=(0.75,), multiple=1).size(1.0, (32, 32)) == (24, 24)


@given(st.integers(4, 120), st.integers(1, 9), st.sampled_from([None, 3, (0.5, 0.8, 1.0)]), shares)
def test_all_sizes_to_come_are_known(full, multiple, stages, begin):
    growth = Growth(0.4, 0.1, 0.7, stages, multiple)
    seen = {growth.size(begin + (1 - begin) * i / 3000, (full, full)) for i in range(3001)}
    assert growth.sizes((full, full), begin) == sorted(seen)
    oblong = growth.sizes((full, full + 8), begin)
    assert {size[0] for size in oblong} == {size[0] for size in seen}


def test_growth_may_be_a_jump():
    growth = Growth(0.5, 0.6, 0.6)
    assert [growth.share(progress, 10) for progress in (0.0, 0.59, 0.6, 1.0)] == [0.5, 0.5, 1.0, 1.0]


@given(st.integers(1, 512), st.integers(8, 300), st.integers(8, 300), st.floats(0.1, 1.0))
def test_a_filled_batch_has_as_many_pixels_as_fit(samples, height, width, share):
    size = (max(1, int(height * share)), max(1, int(width * share)))
    filled = filled_batch(samples, (height, width), size)
    assert filled * math.prod(size) <= samples * height * width < (filled + 1) * math.prod(size)


def test_regularization_is_linear_in_the_side():
    expected = np.interp(range(112, 225), [112, 224], [0.3, 1.0])
    assert [regularization(one, 112, 224, 0.3) for one in range(112, 225)] == pytest.approx(list(expected))
    assert regularization(8, 8, 8, 0.0) == 1.0


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_are_torchs_own_and_keep_type_and_memory_format(dtype, memory_format, antialias):
    images = (torch.rand(3, 4, 16, 12) * 255).to(dtype).contiguous(memory_format=memory_format)
    before = images.clone()
    small = resize_images(images, (8, 5), antialias)
    wide = images.double() if dtype == torch.float64 else images.float()
    expected = F.interpolate(wide, (8, 5), mode="bilinear", antialias=antialias)
    if dtype == torch.uint8:
        expected = expected.round().clamp(0, 255)
    assert small.dtype == dtype
    assert small.shape == (3, 4, 8, 5)
    assert small.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(small, expected.to(dtype), rtol=0, atol=0)
    assert torch.equal(images, before)


def test_uint8_is_rounded_and_not_cut_off():
    images = torch.tensor([[[[0, 255], [255, 255]]]], dtype=torch.uint8)  # the mean is 191.25
    assert resize_images(images, (1, 1)).item() == 191
    assert resize_images(255 - images, (1, 1)).item() == 64  # 63.75


@pytest.mark.parametrize("shape", [(5, 9, 9), (2, 3, 4, 9, 9), (2, 2, 3, 4, 9, 9)])
def test_all_dimensions_but_the_last_two_are_left_alone(shape):
    images = torch.randn(shape)
    small = resize_images(images, (4, 6))
    flat = F.interpolate(images.reshape(1, -1, 9, 9), (4, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(small, flat.reshape(*shape[:-2], 4, 6))


def test_video_comes_out_contiguous_in_whatever_memory_format_it_was():
    video = torch.randn(2, 3, 4, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    small = resize_images(video, (4, 4))
    assert small.is_contiguous()
    assert torch.equal(small, resize_images(video.contiguous(), (4, 4)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (3, 8), (11, 11)])
def test_maps_are_nearest_exact_in_any_type(dtype, size):
    maps = torch.randint(0, 2 if dtype == torch.bool else 200, (2, 11, 8)).to(dtype)
    expected = F.interpolate(maps.double()[:, None], size, mode="nearest-exact")[:, 0].to(dtype)
    assert torch.equal(resize_maps(maps, size), expected)


def test_what_has_the_size_is_handed_on_as_it_is():
    images = torch.randn(2, 3, 8, 8)
    assert resize_images(images, (8, 8)) is images
    assert resize_maps(images, (8, 8)) is images
