"""Each epoch's batches are of like length and within the budget, and everything else in the run knows of them."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from lightning_speedups import (
    EffectiveBatchSize,
    ExactResume,
    LengthBatches,
    LoaderTuning,
    OneCycleMomentum,
    SubsetTraining,
)
from lightning_speedups.attach.loaders import LoaderGrip
from lightning_speedups.attach.run_length import loader_batch_size
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.length_batches import into_buckets
from lightning_speedups.core.randomness import generator_for
from zoo import OrderOfEpoch, assert_same_weights, fit_interrupted, resume, trainer, weights

COUNT, BUDGET, SEED = 90, 120, 3


def EXAMPLE():
    return {"callbacks": [LengthBatches(lengths=[1 + 7 * number % 32 for number in range(32)], buckets=4, seed=3)]}


class Texts(Dataset):
    """Of a log-normal length, as text has; a text tells which of two tokens it has more often."""

    def __init__(self, count=COUNT):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.randn(count, generator=generator).mul(0.8).add(2.3).exp().clamp(1, 60).long().tolist()
        self.texts = [torch.randint(1, 9, (size,), generator=generator) for size in sizes]
        self.asked = 0

    @property
    def sizes(self):
        return [len(text) for text in self.texts]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        self.asked += 1
        return self.texts[index], index


class Told(Texts):
    """Knows its lengths."""

    @property
    def lengths(self):
        return self.sizes


def padded(samples):
    texts, numbers = zip(*samples, strict=True)
    return pad_sequence(texts, batch_first=True), torch.tensor(numbers)


def data(texts=None, **options):
    texts = Told() if texts is None else texts
    return DataLoader(texts, **{"batch_size": 8, "shuffle": True, "collate_fn": padded, **options})


class Reader(LightningModule):
    """Classifies texts; notes what it is given, and how long the run is said to be."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.drop, self.head = nn.Embedding(9, 6, padding_idx=0), nn.Dropout(dropout), nn.Linear(6, 2)
        self.seen, self.shapes, self.told, self.lengths = [], [], [], []

    def loss(self, texts):
        labels = ((texts == 1).sum(1) > (texts == 2).sum(1)).long()
        read = self.drop(self.tokens(texts)).sum(1) / (texts > 0).sum(1, keepdim=True)
        return F.cross_entropy(self.head(read), labels)

    def training_step(self, batch, batch_idx):
        texts, numbers = batch
        self.seen.append((self.current_epoch, numbers.tolist()))
        self.shapes.append(tuple(texts.shape))
        self.lengths.append(self.trainer.num_training_batches)
        return self.loss(texts)

    def configure_optimizers(self):
        self.told.append(self.trainer.estimated_stepping_batches)
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

    def of_epoch(self, epoch):
        return [numbers for other, numbers in self.seen if other == epoch]


def fit(trick=None, loader=None, module=None, callbacks=(), **arguments):
    module = module or Reader()
    trick = trick or LengthBatches(max_tokens=BUDGET, seed=SEED)
    run = trainer(callbacks=[*callbacks, trick], **arguments)
    run.fit(module, data() if loader is None else loader)
    return module, run


def planned(epochs=3, **options):
    lengths = torch.tensor(Texts().sizes, dtype=torch.float64)
    buckets = into_buckets(lengths, most=50, **({"max_tokens": BUDGET} | options))
    plans = [buckets.plan(generator_for(SEED, epoch)) for epoch in range(epochs)]
    return [(epoch, step[0].tolist()) for epoch, plan in enumerate(plans) for step in plan]


def test_a_fit_ends_where_a_plain_loop_over_the_planned_batches_ends():
    module, run = fit()
    by_hand, batches, texts = Reader(), planned(), Texts()
    assert module.seen == batches
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5, momentum=0.9)
    for _, batch in batches:
        optimizer.zero_grad()
        by_hand.loss(pad_sequence([texts.texts[number] for number in batch], batch_first=True)).backward()
        optimizer.step()
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(weights(module)[name], value)
    for epoch in range(3):
        assert sorted(number for batch in module.of_epoch(epoch) for number in batch) == [*range(COUNT)]
    assert len({tuple(map(tuple, module.of_epoch(epoch))) for epoch in range(3)}) == 3
    assert max(rows * columns for rows, columns in module.shapes) <= BUDGET
    assert run.global_step == len(batches)


