"""What a loader's dataset can be asked for, and what cannot be had without a trace elsewhere."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.resizing import Growth
from lightning_speedups.tricks.batches.progressive_resizing.growth import SizesOverRun
from lightning_speedups.tricks.batches.progressive_resizing.loader_sizes import LoaderSizes, load_full
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


@dataclass
class Run:
    said: WarningCache = field(default_factory=WarningCache)


class Asks(Trick):
    """Wants images of half the side throughout, and loads some samples at full size in each epoch."""

    run_as = Run

    def __init__(self, evaluated=(), place=0, is_required=False, loads=True):
        super().__init__()
        sizes = SizesOverRun(self, Growth(grow_from=1.0, full_from=1.0, multiple=1), "batch")
        self.sizes = LoaderSizes(self, sizes, [place], is_required)
        self.grips = (sizes, self.sizes)
        self.sizes.evaluated += evaluated
        self.full, self.error, self.loads, self.loaded = None, None, loads, []

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.full = self.sizes.full
        if self.full is not None and self.loads:
            loader, settings = self.sizes.loader, self.sizes.settings
            self.loaded.append([load_full(trainer, loader, settings, samples) for samples in ([3, 1], [2])])

    def undo(self, trainer, pl_module):
        self.error = next(iter(self.run.said), self.error)
        super().undo(trainer, pl_module)


def asked(dataset, module=None, trick=None, **options):
    trick = trick or Asks()
    trainer(callbacks=[trick], max_epochs=2).fit(module or Classifier(), DataLoader(dataset, 4, **options))
    return trick


def test_a_size_that_can_be_set_is_tried_and_samples_can_be_had_at_full_size():
    dataset, module = Sized(), Classifier()
    trick = asked(dataset, module)
    assert trick.error is None
    assert trick.full == (8, 8)
    assert {tuple(inputs.shape) for inputs, _ in module.seen} == {(4, 2, 4, 4)}
    assert dataset.size == 8
    assert len(trick.loaded) == 2
    for (first, labels), (second, _) in trick.loaded:
        assert first[:, 0].tolist() == torch.stack([torch.full((8, 8), 3.0), torch.full((8, 8), 1.0)]).tolist()
        assert labels.tolist() == [3, 1]
        assert second.shape == (1, 2, 8, 8)


def test_asking_draws_no_random_numbers_of_the_run():
    def drawn(trick):
        torch.manual_seed(0)
        module = Classifier()
        trainer(callbacks=[trick] if trick else [], max_epochs=1).fit(module, DataLoader(Sized(), 4))
        return torch.get_rng_state()

    assert torch.equal(drawn(Asks(loads=False)), drawn(None))


def test_a_batch_gives_itself_at_full_size_where_the_loader_makes_full_images():
    batch = [torch.zeros(1)]
    assert Asks().sizes.at_full_size(None, batch)() is batch


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
    assert trick.full is None
    assert trick.error
    assert re.search(reason, trick.error)
    assert getattr(dataset, "size", 8) == 8


def test_it_refuses_where_it_is_required():
    with pytest.raises(MisconfigurationException, match=r"Asks\(in_loader=True\) cannot .* \(too small\)\. Use"):
        asked(Sized(least=6), trick=Asks(is_required=True))


def test_hooks_that_may_do_anything_to_the_images_are_a_reason():
    assert "on_after_batch_transfer" in asked(Sized(), Transfers()).error


def test_what_validation_uses_too_is_left_alone():
    dataset = Sized()
    assert "validation uses the same Sized" in asked(dataset, trick=Asks(evaluated=[dataset])).error
    assert asked(dataset, trick=Asks(evaluated=[Sized()])).error is None
