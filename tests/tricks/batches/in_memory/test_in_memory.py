"""The loaders of an unmodified project hand out from memory what they handed out, and random samples are refused by name."""

from __future__ import annotations

import logging
import random
import struct
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)
from torchvision.datasets import MNIST
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Lambda,
    Normalize,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
    v2,
)

from lightning_speedups import BatchAugmentation, InMemory, InMemoryLoader, LoaderTuning, SubsetTraining
from zoo import (
    Batches,
    Classifier,
    OrderOfEpoch,
    Seer,
    assert_same_weights,
    fit_interrupted,
    images,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [InMemory(deterministic=["ReplayLoader"])]}


class Loads(Seer):
    """Lets Lightning make its loaders before the trick joins."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class Counted(Dataset):
    """Counts how often each sample is made."""

    def __init__(self, count=40, change=lambda image: image):
        self.samples, self.change, self.made = images(count), change, Counter()

    def __len__(self):
        return len(self.samples[1])

    def __getitem__(self, index):
        self.made[index] += 1
        return {"image": self.change(self.samples[0][index]), "label": int(self.samples[1][index])}


class Sized(Dataset):
    """Images of several sizes."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.ones(1, 4 + index % 2, 4), index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(8.0))


def mnist(transform=None, count=40, **options):
    """torchvision's MNIST, over files with random pixels."""
    raw, generator = Path("data/MNIST/raw"), torch.Generator().manual_seed(0)
    raw.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
        for kind, values in (("images", pixels), ("labels", labels)):
            head = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
            (raw / f"{split}-{kind}-idx{values.ndim}-ubyte").write_bytes(head + values.numpy().tobytes())
    return MNIST("data", transform=transform, **options)


def numbers(count=10):
    return TensorDataset(torch.arange(count), torch.arange(count) * 2.0)


def fit(data, *tricks, val=None, seer=Seer, **arguments):
    module, run = seer(), trainer(callbacks=[*tricks], **{"max_epochs": 2, **arguments})
    run.fit(module, data, val)
    return module, run