def test_all_know_the_length_of_the_run_from_configure_optimizers_on():
    module, run = fit()
    steps = len(planned())
    assert steps % 3 == 0
    assert module.told == [steps]
    assert {*module.lengths} == {steps // 3}
    with_schedule, _ = fit(callbacks=[OneCycleMomentum(max_lr=0.5)])
    assert with_schedule.told == [steps]
    optimizer = with_schedule.optimizers()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    limited, run = fit(limit_train_batches=4, accumulate_grad_batches=2)
    assert limited.told == [6]
    assert run.global_step == 6
    assert limited.seen == [one for epoch in range(3) for one in [s for s in planned() if s[0] == epoch][:4]]


@pytest.mark.parametrize(
    ("options", "arguments", "drop_last"),
    [
        ({}, {"batch_size": 8}, False),
        ({"batch_size": 5}, {"batch_size": 5}, False),
        ({}, {"batch_size": 8, "drop_last": True}, True),
        ({"batch_size": 6, "max_tokens": BUDGET}, {"batch_size": 6, "max_tokens": BUDGET}, False),
    ],
)
def test_batches_have_the_loaders_size_or_the_one_given(options, arguments, drop_last):
    module, _ = fit(LengthBatches(**options, seed=SEED), data(drop_last=drop_last))
    assert module.seen == planned(**({"max_tokens": None} | arguments))
    if drop_last:
        assert {rows for rows, _ in module.shapes} == {8}
    else:
        assert max(rows for rows, _ in module.shapes) == arguments["batch_size"]


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_load_the_same_batches(options):
    assert fit(loader=data(**options))[0].seen == planned()


@pytest.mark.parametrize(
    "sampler", [SequentialSampler(range(COUNT)), OrderOfEpoch(COUNT), SubsetRandomSampler(range(COUNT))]
)
def test_any_sampler_that_hands_out_each_sample_once_is_replaced(sampler):
    assert fit(loader=data(shuffle=False, sampler=sampler))[0].seen == planned()
    batcher = BatchSampler(sampler, 8, False)
    assert fit(loader=DataLoader(Told(), batch_sampler=batcher, collate_fn=padded))[0].seen == planned()
    assert type(batcher) is BatchSampler


def test_lengths_are_told_given_or_measured_once():
    ways = {
        "told": (Told(), None),
        "measured": (Texts(), None),
        "by a function": (Texts(), lambda sample: len(sample[0])),
        "given": (Texts(), Texts().sizes),
        "a tensor": (Texts(), torch.tensor(Texts().sizes)),
    }
    for texts, lengths in ways.values():
        trick = LengthBatches(max_tokens=BUDGET, lengths=lengths, seed=SEED)
        assert fit(trick, data(texts))[0].seen == planned()
        first, texts.asked = texts.asked, 0
        assert fit(trick, data(texts))[0].seen == planned()
        assert texts.asked == 3 * COUNT  # those of the steps alone
        assert first == texts.asked + ((COUNT + 1) if texts is ways["measured"][0] or callable(lengths) else 0)


def test_a_split_of_a_dataset_that_tells_its_lengths_has_them_too():
    part, _ = random_split(Told(), [60, 30], generator=torch.Generator().manual_seed(0))
    module, _ = fit(loader=data(part))
    assert sorted(number for batch in module.of_epoch(0) for number in batch) == sorted(part.indices)
    assert max(rows * columns for rows, columns in module.shapes) <= BUDGET
    assert part.dataset.asked == 3 * 60


def test_measuring_draws_nothing():
    class Drops(Texts):
        def __getitem__(self, index):
            torch.rand(1)
            return super().__getitem__(index)

    ends = []
    for texts, lengths in ((Told(), None), (Texts(), None)):
        texts.__class__ = type("Drawing", (Drops, type(texts)), {})
        torch.manual_seed(7)
        module, _ = fit(LengthBatches(lengths=lengths), data(texts), Reader(dropout=0.5))
        ends.append(weights(module))
    assert_same_weights(*ends)


@pytest.mark.filterwarnings("ignore:ExactResume gives workers")
@pytest.mark.parametrize(
    ("stop", "exactly", "workers"),
    [(1, False, 0), (17, False, 0), (9, False, 1), (2, True, 0), (17, True, 0), (9, True, 1)],
)
def test_a_resumed_run_ends_with_the_same_bits(stop, exactly, workers):
    def tricks():
        return [LengthBatches(max_tokens=BUDGET, seed=None), *([ExactResume()] if exactly else [])]

    def loader():
        return data(num_workers=workers)

    dropout = 0.5 if exactly and not workers else 0.0
    torch.manual_seed(5)
    whole, half, rest = Reader(dropout), Reader(dropout), Reader(dropout)
    in_epoch = len(planned()) // 3
    stop = {17: in_epoch, 9: in_epoch + 2}.get(stop, stop)
    torch.manual_seed(5)
    trainer(callbacks=tricks()).fit(whole, loader())
    torch.manual_seed(5)
    fit_interrupted(half, loader(), stop, tricks())
    torch.manual_seed(6)
    resume(rest, loader(), tricks())
    assert [batch for _, batch in half.seen + rest.seen] == [batch for _, batch in whole.seen]
    assert_same_weights(weights(rest), weights(whole))


def test_a_resumed_run_whose_epochs_have_another_length_says_so():
    fit_interrupted(Reader(), data(), 3, [LengthBatches(max_tokens=BUDGET, seed=SEED)])
    with pytest.warns(UserWarning, match="some samples come again"):
        resume(Reader(), data(), [LengthBatches(max_tokens=2 * BUDGET, seed=SEED)])


class Module(LightningDataModule):
    """Makes its loader anew whenever it is asked."""

    def setup(self, stage):
        self.texts = Texts()

    def train_dataloader(self):
        return data(self.texts)


def test_a_data_module_that_makes_loaders_anew_is_served_and_its_dataset_measured_once():
    made = Module()
    assert fit(loader=made, reload_dataloaders_every_n_epochs=1)[0].seen == planned()
    assert made.texts.asked == 1 + (1 + 3) * COUNT


class Looks(Trick):
    """Asks which samples are in each batch, as other tricks do."""

    def __init__(self):
        super().__init__()
        self.loader = LoaderGrip(self)
        self.grips, self.told = (self.loader,), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.told.append((trainer.current_epoch, self.loader.rows_of_batch()))


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_other_tricks_know_the_samples_of_each_batch(options):
    looks = Looks()
    module, _ = fit(loader=data(**options), callbacks=[looks])
    assert module.seen == looks.told == planned()
    fit_interrupted(Reader(), data(**options), 5, [LengthBatches(max_tokens=BUDGET, seed=SEED)])
    rest, looks = Reader(), Looks()
    resume(rest, data(**options), [looks, LengthBatches(max_tokens=BUDGET, seed=SEED)])
    assert rest.seen == looks.told == planned()[5:]


def test_a_tuner_has_its_trial_and_the_run_its_batches():
    module = Reader()
    module.hparams.lr = module.lr = 0.1
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    fit(module=module, callbacks=[finder])
    assert len(module.seen) == 4 + len(planned())
    assert module.seen[4:] == planned()


def test_the_loader_is_given_back_also_after_a_failure():
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise KeyError

    def held(owner):  # but what Lightning notes for good after a failure in somebody's `train_dataloader`
        return {name: value for name, value in vars(owner).items() if not name.startswith(("_iterator", "__pl_"))}

    for options in ({}, {"num_workers": 1, "persistent_workers": True}):
        for callbacks in ([], [Fails()], [LoaderTuning()]):
            loader, trick = data(**options), LengthBatches(max_tokens=BUDGET)
            run = trainer(callbacks=[trick, *callbacks], max_epochs=1)
            before = held(loader)
            parts = held(loader.batch_sampler)
            if callbacks and isinstance(callbacks[0], Fails):
                with pytest.raises(KeyError):
                    run.fit(Reader(), loader)
            else:
                run.fit(Reader(), loader)
            assert held(loader) == before
            assert held(loader.batch_sampler) == parts
            assert type(loader.batch_sampler) is BatchSampler
            assert patched(run) == set()
            assert [len(numbers) for _, numbers in loader] == [8] * 11 + [2]
            assert trick.run.buckets is None
            module = Reader()
            trainer(max_epochs=1).fit(module, loader)
            assert [len(numbers) for _, numbers in module.seen] == [8] * 11 + [2]
            del loader


def test_one_line_says_what_was_padding_and_little_of_it_is_warned_of(caplog):
    def share(batches):
        sizes = Texts().sizes
        full = sum(len(batch) * max(sizes[number] for number in batch) for batch in batches)
        return 1 - sum(sizes[number] for batch in batches for number in batch) / full

    trick = LengthBatches(max_tokens=BUDGET, seed=SEED)
    assert trick.padding is trick.padding_before is None
    with caplog.at_level(logging.INFO):
        module, _ = fit(trick)
    (told,) = {line for line in caplog.messages if line.startswith("LengthBatches")}
    assert told.startswith(f"LengthBatches: padding {trick.padding_before:.0%} → {trick.padding:.0%}, ")
    assert f", {len(planned()) // 3} batches an epoch, of {round(3 * COUNT / len(planned()))} samples" in told
    assert trick.padding == pytest.approx(share(module.of_epoch(0)), abs=0.05)
    assert trick.padding_before > 0.4 > 0.3 > trick.padding
    even = LengthBatches(lengths=[10] * COUNT, seed=SEED)
    with pytest.warns(UserWarning, match=r"padding 0% → 0%: there is little to gain\. Leave it out"):
        fit(even)
    assert even.padding == even.padding_before == 0.0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("own", "count"), [(None, COUNT), (16, COUNT), (None, 17)])
