"""Images become floating point numbers on the device; batches are copied ahead where that is known to change nothing."""

import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lightning_speedups import BatchAugmentation, InMemoryLoader, LoaderTuning, PrefetchToDevice, SubsetTraining
from lightning_speedups.attach import ahead
from lightning_speedups.tricks.steps import loader_tuning, prefetch_to_device
from lightning_speedups.tricks.steps.prefetch_to_device import ON_CPU, reason_against, to_floats
from zoo import Classifier, Convolutions, assert_same_weights, images, photos, trainer, weights

COUNT = 32


def EXAMPLE():
    return {"callbacks": [PrefetchToDevice()]}


@pytest.fixture
def said(caplog):
    """Returns what was said of it."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "PrefetchToDevice" in record.getMessage()]


def data(dataset, **options):
    return DataLoader(dataset, **{"batch_size": 4, "shuffle": True, **options})


def fit(*callbacks, loader, val=None, module=Classifier, **arguments):
    torch.manual_seed(3)
    module = module()
    trainer(callbacks=[*callbacks], **arguments).fit(module, loader, val)
    return module


# ---- batches


def pairs():
    return [*zip(*images(COUNT), strict=True)]


def test_on_a_cpu_nothing_is_copied_and_it_says_so_once(said):
    ours = fit(PrefetchToDevice(), loader=data(pairs()))
    assert_same_weights(weights(ours), weights(fit(loader=data(pairs()))))
    assert said() == [f"PrefetchToDevice copies nothing ahead: {ON_CPU}."]


class Streams:
    """As many as a CPU has: none."""

    def Stream(self, device):
        return self

    def stream(self, which):
        return torch.no_grad()

    def current_stream(self, device):
        return self

    def wait_stream(self, which):
        pass


@pytest.fixture
def _as_if_on_cuda(monkeypatch):
    """Lets a CPU take the way of a CUDA device."""
    monkeypatch.setattr(ahead, "CUDA", Streams())
    monkeypatch.setattr(prefetch_to_device, "reason_against", lambda loader, device, owners: "")


@pytest.mark.usefixtures("_as_if_on_cuda")
@pytest.mark.parametrize("options", [{}, {"drop_last": True, "batch_size": 5}, {"batch_size": 20}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_batches_that_were_fetched_ahead_train_to_the_same_weights(options, workers, limit):
    arguments = {"limit_train_batches": limit, "max_epochs": 3}
    given = data(pairs(), num_workers=workers, **options)
    before = dict(vars(given))
    ours = fit(PrefetchToDevice(), loader=given, **arguments)
    plain = fit(loader=data(pairs(), num_workers=workers, **options), **arguments)
    assert_same_weights(weights(ours), weights(plain))
    assert [batch[0].shape for batch in ours.seen] == [batch[0].shape for batch in plain.seen]
    assert vars(given) == before


@pytest.mark.usefixtures("_as_if_on_cuda")
@pytest.mark.parametrize("first", [True, False])
def test_beside_loader_tuning_and_a_subset_the_samples_are_the_same(first, monkeypatch):
    monkeypatch.setattr(loader_tuning, "usable_cpus", lambda processes=1: 2)

    def run(*more):
        tricks = [*more, SubsetTraining(0.5, method="loss", stop_at=1.0, seed=5)]
        loader = data(pairs(), generator=torch.Generator().manual_seed(7))
        return fit(*tricks[:: 1 if first else -1], loader=loader, max_epochs=4)

    assert_same_weights(weights(run(PrefetchToDevice(), LoaderTuning())), weights(run()))


@pytest.mark.usefixtures("_as_if_on_cuda")
def test_an_error_leaves_no_hold():
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            raise LookupError("step")

    run = trainer(callbacks=[PrefetchToDevice(0.5)])
    with pytest.raises(LookupError, match="step"):
        run.fit(Fails(), data(pairs()))
    assert not {"process_dataloader", "batch_to_device"} & {*vars(run.strategy)}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs())


class Moves(LightningModule):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Sees(LightningDataModule):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


def pinned(dataset=None, **options):
    return DataLoader(dataset or pairs(), **{"num_workers": 1, "pin_memory": True, **options})


@pytest.mark.parametrize(
    ("loader", "device", "owners", "reason"),
    [
        (pinned(), "cuda", [LightningModule(), LightningDataModule()], ""),
        (pinned(), "cpu", [], "a CPU needs no copies"),
        (pinned(), "mps", [], "it copies to CUDA devices, and not to mps"),
        (pairs(), "cuda", [], "the loader is no plain DataLoader"),
        (pinned(Stream()), "cuda", [], "the loader is no plain DataLoader"),
        (InMemoryLoader(torch.zeros(4)), "cuda", [], "the loader is no plain DataLoader"),
        (pinned(pin_memory=False), "cuda", [], "no worker processes fill pinned memory"),
        (pinned(num_workers=0), "cuda", [], "no worker processes fill pinned memory"),
        (pinned(), "cuda", [Moves()], "`transfer_batch_to_device` is to see batches"),
        (pinned(), "cuda", [LightningModule(), Sees()], "`on_before_batch_transfer` is to see batches"),
    ],
)
def test_where_nothing_is_copied_ahead(loader, device, owners, reason):
    found = reason_against(loader, device, owners)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


# ---- bytes


MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]


class Pictures(Dataset):
    """Photos as PIL images, and what a transform makes of them."""

    def __init__(self, transform):
        self.photos, self.labels = photos(COUNT)
        self.transform = transform

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.transform(to_pil_image(self.photos[index])), self.labels[index]


class Stages(Convolutions):
    """Notes the types of its inputs in each stage, and knows nothing of bytes."""

    def __init__(self):
        super().__init__()
        self.kinds, self.found = {}, {}

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        self.kinds["train"] = batch[0].dtype
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.kinds["validate"] = batch[0].dtype
        self.found["validate"] = self(batch[0])

    def test_step(self, batch, batch_idx):
        self.kinds["test"] = batch[0].dtype

    def predict_step(self, batch, batch_idx):
        self.kinds["predict"] = batch[0].dtype
        return self(batch[0])


def to_bytes(image):
    return pil_to_tensor(image).contiguous()  # as ToTensor lays its images


def in_bytes():
    return data(Pictures(to_bytes), shuffle=False)


def in_floats():
    return data(Pictures(Compose([ToTensor(), Normalize(MEAN, STD)])), shuffle=False)


def test_bytes_become_what_torchvision_makes_of_them_to_the_bit_in_every_stage():
    ahead = fit(PrefetchToDevice(MEAN, STD), loader=in_bytes(), val=in_bytes(), module=Stages)
    plain = fit(loader=in_floats(), val=in_floats(), module=Stages)
    assert_same_weights(weights(ahead), weights(plain))
    assert torch.equal(ahead.found["validate"], plain.found["validate"])
    run = trainer(callbacks=[PrefetchToDevice(MEAN, STD)])
    run.test(ahead, in_bytes(), verbose=False)
    ours, theirs = run.predict(ahead, in_bytes()), trainer().predict(plain, in_floats())
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert ahead.kinds == dict.fromkeys(("train", "validate", "test", "predict"), torch.float32)
    assert "batch_to_device" not in vars(run.strategy)


def test_bytes_stay_bytes_unless_a_mean_is_given():
    ahead = fit(PrefetchToDevice(), loader=in_bytes(), module=Convolutions)
    assert_same_weights(weights(ahead), weights(fit(loader=in_bytes(), module=Convolutions)))


def test_floats_are_left_alone():
    ahead = fit(PrefetchToDevice(MEAN, STD), loader=in_floats(), module=Stages)
    assert_same_weights(weights(ahead), weights(fit(loader=in_floats(), module=Stages)))


@pytest.mark.parametrize(
    ("precision", "kind"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_images_have_the_type_that_the_precision_gives_to_floats(precision, kind):
    module = fit(PrefetchToDevice(0.5, 0.25), loader=in_bytes(), module=Stages, precision=precision, max_epochs=1)
    plain = fit(loader=in_floats(), module=Stages, precision=precision, max_epochs=1)
    assert module.kinds["train"] == plain.kinds["train"] == kind


def test_one_number_is_for_all_channels():
    bytes_ = photos(2)[0]
    one = to_floats(bytes_, torch.tensor(0.5), torch.tensor(0.25))
    each = to_floats(bytes_, torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    assert torch.equal(one, each)
    assert bytes_.dtype == torch.uint8


def test_tricks_on_batches_see_normalised_images():
    def run(loader, *callbacks):
        return fit(*callbacks, BatchAugmentation(crop=2, seed=1), loader=loader, module=Stages)

    ahead, plain = run(in_bytes(), PrefetchToDevice(MEAN, STD)), run(in_floats())
    assert_same_weights(weights(ahead), weights(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mean": 0.5, "inputs": 2},
            r"PrefetchToDevice\(inputs=2\) found no part 2 in a batch .*Name the right place: the batch has",
        ),
        (
            {"mean": [0.5, 0.5]},
            r"normalises each channel, but the images have the shape \(4, 3, 16, 16\)\. Give one number",
        ),
        ({"mean": 0.5, "std": [1.0, 1.0]}, r"normalises each channel, but the images have the shape"),
    ],
)
def test_other_places_and_channels_than_the_batch_has_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(PrefetchToDevice(**arguments), loader=in_bytes(), module=Stages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": 2.0}, r"Expected `mean` to be a number in \[0, 1\], but got 2.0"),
        ({"mean": [0.5, None]}, r"Expected `mean` to be a number in \[0, 1\], but got None"),
        ({"mean": 0.5, "std": 0.0}, r"Expected `std` to be a number above 0, but got 0.0"),
        ({"mean": 0.5, "std": [0.2, -1.0]}, r"Expected `std` to be a number above 0, but got -1.0"),
        ({"inputs": None}, r"Expected `inputs` to be an index"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefetchToDevice(**arguments)
