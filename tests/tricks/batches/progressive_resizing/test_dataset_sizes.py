"""What sets the size in datasets with torchvision's and timm's transforms."""

from functools import partial

import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from lightning_speedups.attach.loaders import take_batch
from lightning_speedups.tricks.batches.progressive_resizing.dataset_sizes import UnknownSizeError, find_settings


class Pictures(Dataset):
    def __init__(self, transform=None, shape=(40, 56)):
        self.transform, self.shape = transform, shape

    def __len__(self):
        return 6

    def __getitem__(self, index):
        picture = Image.new("RGB", self.shape[::-1], (index, 0, 0))
        return v2.functional.to_image(picture if self.transform is None else self.transform(picture))


class Sized(Dataset):
    def __init__(self, size=16):
        self.size = size

    def __len__(self):
        return 6

    def __getitem__(self, index):
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return torch.full((1, height, width), index)


class Wrapper(Dataset):
    def __init__(self, inner, transform):
        self.inner, self.transform = inner, transform

    def __getitem__(self, index):
        return self.transform(self.inner[index])


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomResizedCrop(32),
        v1.RandomResizedCrop(32),
        RandomResizedCropAndInterpolation(32),
        v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32)]),
        v1.Compose([v1.Resize([36, 36]), v1.RandomCrop(32), v1.ToTensor(), v1.Normalize(0.5, 0.5)]),
        v2.Compose([v2.Resize([36]), v2.RandomCrop(32), v2.ColorJitter()]),
        nn.Sequential(v2.ToImage(), v2.Resize((32, 32)), v2.RandomRotation(20)),
        v2.Compose(
            [v2.RandomHorizontalFlip(), v2.Compose([v2.Resize((32, 32))]), v2.RandAugment(), v2.RandomErasing()]
        ),
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (20, 20), (28, 28)])
def test_the_images_have_the_size_that_was_set_and_then_their_own(transform, size):
    dataset = Pictures(transform)
    settings = find_settings(dataset)
    before = [(owner, owner.size) for owner, _ in settings.each]
    assert settings.full == dataset[0].shape[-2:] == (32, 32)
    settings.set_size(size)
    assert dataset[0].shape[-2:] == size
    settings.set_size(settings.full)
    for owner, value in before:
        assert owner.size == value
        assert type(owner.size) is type(value)
    assert dataset[0].shape[-2:] == (32, 32)


def test_a_smaller_crop_shows_the_same_part_of_the_picture():
    resize, crop = v2.Resize(64), v2.RandomCrop(48)
    settings = find_settings(Pictures(v2.Compose([resize, crop])))
    settings.set_size((24, 24))
    assert (resize.size, list(crop.size)) == ([32], [24, 24])


@pytest.mark.parametrize(
    ("size", "new", "value"), [(16, (8, 8), 8), ((16, 24), (8, 12), (8, 12)), ([16, 24], (12, 16), [12, 16])]
)
def test_a_datasets_own_size_is_set(size, new, value):
    dataset = Sized(size)
    settings = find_settings(Subset(dataset, [1, 2]))
    settings.set_size(new)
    assert dataset.size == value
    assert type(dataset.size) is type(size)
    assert dataset[0].shape[-2:] == new
    settings.set_size(settings.full)
    assert dataset.size == size


def test_what_holds_several_datasets_is_left_alone():
    crop = v2.RandomResizedCrop(32)
    with pytest.raises(UnknownSizeError, match="nothing in ConcatDataset sets"):
        find_settings(ConcatDataset([Subset(Pictures(crop), [0, 1]), Pictures(crop)]))
    pair = Wrapper(Pictures(crop), None)
    pair.other = Pictures(crop)
    with pytest.raises(UnknownSizeError, match="Wrapper holds several datasets"):
        find_settings(pair)


def test_what_resizes_behind_several_datasets_is_found():
    both = Wrapper(ConcatDataset([Pictures(), Pictures(v2.RandomResizedCrop(40))]), v2.RandomResizedCrop(32))
    find_settings(both).set_size((16, 16))
    assert {both[i].shape[-2:] for i in range(12)} == {(16, 16)}


def test_a_wrapper_goes_on_where_its_inner_dataset_stands():
    flip = Wrapper(Sized(16), v2.RandomHorizontalFlip())
    settings = find_settings(flip)
    settings.set_size((12, 12))
    assert flip[0].shape[-2:] == (12, 12)
    resized = Wrapper(Pictures(v2.Resize(20)), v2.CenterCrop(16))
    settings = find_settings(resized)
    settings.set_size((8, 8))
    assert resized[0].shape[-2:] == (8, 8)
    assert resized.inner.transform.size == [10]