def test_steps_of_several_batches_are_as_many_as_they_were(own, count, first):
    trick, steps = LengthBatches(batch_size=own, seed=SEED), EffectiveBatchSize(2 * (own or 8))
    module, run = Reader(), trainer(callbacks=[trick, steps] if first else [steps, trick])
    run.fit(module, data(Told(count)))
    in_epoch = len(module.of_epoch(0))
    assert in_epoch > count / (own or 8)  # which is not the mean size
    assert module.told == [run.global_step] == [3 * math.ceil(in_epoch / 2)]


def test_steps_of_so_many_samples_are_refused_where_tokens_limit_the_batches():
    with pytest.raises(MisconfigurationException, match=r"one size, but LengthBatches .* `Trainer\(accumulate_grad_ba"):
        fit(callbacks=[EffectiveBatchSize(24)])
    module, run = fit(accumulate_grad_batches=2)
    assert module.told == [run.global_step] == [3 * math.ceil(len(planned()) / 3 / 2)]


def test_the_mean_size_of_batches_that_tokens_limit_is_told():
    told = Looks()
    told.on_train_start = lambda run, module: setattr(told, "size", loader_batch_size(run))
    module, _ = fit(callbacks=[told])
    assert told.size == round(3 * COUNT / len(module.seen))


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Told()[number] for number in range(8))


