"""The trial of a `collate_fn`: which are found to move samples, which are let be, and that a run does not notice it."""

import random
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from lightning_speedups import BatchAugmentation, FeatureCache, InMemoryLoader, SubsetTraining
from lightning_speedups.tensors.rows import TRIED, follows, keeps_rows
from zoo import trainer


class Sentences(Dataset):
    """Of 1 to 7 tokens, drawn anew each time, as a random transform would; with a label and a name."""

    def __init__(self, count=24):
        self.lengths = torch.randint(1, 8, (count,), generator=torch.Generator().manual_seed(1)).tolist()
        self.taken = []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        self.taken.append(index)
        tokens = torch.randint(1, 99, (self.lengths[index],))
        return {"tokens": tokens, "label": index % 3, "name": f"sentence {index}"}


def in_order(samples):
    tokens = [sample["tokens"] for sample in samples]
    return {
        "tokens": pad_sequence(tokens, batch_first=True),
        "lengths": torch.tensor([len(one) for one in tokens]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }


def time_first(samples):
    batch = in_order(samples)
    return batch["tokens"].t(), batch["label"]


def takes_apart(samples):
    tokens = [sample.pop("tokens") for sample in samples]
    return pad_sequence(tokens, batch_first=True), default_collate(samples)


def masks_at_random(samples):
    tokens = in_order(samples)["tokens"]
    hidden = torch.rand(tokens.shape) < 0.5
    places = torch.arange(len(samples))  # which are the same, whatever the samples
    return {"tokens": tokens.masked_fill(hidden, 0), "targets": tokens.masked_fill(~hidden, -100), "row": places}


def mixes_half_of_the_time(samples):
    images, share = F.one_hot(torch.tensor([sample["label"] for sample in samples]), 3).float(), torch.rand(())
    return images if random.random() < 0.5 else share * images + (1 - share) * images.roll(1, 0), torch.ones(8)


def graph(samples):
    batch = type("Batch", (), {})()
    batch.nodes = torch.cat([sample["tokens"] for sample in samples])
    batch.of = torch.cat([torch.full_like(sample["tokens"], row) for row, sample in enumerate(samples)])
    batch.store = UserDict(label=torch.tensor([sample["label"] for sample in samples]))
    return batch


def offsets(samples):
    lengths = in_order(samples)["lengths"]
    return torch.cat([sample["tokens"] for sample in samples]), lengths.cumsum(0) - lengths


RIGHT = {
    "padded": in_order,
    "time first": time_first,
    "objects": lambda samples: tuple(zip(*[(sample["tokens"], sample["name"]) for sample in samples], strict=True)),
    "arrays": lambda samples: {"x": in_order(samples)["tokens"].numpy()},
    "as it is": lambda samples: samples,
    "taken apart": takes_apart,
    "packed": lambda samples: pack_padded_sequence(*[*in_order(samples).values()][:2], True, enforce_sorted=False),
    "masked at random": masks_at_random,
    "mixed": mixes_half_of_the_time,
    "a graph": graph,
    "a bag": offsets,
    "a square": lambda samples: torch.cdist(in_order(samples)["tokens"].float(), in_order(samples)["tokens"].float()),
    "fails": lambda samples: 1 / 0,
    "one sample fewer": lambda samples: in_order(samples[1:]),  # the batch's size will tell
}


def by_length(samples):
    return in_order(sorted(samples, key=lambda sample: -len(sample["tokens"])))


def with_places(samples):
    return {**by_length(samples), "row": torch.arange(len(samples)), "same": torch.zeros(len(samples), 2)}


def shuffles(samples):
    return in_order(random.sample(samples, len(samples)))


WRONG = {
    "sorts": by_length,
    "sorts in place": lambda samples: samples.sort(key=lambda sample: -len(sample["tokens"])) or in_order(samples),
    "sorts, and counts": with_places,
    "shuffles": shuffles,
    "twice the first half": lambda samples: in_order(samples[: len(samples) // 2] * 2),
    "others in the place of the short": lambda samples: in_order([*[s for s in samples if s["label"]], *samples][: len(samples)]),
    "only the first": lambda samples: in_order(samples[:1] * len(samples)),
}  # fmt: skip


@pytest.mark.parametrize("collate", RIGHT)
def test_what_keeps_the_order_or_does_not_show_it_is_let_be(collate):
    for seed in range(5):
        random.seed(seed)
        torch.manual_seed(seed)
        assert keeps_rows(DataLoader(Sentences(), 4, collate_fn=RIGHT[collate]))


@pytest.mark.parametrize("collate", WRONG)
def test_what_moves_samples_is_found(collate):
    for seed in range(5):
        random.seed(seed)
        torch.manual_seed(seed)
        assert not keeps_rows(DataLoader(Sentences(), 4, collate_fn=WRONG[collate]))


def test_a_few_samples_are_loaded_once_and_none_where_torch_collates():
    data = Sentences(100)
    keeps_rows(DataLoader(data, 4, collate_fn=in_order))
    assert len(data.taken) == len(set(data.taken)) == TRIED
    keeps_rows(DataLoader(data, 4))
    assert len(data.taken) == TRIED
    assert keeps_rows(InMemoryLoader([torch.arange(9)] * TRIED, 4, shuffle=True))


def test_a_batch_of_one_sample_has_nothing_to_move():
    data = Sentences()
    assert keeps_rows(DataLoader(data, 1, collate_fn=by_length))
    assert not data.taken


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_where_workers_make_the_batches_a_worker_tries():
    class Elsewhere(Sentences):
        def __getitem__(self, index):
            assert get_worker_info() is not None
            return super().__getitem__(index)

    data = Elsewhere()
    assert keeps_rows(DataLoader(data, 4, collate_fn=in_order, num_workers=2))
    assert not keeps_rows(DataLoader(data, 4, collate_fn=by_length, num_workers=2))
    assert not data.taken


def turns(samples):
    """Turns images at random, and asks by how much: there are no other labels."""
    turned = torch.randint(4, (len(samples),))
    images = [torch.rot90(torch.eye(3) + row, int(quarter)) for row, quarter in enumerate(turned)]
    return torch.stack(images) * len(samples[0]["tokens"]), turned


def adds_noise(samples):
    labels = torch.tensor([sample["label"] for sample in samples])
    steps = torch.randint(4, (len(samples),))
    return labels.unsqueeze(1) + steps.unsqueeze(1) * torch.rand(len(samples), 5), steps


def lists(samples):
    """Of what detectors take: some of a sample's tensors are as long as the list."""
    boxes = [sample["label"] + torch.arange(TRIED) % (1 + sample["label"]) for sample in samples]
    return tuple(boxes), [{"label": one, "size": one[:1]} for one in boxes]


@pytest.mark.parametrize("collate", [turns, adds_noise, lists])
def test_few_values_are_not_taken_for_rows_in_other_places(collate):
    torch.manual_seed(0)
    assert all(keeps_rows(DataLoader(Sentences(), 4, collate_fn=collate)) for _ in range(100))


def test_batches_that_are_not_alike_show_nothing():
    two, one, places = torch.tensor([5, 3]), torch.tensor([5]), torch.tensor([1, 0])
    assert follows([two, one] * 2, 2) is follows([places] * 4, 2) is None
    assert follows([two] * 4, 2) is False
    parts = iter(range(1, 5))
    assert keeps_rows(
        DataLoader(Sentences(), 4, collate_fn=lambda samples: [by_length(samples) for _ in range(next(parts))])
    )


def test_a_batch_that_holds_itself_is_let_be():
    def around(samples):
        batch = by_length(samples)
        return {**batch, "all": batch.setdefault("all", [batch])}

    assert keeps_rows(DataLoader(Sentences(), 4, collate_fn=around))


class Length(LightningModule):
    """The loss of a sample is its length, whatever is learnt."""

    def __init__(self):
        super().__init__()
        self.zero, self.drawn = nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.drawn.append(batch["tokens"])
        lengths = batch["lengths"].float()
        return F.l1_loss(self.zero + lengths, torch.zeros_like(lengths))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


TRICKS = {
    "SubsetTraining": lambda: SubsetTraining(0.5, seed=1),
    'BatchAugmentation(flip="alternating")': lambda: BatchAugmentation(0, flip="alternating", inputs="tokens"),
    "FeatureCache": lambda: FeatureCache(inputs="tokens"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_that_read_rows_refuse_it_before_the_first_step(trick):
    module = Length()
    with pytest.raises(MisconfigurationException) as error:
        trainer(callbacks=[TRICKS[trick]()]).fit(module, DataLoader(Sentences(), 4, collate_fn=by_length))
    assert str(error.value).startswith(f"{trick} knows samples by their places in a batch")
    assert "enforce_sorted=False" in str(error.value)
    assert not module.drawn


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_sample_has_its_own_loss_and_a_run_draws_what_it_would_without_the_trial(shuffle, monkeypatch):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        data, module, subset = Sentences(), Length(), SubsetTraining(0.5, stop_at=1.0, seed=1)
        run = trainer(callbacks=[subset], max_epochs=3)
        run.fit(module, DataLoader(data, 4, collate_fn=in_order, shuffle=shuffle))
        assert subset.saved.losses.tolist() == data.lengths
        runs.append((module.drawn, data.taken))
        monkeypatch.setattr("lightning_speedups.attach.loaders.keeps_rows", lambda loader: True)
    assert len(runs[0][1]) == len(runs[1][1]) + TRIED
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))


def test_a_random_choice_needs_no_rows():
    module = Length()
    run = trainer(callbacks=[SubsetTraining(0.5, method="random", seed=1)], max_epochs=4)
    run.fit(module, DataLoader(Sentences(), 4, collate_fn=by_length))
    assert run.global_step == 6 + 3 + 3 + 6


def test_a_reloaded_loader_is_tried_again_if_it_collates_otherwise():
    class Reloads(Length):
        def train_dataloader(self):
            return DataLoader(data, 4, collate_fn=in_order if self.trainer.current_epoch < 2 else by_length)

    module, data = Reloads(), Sentences()
    run = trainer(callbacks=[SubsetTraining(0.5, seed=1)], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(MisconfigurationException, match="knows samples by their places"):
        run.fit(module)
    assert len(module.drawn) == 6 + 3
    assert len(data.taken) == 24 + 12 + 2 * TRIED