def test_a_number_of_samples_is_no_side():
    data = FakeData(size=50, image_size=(3, 40, 40), transform=v2.RandomResizedCrop(32))
    find_settings(data).set_size((16, 16))
    assert (len(data), data[0][0].size) == (50, (16, 16))
    wrapped = Wrapper(FakeData(size=50, image_size=(3, 40, 40)), v2.RandomResizedCrop(32))
    assert [owner for owner, _ in find_settings(wrapped).each] == [wrapped.transform]


def test_a_datasets_own_size_counts_before_its_crops():
    crop = v2.RandomCrop(12)
    dataset = Sized(16)
    dataset.transform = crop
    settings = find_settings(dataset)
    assert settings.full == (12, 12)
    settings.set_size((6, 6))
    assert (dataset.size, list(crop.size)) == (8, [6, 6])


def test_a_size_for_a_while_gives_way_to_the_one_before_it_also_after_an_error():
    dataset = Sized(16)
    settings = find_settings(dataset)
    settings.set_size((8, 8))
    with settings.at_size((12, 12)):
        assert dataset.size == 12
    assert dataset.size == 8
    with pytest.raises(ZeroDivisionError), settings.at_size((16, 16)):
        dataset.size / 0
    assert dataset.size == 8


def test_joint_transforms_are_taken_instead_of_the_pair_that_torchvision_makes():
    joint = FakeData(10, (3, 40, 40))
    joint.transforms, joint.transform = v2.RandomResizedCrop(32), None
    assert find_settings(joint).each[0][0] is joint.transforms


class MyOwn:
    def __call__(self, picture):
        return picture


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (v2.Compose([v2.Resize((32, 32)), MyOwn()]), "what MyOwn does"),
        (v2.Compose([v2.Resize((32, 32)), lambda picture: picture]), "what function does"),
        (v2.Compose([v2.Resize((32, 32)), v2.Pad(2)]), "what Pad does"),
        (v2.Compose([v2.Resize((32, 32)), v2.RandomRotation(20, expand=True)]), "what RandomRotation does"),
        (v2.Resize(32), "leaves each image its own shape"),
        (v2.Resize(32, max_size=40), "max_size"),
        (v2.Compose([v2.Resize(36), v2.RandomCrop(32, padding=4)]), "RandomCrop does with its `padding`"),
        (v2.RandomCrop(32), "put a Resize before crops"),
        (v2.Compose([v2.CenterCrop(32), v2.Resize((32, 32))]), "put a Resize before crops"),
        (v2.RandomApply([v2.Resize((32, 32))]), "what RandomApply does"),
        (v2.RandomChoice([v2.RandomResizedCrop(32), v2.Resize((32, 32))]), "what RandomChoice does"),
        (v2.Compose([v2.Resize((32, 32)), v2.RandomOrder([v2.ColorJitter()])]), "what RandomOrder does"),
        (torch.eye(4), "what Tensor does"),
        (v2.RandomHorizontalFlip(), "nothing in Pictures sets"),
        (None, "nothing in Pictures sets"),
    ],
)
def test_what_is_not_known_for_certain_is_left_alone(transform, reason):
    with pytest.raises(UnknownSizeError, match=reason):
        find_settings(Pictures(transform))


def test_what_another_dataset_would_see_changed_is_named():
    crop = v2.RandomResizedCrop(32)
    whole = Pictures(v2.Compose([crop]))
    settings = find_settings(Subset(whole, [0, 1]))
    assert settings.shared_with(Subset(whole, [2, 3])) == "RandomResizedCrop"
    assert settings.shared_with(Pictures(v2.Compose([v2.ToImage(), v2.Compose([crop])]))) == "RandomResizedCrop"
    assert settings.shared_with(Pictures(partial(lambda crop, picture: crop(picture), crop))) == "RandomResizedCrop"
    assert settings.shared_with(Pictures(lambda picture: crop(picture))) == "RandomResizedCrop"
    assert settings.shared_with(Pictures(v2.Compose([v2.RandomResizedCrop(32)]))) is None
    assert settings.shared_with(None) is None
    sized = Sized()
    assert find_settings(Subset(sized, [0])).shared_with(Wrapper(sized, None)) == "Sized"


def test_a_batch_is_what_the_loader_would_make():
    dataset = Sized(4)
    batch = take_batch(DataLoader(dataset, batch_size=3), [4, 1])
    assert batch[:, 0, 0, 0].tolist() == [4, 1]
    doubled = DataLoader(dataset, batch_size=3, collate_fn=lambda samples: [2 * one[0, 0, 0].item() for one in samples])
    assert take_batch(doubled, [4, 1]) == [8, 2]
    whole = DataLoader(TensorRows(), batch_size=None)
    assert take_batch(whole, [4, 1]).tolist() == [4, 1]
    assert take_batch(DataLoader(Subset(dataset, [3, 5]), batch_size=2), [1])[0, 0, 0, 0] == 5


class TensorRows(Dataset):
    def __getitem__(self, rows):
        return torch.arange(6)[rows]