class OwnBatches(BatchSampler):
    def __iter__(self):
        yield from super().__iter__()


def weighted():
    return WeightedRandomSampler([1.0] * COUNT, COUNT)


@pytest.mark.parametrize(
    ("trick", "loader", "told"),
    [
        ({}, lambda: DataLoader(Stream(), 8, collate_fn=padded), "needs one training DataLoader over a map-style"),
        ({}, lambda: [data(), data()], "needs one training DataLoader over a map-style"),
        (
            {},
            lambda: DataLoader(Told(), batch_sampler=OwnBatches(RandomSampler(Told()), 8, False), collate_fn=padded),
            "batched by torch's own BatchSampler. Give the DataLoader `batch_size=`",
        ),
        ({}, lambda: data(shuffle=False, sampler=weighted()), "WeightedRandomSampler does not. Use `shuffle=True`"),
        ({}, lambda: data(shuffle=False, sampler=RandomSampler(Told(), True)), "RandomSampler does not"),
        ({}, lambda: data(shuffle=False, sampler=SubsetRandomSampler(range(40))), "SubsetRandomSampler does not"),
        ({"max_tokens": 50}, data, r"no sample above 50, but got 60 for sample \d+\. Give smaller batches or a larger"),
        ({"lengths": [1, 2]}, data, r"have 90 numbers, one a sample, but got 2\. Give `lengths=`: a function"),
        ({"lengths": lambda sample: sample.size}, data, "'tuple' object has no attribute 'size'. Give `lengths=`"),
        ({}, lambda: data(["one", "three"]), "a str has neither `input_ids` nor a tensor or a list of numbers"),
        ({"batch_size": 100}, lambda: data(drop_last=True), "a batch in each of 1 processes, but got 90 in batches of"),
    ],
)
def test_what_cannot_be_made_into_batches_is_refused_at_fit_start_with_a_way_out(trick, loader, told):
    module = Reader()
    with pytest.raises(MisconfigurationException, match=told):
        fit(LengthBatches(**trick), loader(), module)
    assert not module.seen


def test_what_chooses_samples_too_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"LengthBatches makes the batches .* and so does SubsetTraining"
    ):
        fit(callbacks=[SubsetTraining()])
    with pytest.raises(MisconfigurationException, match="`overfit_batches` wants the same"):
        fit(overfit_batches=2, loader=data(shuffle=False))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"batch_size": 0}, "`batch_size` to be a whole number of 1 or more, or None, but got 0"),
        ({"max_tokens": 0}, "`max_tokens` to be a number above 0, or None, but got 0"),
        ({"buckets": 0.5}, "`buckets` to be a whole number of 1 or more, but got 0.5"),
        ({"seed": 0.5}, "`seed` to be a whole number"),
        ({"lengths": 5}, "`lengths` to be a function, numbers or None, but got 5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        LengthBatches(**arguments)
