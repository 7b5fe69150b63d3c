"""What a loader's dataset can be asked for, and what cannot be had without a trace elsewhere."""

import re

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.attach.image_sizes import ask_for_sizes, full_batches
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.dataset_sizes import UnknownSizeError
from zoo import Classifier, trainer


class Sized(Dataset):
    """Images of the size asked for; each draws from the global random numbers, and holds its own number."""

    def __init__(self, size=8, least=0):
        self.size, self.least = size, least

    def __len__(self):
        return 16

    def __getitem__(self, i):
        if self.size < self.least:
            raise RuntimeError("too small")
        torch.rand(1)
        return torch.full((2, self.size, self.size), float(i)), i % 4


class Asking(LoaderGrip):
    def change_loader(self, trainer, loader, epoch):
        self.trick.ask(trainer, loader)


class Asks(Trick):
    """Asks before the first epoch, and loads some samples at full size in each epoch."""

    def __init__(self, smallest=4, evaluated=(), place=0):
        super().__init__()
        self.smallest, self.evaluated, self.place = smallest, evaluated, place
        self.settings, self.error, self.loaded, self.states = None, None, [], []
        self.grips = (Asking(self),)

    def ask(self, trainer, loader):
        if self.settings is not None or self.error is not None:
            return
        self.loader = loader
        try:
            self.settings = ask_for_sizes(
                self.grips[0],
                trainer,
                loader,
                [self.place],
                lambda full: (self.smallest, self.smallest),
                self.evaluated,
            )
        except UnknownSizeError as error:
            self.error = str(error)

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        if self.settings is not None:
            self.settings.set_size((4, 4))
            before = torch.get_rng_state()
            self.loaded.append(full_batches(trainer, self.loader, self.settings, (4, 4), [[3, 1], [2]]))
            self.states.append(torch.equal(before, torch.get_rng_state()))

    def undo(self, trainer, pl_module):
        if self.settings is not None:
            self.settings.restore()
        super().undo(trainer, pl_module)


def asked(dataset, module=None, trick=None, **options):
    trick = trick or Asks()
    trainer(callbacks=[trick], max_epochs=2).fit(module or Classifier(), DataLoader(dataset, 4, **options))
    return trick


def test_a_size_that_can_be_set_is_tried_and_samples_can_be_had_at_full_size():
    dataset, module = Sized(), Classifier()
    trick = asked(dataset, module)
    assert trick.error is None
    assert trick.settings.full == (8, 8)
    assert {tuple(inputs.shape) for inputs, _ in module.seen} == {(4, 2, 4, 4)}
    assert dataset.size == 8
    assert trick.states == [True, True]
    for (first, labels), (second, _) in trick.loaded:
        assert first[:, 0].tolist() == torch.stack([torch.full((8, 8), 3.0), torch.full((8, 8), 1.0)]).tolist()
        assert labels.tolist() == [3, 1]
        assert second.shape == (1, 2, 8, 8)


class Transfers(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


@pytest.mark.parametrize(
    ("dataset", "options", "trick", "reason"),
    [
        (Sized(least=6), {}, Asks(), r"no sample of size \(4, 4\) could be had \(too small\)"),
        (Sized(), {}, Asks(place=1), "asked for images of size"),
        (Sized(), {}, Asks(place="image"), "could be had"),
        (Sized(), {"num_workers": 1, "persistent_workers": True}, Asks(), "persistent_workers"),
        (torch.utils.data.TensorDataset(torch.zeros(8, 2, 8, 8), torch.zeros(8).long()), {}, Asks(), ""),
    ],
)
def test_it_says_why_not(dataset, options, trick, reason):
    asked(dataset, trick=trick, **options)
    assert trick.settings is None
    assert trick.error
    assert re.search(reason, trick.error)
    assert getattr(dataset, "size", 8) == 8


def test_hooks_that_may_do_anything_to_the_images_are_a_reason():
    assert "on_after_batch_transfer" in asked(Sized(), Transfers()).error


def test_what_validation_uses_too_is_left_alone():
    dataset = Sized()
    assert "validation uses the same Sized" in asked(dataset, trick=Asks(evaluated=[dataset])).error
    assert asked(dataset, trick=Asks(evaluated=[Sized()])).error is None
