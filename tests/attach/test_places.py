"""A place tells what is done of an epoch, and with what it was drawn; between epochs there is nothing to tell."""

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, RandomSampler

from lightning_speedups.attach.places import PlaceGrip
from lightning_speedups.attach.trick import Trick
from lightning_speedups.tricks.steps.exact_resume import Places
from zoo import Classifier, loader, trainer


class Stands(Trick):
    """Notes its places."""

    saved_as = Places

    def __init__(self):
        super().__init__()
        self.place = PlaceGrip(self)
        self.grips = (self.place,)
        self.notes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.place.begin_batch()

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        self.notes += self.place.places()


def test_a_place_tells_the_batches_of_the_epoch_and_the_samples_that_it_was_drawn_with():
    trick = Stands()
    assert not trick.place.is_under_way
    trainer(callbacks=[trick], max_epochs=2).fit(Classifier(), loader())
    assert [(note["batches"], note["in_epoch"]) for note in trick.notes] == [(1, 4), (2, 4), (3, 4), (0, 4)] * 2
    drawn = [None if note["drawn"] is None else note["drawn"].tolist() for note in trick.notes]
    assert drawn == [*[list(range(32))] * 3, None] * 2
    assert not trick.place.is_under_way


def test_the_generators_are_those_of_the_loader_its_sampler_and_what_lightning_has_wrapped():
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    data = loader().dataset
    wrapped = DistributedSamplerWrapper(RandomSampler(data, generator=other), num_replicas=1, rank=0)
    for options, generators in (
        ({}, []),
        ({"shuffle": True}, []),
        ({"shuffle": True, "generator": one}, [one, one]),
        ({"sampler": RandomSampler(data, generator=other)}, [other]),
        ({"generator": one, "sampler": wrapped}, [one, other]),
    ):
        trick = Stands()
        trainer(callbacks=[trick], max_epochs=1).fit(Classifier(), DataLoader(data, 8, **options))
        last = trick.notes[-1]["states"]["generators"]
        assert [state.tolist() for state in last] == [one.get_state().tolist() for one in generators]
