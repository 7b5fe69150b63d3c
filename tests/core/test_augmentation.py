"""Crops against numpy's padding and slices, flips against numpy's, coins against chance."""

import numpy as np
import pytest
import torch

from lightning_speedups.core.augmentation import coins, flip_some, shifted_crops
from lightning_speedups.core.randomness import generator_for

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
FORMATS = [torch.contiguous_format, torch.channels_last]


def pictures(*shape, dtype=torch.float32):
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator_for(1)).to(dtype)


def expected_crop(image, top, left, pad, fill):
    around = [(0, 0)] * (image.ndim - 2) + [(pad, pad)] * 2
    array = image.double().numpy()
    padded = np.pad(array, around, mode="reflect") if fill is None else np.pad(array, around, constant_values=fill)
    height, width = array.shape[-2:]
    return torch.from_numpy(padded[..., top : top + height, left : left + width].copy()).to(image.dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("fill", [None, 0, 1])
@pytest.mark.parametrize("dtype", TYPES)
def test_each_crop_is_a_slice_of_the_padded_image(dtype, fill, memory_format):
    images = pictures(20, 3, 7, 9, dtype=dtype).contiguous(memory_format=memory_format)
    before, offsets = images.clone(), torch.randint(7, (2, 20), generator=generator_for(2))
    crops = shifted_crops(images, offsets, 3, fill)
    for image, crop, top, left in zip(images, crops, *offsets.tolist(), strict=True):
        assert torch.equal(crop, expected_crop(image, top, left, 3, fill))
    assert crops.dtype == dtype
    assert crops.shape == images.shape
    assert crops.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)
    assert crops.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(("shape", "pad"), [((5, 6, 8), 2), ((5, 6, 8), 5), ((4, 2, 3, 6, 5), 1), ((1, 1, 2, 2), 1)])
@pytest.mark.parametrize("fill", [None, -100])
def test_maps_videos_and_the_widest_padding(shape, pad, fill):
    images = pictures(*shape, dtype=torch.int64)
    offsets = torch.randint(2 * pad + 1, (2, len(images)), generator=generator_for(3))
    crops = shifted_crops(images, offsets, pad, fill)
    for image, crop, top, left in zip(images, crops, *offsets.tolist(), strict=True):
        assert torch.equal(crop, expected_crop(image, top, left, pad, fill))


def test_images_that_are_a_view_with_gaps():
    images = pictures(6, 4, 12, 12)[:, 1:, ::2, 1:10]
    offsets = torch.randint(5, (2, 6), generator=generator_for(3))
    assert torch.equal(shifted_crops(images, offsets, 2), shifted_crops(images.contiguous(), offsets, 2))


def test_the_middle_place_gives_the_image_itself_and_no_image_gives_none():
    images = pictures(3, 2, 6, 6)
    assert torch.equal(shifted_crops(images, torch.full((2, 3), 2), 2), images)
    assert shifted_crops(images[:0], torch.zeros(2, 0, dtype=torch.int64), 2).shape == (0, 2, 6, 6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("fill", [None, 0, -100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_volumes_are_cut_along_their_depth_too(dtype, fill, memory_format):
    volumes = pictures(12, 2, 6, 5, 7, dtype=dtype).contiguous(memory_format=memory_format)
    before, offsets = volumes.clone(), torch.randint(5, (3, 12), generator=generator_for(4))
    crops = shifted_crops(volumes, offsets, 2, fill)
    for volume, crop, (front, top, left) in zip(volumes, crops, offsets.T.tolist(), strict=True):
        array, around = volume.double().numpy(), [(0, 0)] + [(2, 2)] * 3
        padded = np.pad(array, around, mode="reflect") if fill is None else np.pad(array, around, constant_values=fill)
        cut = padded[:, front : front + 6, top : top + 5, left : left + 7]
        assert np.array_equal(crop.double().numpy(), cut)
    assert crops.dtype == dtype
    assert crops.shape == volumes.shape
    assert crops.is_contiguous(memory_format=memory_format)
    assert torch.equal(volumes, before)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_flips_mirror_the_chosen_images_left_to_right(dtype, memory_format):
    images = pictures(6, 3, 4, 5, dtype=dtype).contiguous(memory_format=memory_format)
    before, flipped = images.clone(), torch.tensor([True, False, True, True, False, False])
    mirrored = flip_some(images, flipped)
    for image, result, flip in zip(images, mirrored, flipped, strict=True):
        assert (
            np.array_equal(
                result.double().numpy(), np.fliplr(image.double().permute(1, 2, 0).numpy()).transpose(2, 0, 1)
            )
            or not flip
        )
        assert flip or torch.equal(result, image)
    assert mirrored.dtype == dtype
    assert mirrored.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)


def test_a_coin_belongs_to_the_sample_and_the_seed():
    samples = torch.randperm(1000, generator=generator_for(5))
    thrown = coins(7, samples)
    assert thrown.dtype == torch.int64
    assert torch.equal(thrown[:10], coins(7, samples[:10]))
    assert torch.equal(thrown, coins(7, torch.arange(1000))[samples])
    assert coins(7, torch.tensor([], dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("begin", [0, 2**31 - 50_000, 2**32 - 50_000, 2**40, 2**62])
@pytest.mark.parametrize("seed", [0, 1, -3, 2**70])
def test_coins_are_fair_and_know_nothing_of_their_neighbours_or_of_another_seed(seed, begin):
    count = 100_000
    thrown = coins(seed, torch.arange(begin, begin + count))
    assert set(thrown.unique().tolist()) == {0, 1}
    limit = 4.5 * 0.5 * count**0.5  # 4.5 standard deviations
    assert abs(int(thrown.sum()) - count / 2) < limit
    for lag in (*range(1, 70), 128, 256, 1000, 1024, 4096, 2**15, 2**16):
        pairs = thrown[lag:] ^ thrown[:-lag]
        assert abs(int(pairs.sum()) - len(pairs) / 2) < limit, lag
    other = coins(seed + 1, torch.arange(begin, begin + count))
    assert abs(int((thrown ^ other).sum()) - count / 2) < limit


def test_samples_that_differ_in_high_bits_alone_have_coins_of_their_own():
    thrown = coins(0, torch.arange(20_000) << 32)
    assert abs(int(thrown.sum()) - 10_000) < 4.5 * 0.5 * 20_000**0.5


def test_everything_stays_on_the_images_device():
    images, places = torch.empty(4, 3, 8, 8, device="meta"), torch.zeros(2, 4, dtype=torch.int64, device="meta")
    for fill in (None, 0):
        assert shifted_crops(images, places, 2, fill).device.type == "meta"
    assert flip_some(images, places[0] == 1).device.type == "meta"
