"""What training_step receives: parts of the images, resized and mirrored, as torchvision would from the same draws."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as V

from lightning_speedups import BatchAugmentation, FeatureCache, RandomResizedCrops
from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.core.resized_crops import random_boxes
from zoo import Batches, Classifier, ReplayLoader, Seer, fit_interrupted, photos, resume, trainer


def EXAMPLE():
    return {"callbacks": [RandomResizedCrops(8, scale=(0.25, 1.0), seed=3)]}


def fit(data, *tricks, **arguments):
    module, val = Seer(), arguments.pop("val", None)
    trainer(callbacks=[*tricks], **{"max_epochs": 1, **arguments}).fit(module, data, val)
    return module


def draws(number, count, seed=3, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """What is drawn for a batch: boxes, and which images are mirrored."""
    generator = generator_for(seed, 0, number, BatchOrder.CUT)
    return random_boxes(count, (16, 16), scale, ratio, generator).T.tolist(), torch.rand(
        count, generator=generator
    ) < 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flip", ["random", None])
@pytest.mark.parametrize("size", [10, (9, 14)])
def test_each_image_is_cut_resized_and_mirrored_by_its_own_draws(size, flip, dtype):
    images, labels = photos(40)
    data = DataLoader(TensorDataset(images.to(dtype), labels), 16)
    module = fit(data, RandomResizedCrops(size, flip=flip, seed=3), max_epochs=2)
    sides, mirrored = [10, 10] if size == 10 else [9, 14], 0
    for number, (seen, numbers) in enumerate(module.seen):
        begin = 16 * (number % 3)
        part = images[begin : begin + 16]
        boxes, flipped = draws(number, len(part))
        assert seen.dtype == dtype
        assert seen.shape[2:] == (*sides,)
        for one, image, box, mirror in zip(seen, part, boxes, flipped, strict=True):
            other = V.resized_crop(image.double(), *box, sides, antialias=True)
            other = other.flip(-1) if mirror and flip else other
            assert (one.double() - other).abs().max() <= (1.01 if dtype == torch.uint8 else 0.01)
            mirrored += bool(mirror)
        assert torch.equal(numbers, labels[begin : begin + 16])
    assert len(module.seen) == 6
    assert 20 < mirrored < 60


def test_validation_sees_the_images_as_they_are_and_the_dataset_keeps_them():
    images, labels = photos(16)
    before, data = images.clone(), DataLoader(TensorDataset(images, labels), 8)
    module = fit(data, RandomResizedCrops(8), val=data)
    assert [torch.equal(batch[0], before[8 * place :][:8]) for place, batch in enumerate(module.validated)] == [
        True
    ] * 2
    assert torch.equal(images, before)


@pytest.mark.parametrize(("stop", "epoch_end"), [(1, False), (4, False), (4, True), (6, False)])
def test_a_resumed_run_without_a_seed_sees_the_same_images(stop, epoch_end):
    def trick():
        return [RandomResizedCrops(6)]

    whole, parted = Seer(), Seer()
    torch.manual_seed(7)
    trainer(callbacks=trick()).fit(whole, ReplayLoader())
    torch.manual_seed(7)
    fit_interrupted(parted, ReplayLoader(), stop, trick(), epoch_end)
    torch.manual_seed(99)
    resume(parted, ReplayLoader(), trick())
    assert len(whole.seen) == len(parted.seen) == 12
    for one, other in zip(whole.seen, parted.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_strength_makes_the_smallest_parts_larger():
    images = torch.arange(16.0).expand(200, 1, 16, 16)
    ranges = []
    for strength in (1.0, 0.5, 0.0):
        trick = RandomResizedCrops(16, scale=(0.04, 1.0), ratio=(1, 1), flip=None, seed=0)
        trick.strength = strength
        (seen,) = fit(Batches((images,)), trick).seen
        ranges.append(float((seen[0].amax((1, 2, 3)) - seen[0].amin((1, 2, 3))).min()))
    assert ranges[0] < ranges[1] < ranges[2] == 15


def test_images_stand_where_they_are_named_and_the_batch_stays_as_it_is():
    images, labels = photos(16)
    batch = {"views": [images, images.float()], "y": labels}
    with pytest.warns(UserWarning, match="not the maps of their size. If it belongs to them, leave out RandomResized"):
        (seen,) = fit(Batches(batch), RandomResizedCrops(8, inputs=("views", 0), seed=3)).seen
    assert seen["views"][0].shape[2:] == (8, 8)
    assert seen["views"][1].shape[2:] == (16, 16)
    assert batch["views"][0] is images


def test_what_it_hands_on_is_cropped_and_mirrored_by_others():
    data = Batches(photos(16))
    both = fit(data, RandomResizedCrops(12, seed=3), BatchAugmentation(2, flip=None, seed=3))
    other = fit(
        Batches((fit(data, RandomResizedCrops(12, seed=3)).seen[0][0],)), BatchAugmentation(2, flip=None, seed=3)
    )
    assert torch.equal(both.seen[0][0], other.seen[0][0])


def test_features_of_random_parts_are_refused():
    module = Classifier()
    module.backbone.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="RandomResizedCrops changes the samples from step to step"):
        trainer(callbacks=[RandomResizedCrops(8), FeatureCache()]).fit(module, ReplayLoader())


@pytest.mark.parametrize(
    ("options", "batch", "told"),
    [
        (
            {},
            (torch.zeros(8, 4),),
            r"inputs=0\) expected images \(N, C, H, W\) .*, but found torch.float32 of the shape",
        ),
        ({}, (torch.zeros(8, 1, 4, 4, dtype=torch.int64),), "of uint8 or floating point, but found torch.int64"),
        ({"inputs": 1}, (torch.zeros(8, 1, 4, 4), ["a"]), r"inputs=1\) expected a tensor with a batch dimension"),
        ({"inputs": "x"}, photos(8), r"inputs='x'\) found no part 'x'"),
        ({}, (torch.zeros(8, 32, 32, 3),), "In the dataset, put the channels second"),
    ],
)
def test_batches_it_cannot_change_are_refused_by_name_before_the_first_step(options, batch, told):
    module = Seer()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[RandomResizedCrops(4, **options)]).fit(module, Batches(batch))
    assert not module.seen


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"size": 1}, "`size` to be a whole number above 1, but got 1"),
        ({"size": (8, 0)}, "`size` to be a whole number above 1, but got 0"),
        ({"size": (8, 8, 8)}, r"`size` to be two numbers, but got \(8, 8, 8\)"),
        ({"size": 8.5}, "`size` to be a whole number"),
        ({"scale": (0.5, 0.2)}, r"`scale` to be two numbers, the smaller one first, but got \(0.5, 0.2\)"),
        ({"scale": (0, 1)}, r"`scale` to be a number in \(0, 1\], but got 0"),
        ({"scale": (None, 1)}, "`scale` to be a number"),
        ({"scale": 0.5}, "`scale` to be two numbers, but got 0.5"),
        ({"ratio": (-1, 1)}, "`ratio` to be a number above 0, but got -1"),
        ({"flip": "alternating"}, "`flip` to be 'random', or None, but got 'alternating'"),
        ({"inputs": [0, 1]}, "`inputs` to be an index, a key, an attribute name or a path"),
        ({"seed": 0.5}, "`seed`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        RandomResizedCrops(**{"size": 8, **arguments})