def assert_same(ours, theirs):
    """Two lists of batches hold the same, in the same containers."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        parts = [(one[key], other[key]) for key in (one if isinstance(one, dict) else range(len(one)))]
        assert all(torch.equal(a, b) and a.dtype == b.dtype and type(a) is type(b) for a, b in parts)


NORMAL = [ToTensor(), Normalize((0.1307,), (0.3081,))]
DATA = {
    "tensors": (lambda: TensorDataset(*images(40)), []),
    "some tensors": (lambda: Subset(TensorDataset(*images(40)), range(7, 31)), []),
    "a list": (lambda: [*zip(*images(40), strict=True)], []),
    "one's own dicts": (Counted, ["Counted"]),
    "MNIST": (lambda: mnist(Compose(NORMAL)), []),
    "small MNIST": (lambda: Subset(mnist(Compose([Resize(14), *NORMAL])), [*range(3, 33)]), []),
    "MNIST by the second transforms": (lambda: mnist(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, True)])), []),
    "MNIST by one's own function": (lambda: mnist(Lambda(lambda image: torch.tensor(image.getextrema()))), ["Lambda"]),
    "MNIST with other labels": (lambda: mnist(ToTensor(), target_transform=torch.tensor), ["tensor"]),
}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_training_and_validation_see_what_the_loaders_hand_out(kind, drop_last):
    make, names = DATA[kind]
    data, val = DataLoader(make(), 7, drop_last=drop_last), DataLoader(make(), 9)
    plain, _ = fit(data, val=val)
    module, run = fit(data, InMemory(deterministic=names), val=val)
    assert_same(module.seen, plain.seen)
    assert_same(module.validated, plain.validated)
    assert isinstance(run.train_dataloader, InMemoryLoader)
    assert isinstance(run.val_dataloaders, InMemoryLoader)


@pytest.mark.parametrize("seer", [Seer, Loads])
def test_after_the_start_no_sample_is_made(seer):
    data, noted, module = Counted(), [], seer()
    module.on_train_epoch_start = lambda: noted.append(sum(data.made.values()))
    trick = InMemory(deterministic=["Counted"])
    trainer(callbacks=[trick], max_epochs=3).fit(module, DataLoader(data, 8, shuffle=True))
    assert len(set(noted)) == 1
    assert noted[0] == 40 + 2 * 16 + 2  # all, some of them twice before, and one for its size, without crops and with
    assert sum(data.made.values()) == noted[0]


def test_tensors_are_not_copied():
    data = TensorDataset(*images(40))
    _, run = fit(DataLoader(data, 8), InMemory())
    assert [one.data_ptr() for one in run.train_dataloader.dataset.tensors] == [one.data_ptr() for one in data.tensors]


def test_loader_dataset_and_transforms_stay_as_they_are():
    transform = Compose([RandomHorizontalFlip(), *NORMAL])
    parts, data = [*transform.transforms], mnist(transform)
    part = Subset(data, range(20))
    loader = DataLoader(part, 5, shuffle=True, num_workers=0)
    sampler = loader.sampler

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader

    module, run = Seer(), trainer(callbacks=[InMemory(), BatchAugmentation(2, seed=1)], max_epochs=1)
    run.fit(module, Data())
    assert loader.dataset is part
    assert part.dataset is data
    assert data.transform is transform
    assert transform.transforms == parts
    assert loader.batch_sampler.sampler is sampler
    assert patched(run) == set()


# ---- orders


def read(module):
    return [batch[0].tolist() for batch in module.seen]


def test_shuffled_epochs_are_those_of_the_loader():
    orders = []
    for tricks in ([], [InMemory()]):
        torch.manual_seed(4)
        module, _ = fit(DataLoader(numbers(), 4, shuffle=True), *tricks, max_epochs=3)
        orders.append(read(module))
    assert orders[0] == orders[1]
    assert len({str(orders[0][3 * epoch :][:3]) for epoch in range(3)}) == 3


def generator():
    return torch.Generator().manual_seed(5)


KEPT = {
    "a list": lambda: {"sampler": [3, 1, 4, 5, 9, 2, 6]},
    "of the epoch": lambda: {"sampler": OrderOfEpoch(10)},
    "batches": lambda: {"batch_size": 1, "batch_sampler": BatchSampler([5, 3, 2], 2, True)},
    "a sampler with a generator": lambda: {"sampler": RandomSampler(range(10), generator=generator())},
    "shuffled by a generator": lambda: {"shuffle": True, "generator": generator()},
    "again and again": lambda: {"sampler": RandomSampler(range(10), True, 25, generator=generator())},
}


@pytest.mark.parametrize("kind", KEPT)
def test_any_order_is_that_of_the_loader(kind):
    def make():
        return DataLoader(numbers(), **{"batch_size": 2, **KEPT[kind]()})

    assert read(fit(make(), InMemory())[0]) == read(fit(make())[0])


STOPS = [(1, False), (3, False), (5, False), (5, True), (8, False), (10, True)]


@pytest.mark.parametrize("seer", [Seer, Loads])
@pytest.mark.parametrize(("stop", "epoch_end"), STOPS)
def test_a_resumed_run_in_order_goes_on_with_the_next_batch(stop, epoch_end, seer):
    def data():
        return DataLoader(numbers(), 2, sampler=OrderOfEpoch(10))

    whole, parted = seer(), seer()
    trainer(callbacks=[InMemory()]).fit(whole, data())
    fit_interrupted(parted, data(), stop, [InMemory()], epoch_end)
    resume(parted, data(), [InMemory()])
    assert read(parted) == read(whole)


def test_a_shuffled_run_resumed_within_an_epoch_is_warned_of_another_order():
    def data():
        return DataLoader(numbers(), 2, shuffle=True)

    module = Seer()
    fit_interrupted(module, data(), 3, [InMemory()])
    with pytest.warns(
        UserWarning, match="InMemoryLoader is resumed within an epoch, but its sampler's order is random"
    ):
        resume(module, data(), [InMemory()], max_epochs=1)
    assert len(module.seen) == 5


@pytest.mark.parametrize("more", [[], [RandomHorizontalFlip()]])
def test_making_samples_leaves_the_random_states_as_they_are(more):
    module, before = Seer(), (torch.get_rng_state().tolist(), random.getstate())
    module.on_train_start = lambda: states.append((torch.get_rng_state().tolist(), random.getstate()))
    states = []
    data = DataLoader(mnist(Compose([*more, *NORMAL])), 8, shuffle=True)
    trainer(callbacks=[InMemory(), BatchAugmentation(0, seed=1)], max_epochs=1).fit(module, data)
    assert states == [before]


class Dropped(Classifier):
    """Draws in each training step."""

    def __init__(self):
        super().__init__()
        self.backbone.append(nn.Dropout(0.5))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_ends_with_the_bits_of_one_without(shuffle):
    ends = []
    for tricks in ([], [InMemory()]):
        torch.manual_seed(3)
        module = Dropped()
        data, val = (DataLoader([*zip(*images(32, seed=seed), strict=True)], 8) for seed in (0, 1))
        data = DataLoader(data.dataset, 8, shuffle=shuffle)
        trainer(callbacks=tricks).fit(module, data, val)
        ends.append(weights(module))
    assert_same_weights(*ends)


def test_a_trick_that_chooses_samples_chooses_among_them():
    subset = SubsetTraining(0.5, method="random", stop_at=1.0, seed=1)
    module, _ = fit(DataLoader(numbers(), 2, shuffle=True), InMemory(), subset, max_epochs=3)
    assert len(module.seen) == 5 + 3 + 3
    assert len(set(chain(*read(module)[5:8]))) == 5


@pytest.mark.parametrize("before", [True, False])
def test_nobody_gives_workers_to_what_is_replaced(before, caplog):
    tricks = [LoaderTuning(max_workers=1), InMemory()]
    with caplog.at_level(logging.INFO):
        _, run = fit(DataLoader(numbers(), 2), *(tricks if before else reversed(tricks)))
    assert isinstance(run.train_dataloader, InMemoryLoader)
    assert "left as it is, since checkpoints hold its place" in caplog.text


# ---- random transforms


@pytest.mark.parametrize(
    "transform",
    [
        Compose([RandomCrop(28, padding=2), RandomHorizontalFlip(), ToTensor()]),
        Compose([Compose([RandomHorizontalFlip(0.3)]), RandomCrop((28, 28), (2, 2, 2, 2)), ToTensor()]),
        Compose((ToTensor(), RandomCrop(28, padding=[2]), RandomHorizontalFlip(0.5))),
        v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip(), ToTensor()]),
    ],
)
@pytest.mark.parametrize("below", [False, True])
def test_crops_and_flips_are_left_to_batches(transform, below, caplog):
    def augmentation():
        return BatchAugmentation(2, "zeros", seed=4)

    def data(transform):
        whole = mnist(transform)
        return DataLoader(Subset(whole, range(30)) if below else whole, 8)

    plain, _ = fit(data(ToTensor()), augmentation())
    with caplog.at_level(logging.INFO):
        module, _ = fit(data(transform), InMemory(), augmentation())
    assert_same(module.seen, plain.seen)
    assert "RandomHorizontalFlip(p=" in caplog.text
    assert "left to BatchAugmentation" in caplog.text


def test_an_alternating_flip_and_another_border_may_take_their_place():
    data = DataLoader(mnist(Compose([RandomCrop(28, padding=3), RandomHorizontalFlip(), ToTensor()])), 8)
    module, _ = fit(data, InMemory(), BatchAugmentation(2, flip="alternating", seed=4))
    plain, _ = fit(DataLoader(mnist(ToTensor()), 8), BatchAugmentation(2, flip="alternating", seed=4))
    assert_same(module.seen, plain.seen)


MOVED = Compose([RandomCrop(28, padding=2, padding_mode="reflect"), RandomHorizontalFlip(), ToTensor()])


@pytest.mark.parametrize(
    ("transform", "tricks"),
    [
        (MOVED, []),
        (MOVED, [BatchAugmentation(0)]),
        (MOVED, [BatchAugmentation(2, flip=None)]),
        (Compose([RandomHorizontalFlip(), ToTensor()]), [BatchAugmentation(2, flip=None)]),
    ],
)
def test_crops_and_flips_that_nobody_does_are_refused(transform, tricks):
    told = r"DataLoader: Random.*\(p=0.5\) would be missing\. Add a `BatchAugmentation`"
    with pytest.raises(MisconfigurationException, match=told):
        fit(DataLoader(mnist(transform), 8), InMemory(), *tricks)


@pytest.mark.parametrize("crop", [RandomCrop(24), RandomCrop(24, padding=2), v2.RandomCrop(20)], ids=str)
def test_crops_to_another_size_are_refused(crop):
    with pytest.raises(MisconfigurationException, match=r"without RandomCrop\(.*\) they have another size"):
        fit(DataLoader(mnist(Compose([crop, ToTensor()])), 8), InMemory(), BatchAugmentation(2))


def test_a_flip_outside_a_compose_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="RandomHorizontalFlip may make another one each time"):
        fit(DataLoader(mnist(RandomHorizontalFlip()), 8), InMemory(), BatchAugmentation(2))


def double(image):
    return image * 2


class Noisy(Dataset):
    def __init__(self, transform=None, transforms=None):
        self.transform, self.transforms = transform, transforms

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(3), index


def loader(data, **options):
    return DataLoader(data, 8, **options)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lambda: loader(mnist(Compose([ToTensor(), RandomErasing()]))), "RandomErasing may make another one each time"),
        (lambda: loader(mnist(Compose([ColorJitter(), ToTensor()]))), r'say so: `deterministic=\["ColorJitter"\]`'),
        (lambda: loader(mnist(nn.Sequential(v2.ToImage(), nn.ReLU()))), "ReLU may make"),
        (lambda: loader(mnist(double)), "double may make"),
        (lambda: loader(mnist(lambda image: image)), "<lambda> may make"),
        (lambda: loader(mnist(ToTensor(), target_transform=double)), "double may make"),
        (lambda: loader(Subset(Counted(), [1, 2])), "Counted may make another one each time"),
        (lambda: loader(ConcatDataset([numbers(), numbers()])), "ConcatDataset may make"),
        (lambda: loader(numbers(), collate_fn=double), "with torch's `collate_fn`"),
        (lambda: type("Own", (DataLoader,), {})(numbers(), 8), "Own may make"),
        (lambda: loader(Stream()), "it needs a DataLoader that makes batches of a map-style dataset"),
        (
            lambda: DataLoader(numbers(), None),
            "the samples of the DataLoader: it needs a DataLoader that makes batches",
        ),
        (lambda: Batches(images(8)), "cannot keep the samples of the Batches: it needs a DataLoader"),
        (lambda: loader([("a", 1), ("b", 2)]), "cannot keep the samples of the DataLoader: Expected `dataset`"),
        (lambda: loader([torch.ones(2)] * 9), "they are neither plain tuples nor dicts"),
        (
            lambda: loader([(torch.ones(2), (1, 2))] * 9),
            "cannot keep the samples of the DataLoader: Expected `dataset`",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_before_the_first_step(data, told):
    module = Seer()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[InMemory()]).fit(module, data())
    assert not module.seen


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        (
            lambda: Noisy(),
            {"deterministic": ["Noisy"]},
            "samples of the DataLoader: they are different when they are loaded twice",
        ),
        (lambda: Noisy(ToTensor(), ColorJitter()), {"deterministic": ["Noisy"]}, "ColorJitter may make"),
        (lambda: Counted(40, lambda x: (random.random(), x)[1]), {"deterministic": ["Counted"]}, "draw random numbers"),
        (lambda: Sized(), {"deterministic": ["Sized"]}, "cannot keep the samples of the DataLoader: .*equal size"),
        (lambda: mnist(ToTensor()), {"max_gib": 1e-6}, r"they need 0.000117 GiB. Give a larger `max_gib`"),
        (
            lambda: mnist(nn.Sequential(v2.RandomHorizontalFlip(), v2.ToImage())),
            {},
            "RandomHorizontalFlip may make",
        ),
    ],
)
def test_random_and_large_samples_are_refused_also_behind_a_trusted_name(data, options, told):
    with pytest.raises(MisconfigurationException, match=told):
        fit(loader(data()), InMemory(**options), BatchAugmentation())


def test_an_error_of_the_dataset_is_the_cause_of_the_refusal():
    def fail(image):
        raise KeyError("missing")

    with pytest.raises(MisconfigurationException, match="cannot keep the samples of the DataLoader") as caught:
        fit(loader(Counted(40, fail)), InMemory(deterministic=["Counted"]))
    assert isinstance(caught.value.__cause__, KeyError)


# ---- the rest


def test_a_validation_loader_that_does_not_fit_stays_as_it_is(caplog):
    val = loader(mnist(Compose([RandomHorizontalFlip(), ToTensor()])))
    with caplog.at_level(logging.INFO):
        _, run = fit(loader(mnist(ToTensor())), InMemory(), BatchAugmentation(2, seed=1), val=val, max_epochs=1)
    assert run.val_dataloaders is val
    assert isinstance(run.train_dataloader, InMemoryLoader)
    assert "A validation loader stays as it is: InMemory cannot keep the samples of the DataLoader" in caplog.text


def test_an_in_memory_loader_is_left_as_it_is():
    data = InMemoryLoader(numbers(), 2)
    _, run = fit(data, InMemory())
    assert run.train_dataloader is data


def test_loaders_that_are_made_anew_within_the_run_are_refused():
    with pytest.raises(MisconfigurationException, match=r"reload_dataloaders_every_n_epochs=1\) has them made anew"):
        fit(DataLoader(numbers(), 2), InMemory(), reload_dataloaders_every_n_epochs=1)


def test_each_of_several_loaders_is_replaced():
    def data():
        return {"one": DataLoader(numbers(), 2), "other": DataLoader(TensorDataset(*images(10)), 5)}

    plain, _ = fit(data())
    module, run = fit(data(), InMemory())
    assert all(isinstance(one, InMemoryLoader) for one in run.train_dataloader.values())
    for key in ("one", "other"):
        ours, theirs = ([batch[key] for batch in one.seen if batch[key] is not None] for one in (module, plain))
        assert_same(ours, theirs)


def test_workers_make_nothing_any_more():
    data = DataLoader(TensorDataset(*images(16)), 4, num_workers=1, persistent_workers=True)
    module, run = fit(data, InMemory(on_device=True))
    assert run.train_dataloader.num_workers == 0
    assert data._iterator is None
    assert_same(module.seen, [*DataLoader(TensorDataset(*images(16)), 4)] * 2)


@pytest.mark.parametrize("on_device", [True, False])
def test_pinned_memory_is_for_what_is_not_on_the_device_yet(on_device):
    says = nullcontext() if on_device else pytest.warns(UserWarning, match="'pin_memory' argument is set as true")
    with says:  # torch finds no GPU that it could be for
        fit(DataLoader(numbers(), 2, pin_memory=True), InMemory(on_device=on_device))


def test_samples_are_kept_on_the_device():
    run = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    for on_device in (True, False):
        rows = InMemory(on_device=on_device)._rows(run, DataLoader(numbers()))
        assert [one.is_meta for one in rows] == [on_device] * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_gib": -1}, "`max_gib` to be a number of 0 or more, but got -1"),
        ({"deterministic": "Counted"}, "`deterministic` to be a list of names, but got 'Counted'"),
        ({"deterministic": [Counted]}, "`deterministic` to be a list of names"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        InMemory(**arguments)
