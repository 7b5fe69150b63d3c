"""Who makes samples is told by name, and what is left out is left out of a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor, v2

from lightning_speedups.tricks.batches.in_memory.samples import made_alike, name_of, steps_of


class Own(Dataset):
    def __init__(self, transform=None, transforms=None):
        self.transform, self.transforms = transform, transforms

    def __len__(self):
        return 9


def test_a_transform_is_taken_apart():
    inner = Compose([ToTensor(), nn.Sequential(nn.ReLU(), v2.ToImage()), v2.Compose([abs])])
    assert [name_of(step) for step in steps_of(inner)] == ["ToTensor", "ReLU", "ToImage", "abs"]


@pytest.mark.parametrize("library", [transforms, v2])
def test_a_copy_lacks_crops_and_flips_and_shares_all_else(library):
    flip, crop, last = library.RandomHorizontalFlip(), library.RandomCrop(8, padding=1), ToTensor()
    transform = library.Compose([crop, library.Compose([flip]), last])
    data = FakeData(10, transform=transform)
    part = Subset(Subset(data, [5, 3, 8, 1]), [2, 0])
    kept, moved = made_alike(DataLoader(part))
    assert moved == [crop, flip]
    assert type(kept.dataset.transform) is library.Compose
    assert kept.dataset.transform.transforms == [last]
    assert kept.indices == [8, 5]
    assert data.transform is transform
    assert transform.transforms[0] is crop
    assert len(transform.transforms) == 3


def test_what_is_known_is_not_copied():
    data = TensorDataset(torch.arange(3))
    kept, moved = made_alike(DataLoader(Subset(data, [1])))
    assert kept.dataset is data
    assert (kept.indices, moved) == ([1], [])
    kept, _ = made_alike(DataLoader(data))
    assert [one for (one,) in kept] == [0, 1, 2]


class OwnSubset(Subset):
    """Changes what it hands out."""


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lambda: Own(), "Own may make another one each time. If not, say so: `deterministic=..Own..`"),
        (lambda: OwnSubset(FakeData(9), [1]), "OwnSubset may make"),
        (lambda: FakeData(9, transform=RandomHorizontalFlip()), "RandomHorizontalFlip may make"),
        (lambda: FakeData(9, target_transform=Compose([RandomHorizontalFlip()])), "RandomHorizontalFlip may make"),
        (lambda: FakeData(9, transform=nn.Sequential(v2.RandomHorizontalFlip())), "RandomHorizontalFlip may make"),
    ],
)
def test_what_may_be_random_is_named(data, told):
    with pytest.raises(ValueError, match=told):
        made_alike(DataLoader(data()))


def test_transforms_of_image_and_label_together_are_looked_at_and_not_moved():
    data = Own(transforms=v2.Compose([v2.RandomHorizontalFlip()]))
    with pytest.raises(ValueError, match="RandomHorizontalFlip may make"):
        made_alike(DataLoader(data), ["Own"])


def test_a_name_that_is_given_is_trusted():
    data = Own(Compose([RandomHorizontalFlip(), abs]))
    kept, moved = made_alike(DataLoader(data), ["Own", "abs"])
    assert kept.dataset.transform.transforms == [abs]
    assert [name_of(one) for one in moved] == ["RandomHorizontalFlip"]
