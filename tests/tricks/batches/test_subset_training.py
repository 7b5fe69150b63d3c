"""Which samples an epoch has, what they count, and that everything else in the run is as it would be."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_speedups import LabelSmoothingLoss, MixupCallback, OneCycleMomentum, SubsetTraining, mean_over_samples
from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.core.schedules import OneCycle
from lightning_speedups.core.subsets import draw_hard, draw_unbiased, draw_uniform
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    OrderOfEpoch,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    images,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [SubsetTraining(keep=0.7, seed=3)]}


class Numbered(Classifier):
    """Gets each sample's number as a third part, and keeps all losses."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.numbers, self.own, self.epochs = [], [], []

    def training_step(self, batch, batch_idx):
        *batch, numbers = batch
        with torch.no_grad():
            was = {name: value.clone() for name, value in self.named_buffers()}
            own = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1], reduction="none")
            for name, buffer in self.named_buffers():
                buffer.copy_(was[name])
        self.numbers.append(numbers.tolist())
        self.own.append(own)
        self.epochs.append(self.trainer.current_epoch)
        return super().training_step(batch, batch_idx)

    def of_epoch(self, epoch):
        places = [i for i, other in enumerate(self.epochs) if other == epoch]
        return [n for i in places for n in self.numbers[i]], torch.cat([self.own[i] for i in places])


def numbered(count=32):
    return TensorDataset(*images(count), torch.arange(count))


def replay(count=32, **options):
    options = {"sampler": OrderOfEpoch(count), "batch_size": 8, **options}
    return DataLoader(numbered(count), **options)


def order_of(epoch, count=32):
    sampler = OrderOfEpoch(count)
    sampler.set_epoch(epoch)
    return list(sampler)


def fit(module=None, data=None, max_epochs=5, subset=None, callbacks=(), **arguments):
    module, subset = module or Numbered(), subset or SubsetTraining(keep=0.7, seed=3)
    run = trainer(callbacks=[subset, *callbacks], max_epochs=max_epochs, **arguments)
    run.fit(module, data or replay())
    return module, subset, run


DRAWS = {
    "infobatch": lambda losses, kept, g: draw_unbiased(losses, kept, g, 0.5),
    "random": draw_uniform,
    "loss": draw_hard,
}


@pytest.mark.parametrize("method", DRAWS)
def test_each_epoch_has_the_samples_drawn_from_the_last_losses_in_the_samplers_order(method):
    module, subset, _ = fit(subset=SubsetTraining(keep=0.7, method=method, seed=3), max_epochs=6)
    losses = torch.full((32,), math.nan)
    for epoch in range(6):
        order = order_of(epoch)
        if epoch not in (0, 5):  # 0.875 of 6 is 5.25
            places, _ = DRAWS[method](losses[order], 22, generator_for(3, 0, epoch, BatchOrder.LOOK))
            order = [order[place] for place in places.tolist()]
        numbers, own = module.of_epoch(epoch)
        assert numbers == order
        losses[numbers] = own
    assert subset.mean_loss == (None if method == "random" else pytest.approx(float(losses.mean()), rel=1e-6))
    assert subset.samples_saved == 4 * 10
    assert subset.kept == 1.0


def test_infobatch_weighs_the_low_ones_in_each_step():
    module, *_ = fit(max_epochs=3, subset=SubsetTraining(keep=0.7, stop_at=1.0, max_drop=0.75, seed=3))
    first = torch.empty(32)
    numbers, own = module.of_epoch(0)
    first[numbers] = own
    order = order_of(1)
    drawn = draw_unbiased(first[order], 22, generator_for(3, 0, 1, BatchOrder.LOOK), 0.75).weights
    count = torch.ones(32)
    count[order] = drawn
    steps = [i for i, epoch in enumerate(module.epochs) if epoch == 1]
    assert len(steps) == 3
    for i in steps:
        expected = (count[module.numbers[i]] * module.own[i]).mean()
        assert module.losses[i] == pytest.approx(float(expected), rel=1e-5)
    low = first < first.mean()
    assert torch.equal(count > 1, low)
    assert float(count.max()) == pytest.approx(int(low.sum()) / (int(low.sum()) - 10))


@pytest.mark.parametrize("method", ["random", "loss"])
def test_the_other_methods_count_each_sample_once(method):
    module, *_ = fit(subset=SubsetTraining(keep=0.7, method=method, seed=3))
    assert module.losses == pytest.approx([float(own.mean()) for own in module.own], rel=1e-6)


def test_with_all_kept_a_run_ends_with_the_same_bits():
    plain, kept = Numbered(), Numbered()
    kept.load_state_dict(plain.state_dict())
    trainer(max_epochs=3).fit(plain, replay())
    fit(kept, subset=SubsetTraining(keep=1.0, seed=3), max_epochs=3)
    assert plain.losses == kept.losses
    assert_same_weights(weights(plain), weights(kept))


@pytest.mark.parametrize(
    ("stop_at", "epochs", "shortened"),
    [(0.875, 8, range(1, 7)), (0.875, 3, range(1, 2)), (1.0, 4, range(1, 4)), (0.0, 4, ()), (0.5, 5, range(1, 2))],
)
def test_the_first_epoch_and_the_last_ones_are_full(stop_at, epochs, shortened):
    module, *_ = fit(max_epochs=epochs, subset=SubsetTraining(keep=0.5, stop_at=stop_at, seed=3))
    assert [len(module.of_epoch(epoch)[0]) for epoch in range(epochs)] == [
        16 if epoch in shortened else 32 for epoch in range(epochs)
    ]


@pytest.mark.parametrize("seed", [3, None])
def test_the_draws_depend_on_the_seed_alone(seed):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(fit(subset=SubsetTraining(seed=seed))[0].numbers)
    torch.manual_seed(5)
    other = fit(subset=SubsetTraining(seed=4))[0].numbers
    assert runs[0] == runs[1] != other


def parted(step, make=Numbered, data=lambda: ReplayNumbered(), epochs=5, subset=None, epoch_end=False, **arguments):
    subset = subset or (lambda: SubsetTraining(keep=0.7, seed=None))
    torch.manual_seed(2)
    whole = make()
    half, rest = copy.deepcopy(whole), copy.deepcopy(whole)
    trick = subset()
    trainer(callbacks=[trick], max_epochs=epochs, **arguments).fit(whole, data())
    torch.manual_seed(2)
    fit_interrupted(half, data(), step, [subset()], epoch_end, max_epochs=epochs, **arguments)
    torch.manual_seed(99)
    again = subset()
    resume(rest, data(), [again], max_epochs=epochs, **arguments)
    return (whole, trick), (half, None), (rest, again)


class ReplayNumbered(ReplayLoader):
    def __init__(self, **options):
        DataLoader.__init__(self, numbered(), **{"batch_size": 8, "sampler": OrderOfEpoch(32), **options})
        self.position = 0


# Epochs of 4, 3, 3, 3 and 4 batches end after 4, 7, 10, 13 and 17 steps.
@pytest.mark.parametrize("step", [1, 5, 10, 13, 16])
def test_a_resumed_run_goes_on_bit_for_bit(step):
    (whole, trick), (half, _), (rest, again) = parted(step)
    assert len(whole.losses) == 17
    assert half.numbers + rest.numbers == whole.numbers
    assert half.losses + rest.losses == whole.losses
    assert_same_weights(weights(whole), weights(rest))
    assert (trick.samples_saved, trick.mean_loss) == (again.samples_saved, again.mean_loss) == (30, trick.mean_loss)


@pytest.mark.parametrize("step", [4, 10, 13])
@pytest.mark.parametrize("data", [ReplayNumbered, replay])
def test_a_run_resumed_from_the_end_of_an_epoch_goes_on_bit_for_bit(step, data):
    (whole, _), (half, _), (rest, _) = parted(step, data=data, epoch_end=True)
    assert half.numbers + rest.numbers == whole.numbers
    assert_same_weights(weights(whole), weights(rest))


@pytest.mark.parametrize("step", [4, 6, 7, 13])
def test_resume_with_workers_that_fetch_ahead(step):
    (whole, _), (half, _), (rest, _) = parted(step, data=lambda: ReplayNumbered(num_workers=1))
    assert half.numbers + rest.numbers == whole.numbers
    assert_same_weights(weights(whole), weights(rest))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_resume_with_accumulation(accumulate):
    (whole, _), (half, _), (rest, _) = parted(2 if accumulate == 3 else 4, accumulate_grad_batches=accumulate)
    assert half.numbers + rest.numbers == whole.numbers
    assert_same_weights(weights(whole), weights(rest))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_of_a_validation_at_the_end_of_an_epoch():
    def run(module, epochs_checkpoint=None, **options):
        saves = ModelCheckpoint("saved", filename="{epoch}", monitor="val_loss", save_top_k=-1)
        one = trainer(callbacks=[SubsetTraining(seed=3), saves], max_epochs=5, enable_checkpointing=True)
        one.fit(module, ReplayNumbered(), DataLoader(TensorDataset(*images(8))), ckpt_path=epochs_checkpoint, **options)

    whole = Numbered()
    start = copy.deepcopy(whole)
    run(whole)
    for epoch in range(4):
        rest = copy.deepcopy(start)
        run(rest, f"saved/epoch={epoch}.ckpt", weights_only=True)
        assert rest.numbers == whole.numbers[sum([4, 3, 3, 3][: epoch + 1]) :]
        assert_same_weights(weights(whole), weights(rest))


def test_a_plain_loader_that_begins_anew_in_the_middle_of_an_epoch_keeps_its_losses_apart():
    subset = SubsetTraining(keep=0.7, seed=3)
    module = Numbered()
    fit_interrupted(module, replay(), 2, [SubsetTraining(keep=0.7, seed=3)], max_epochs=2)
    rest, noted = Numbered(), []
    subset.take_losses = lambda trainer, losses: noted.append((subset.run.indices.tolist(), losses))
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        resume(rest, replay(), [subset], max_epochs=2)
    assert [numbers for numbers, _ in noted] == rest.numbers
    for (_, losses), own in zip(noted, rest.own, strict=True):
        torch.testing.assert_close(losses, own)


def test_the_state_loads_with_weights_only_and_knows_every_loss():
    subset, module = SubsetTraining(seed=3), Numbered()
    fit_interrupted(module, replay(), 6, [subset], max_epochs=5)
    state = torch.load("at.ckpt", weights_only=True)["callbacks"]["SubsetTraining"]
    numbers, own = module.of_epoch(0)
    torch.testing.assert_close(state["losses"][numbers], own)
    numbers, own = module.of_epoch(1)
    torch.testing.assert_close(state["total"][numbers], own)
    assert state["count"].sum() == len(numbers) == 16


def test_one_cycle_beside_it_ends_where_it_should():
    module, *_ = fit(callbacks=[OneCycleMomentum(max_lr=0.1)], accumulate_grad_batches=2, max_epochs=5)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 + 3 * 2 + 2)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 10:
            schedule.step()
    assert [groups[0]["lr"] for groups in module.values] == pytest.approx(expected, rel=1e-9)


class Validations(Callback):
    def __init__(self):
        self.at = []

    def on_validation_start(self, trainer, pl_module):
        self.at.append(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


@pytest.mark.parametrize(
    ("interval", "expected"), [(1.0, [8, 12, 16, 20, 28]), (0.5, [4, 8, 10, 12, 14, 16, 18, 20, 24, 28])]
)
def test_validation_comes_in_shortened_epochs_too(interval, expected):
    validations = Validations()
    run = trainer(callbacks=[SubsetTraining(keep=0.5, seed=3), validations], max_epochs=5, val_check_interval=interval)
    run.fit(Numbered(), replay(batch_size=4), DataLoader(TensorDataset(*images(8))))
    assert validations.at == expected


def test_the_facts_are_logged_on_request():
    *_, run = fit(subset=SubsetTraining(keep=0.5, seed=3, log=True, stop_at=1.0), max_epochs=2)
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("subset")}
    subset = run.callbacks[0]
    assert logged == {
        "subset_kept": 0.5,
        "subset_samples_saved": 16.0,
        "subset_mean_loss": pytest.approx(subset.mean_loss),
    }
    *_, run = fit(max_epochs=2)
    assert not any(name.startswith("subset") for name in run.callback_metrics)


def test_a_sampler_with_repeats_has_the_mean_of_what_a_sample_showed():
    sampler = WeightedRandomSampler([1.0] * 8 + [0.1] * 24, 64, generator=torch.Generator().manual_seed(0))
    module, subset, _ = fit(data=DataLoader(numbered(), batch_size=8, sampler=sampler), max_epochs=1)
    numbers, own = module.of_epoch(0)
    means = {n: float(own[[i for i, m in enumerate(numbers) if m == n]].mean()) for n in set(numbers)}
    assert subset.mean_loss == pytest.approx(sum(means.values()) / len(means), rel=1e-5)
    assert len(means) < 32
    module, *_ = fit(data=DataLoader(numbered(), batch_size=8, sampler=sampler), max_epochs=3)
    assert len(module.of_epoch(1)[0]) == round(0.7 * 64)


def test_samples_not_yet_seen_count_as_high():
    """Two of four batches in the first epoch: in the second the others are all kept."""
    module, *_ = fit(
        max_epochs=3, limit_train_batches=2, subset=SubsetTraining(keep=0.8, seed=3, stop_at=1.0, max_drop=0.75)
    )
    seen, known = module.of_epoch(0)
    assert len(seen) == 16
    dropped_from = {n for n, loss in zip(seen, known.tolist(), strict=True) if loss < float(known.mean())}
    assert len(dropped_from) >= 8  # 6 of which go: less than the largest share
    kept = [n for n in order_of(1) if n not in dropped_from]
    numbers, _ = module.of_epoch(1)
    assert len(numbers) == 16
    assert [n for n in numbers if n not in dropped_from] == kept[: len([n for n in numbers if n not in dropped_from])]


def test_losses_that_are_not_finite_are_forgotten():
    class Blows(Numbered):
        def training_step(self, batch, batch_idx):
            batch[0][batch[2] == 5] = math.nan
            return super().training_step(batch, batch_idx)

    subset = SubsetTraining(seed=3)
    trainer(callbacks=[subset], max_epochs=1).fit(Blows(nn.CrossEntropyLoss()), replay())
    assert subset.mean_loss is None or math.isfinite(subset.mean_loss)


def test_mixup_and_smoothing_beside_it_and_metrics_that_read_the_dominant_labels():
    class Measures(Numbered):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            accuracy = MulticlassAccuracy(CLASSES, average="micro", top_k=2)
            scores = F.one_hot(torch.as_tensor(batch[1]).as_subclass(torch.Tensor), CLASSES).float()
            assert accuracy(scores, batch[1]) == 1.0
            return loss

    module = Measures(LabelSmoothingLoss(0.1))
    fit(module, callbacks=[MixupCallback(alpha=1.0, seed=1)])
    assert len(module.losses) == 17
    assert all(math.isfinite(loss) for loss in module.losses)


def test_a_trainer_that_goes_on_keeps_what_it_knows():
    module, subset, run = fit(max_epochs=3, subset=SubsetTraining(keep=0.5, seed=3, stop_at=1.0))
    known = subset.mean_loss
    run.fit_loop.max_epochs = 5
    run.fit(module, replay())
    assert [len(module.of_epoch(epoch)[0]) for epoch in range(5)] == [32, 16, 16, 16, 16]
    assert known is not None
    assert subset.samples_saved == 64


@pytest.mark.parametrize("order", [1, -1])
def test_beside_one_cycle_nothing_stays_patched_and_the_trainer_goes_on(order):
    tricks = [SubsetTraining(keep=0.5, seed=3, stop_at=1.0), OneCycleMomentum(max_lr=0.1)]
    module, run = Numbered(), trainer(callbacks=tricks[::order], max_epochs=2)
    for epochs in (2, 4):
        run.fit_loop.max_epochs = epochs
        run.fit(module, replay())
        assert patched(run) == set()
    assert [len(module.of_epoch(epoch)[0]) for epoch in range(4)] == [32, 16, 16, 16]
    rates = [groups[0]["lr"] for groups in module.values]
    assert rates == [OneCycle().at(step, 6 if step < 6 else 10, max_lr=0.1)[0] for step in range(10)]


class Twice(Numbered):
    def train_dataloader(self):
        count = 32 if self.trainer.current_epoch < 2 else 40
        return replay(count)


def test_reloaded_data_of_another_size_are_new():
    module, subset = Twice(), SubsetTraining(keep=0.5, seed=3, stop_at=1.0)
    run = trainer(callbacks=[subset], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    run.fit(module)
    assert len(subset.saved.losses) == 40
    assert [len(module.of_epoch(epoch)[0]) for epoch in range(4)] == [32, 16, 20, 20]


def test_reloaded_data_of_the_same_size_keep_their_losses():
    module = Numbered()
    module.train_dataloader = replay
    same = Numbered()
    same.load_state_dict(module.state_dict())
    run = trainer(callbacks=[SubsetTraining(seed=3)], max_epochs=5, reload_dataloaders_every_n_epochs=1)
    run.fit(module)
    fit(same)
    assert module.numbers == same.numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"`keep` to be a number in \(0, 1\], but got 0.0"),
        ({"keep": 1.1}, "`keep`"),
        ({"method": "best"}, "`method` to be 'infobatch', 'random' or 'loss', but got 'best'"),
        ({"stop_at": 1.5}, r"`stop_at` to be a number in \[0, 1\]"),
        ({"max_drop": 1.0}, r"`max_drop` to be a number in \(0, 1\)"),
        ({"max_drop": 0}, "`max_drop`"),
        ({"beta": -1}, "`beta`"),
        ({"seed": 1.5}, "`seed`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubsetTraining(**arguments)


def test_a_fraction_of_an_open_end_is_refused_and_none_is_not():
    with pytest.raises(MisconfigurationException, match=r"SubsetTraining\(stop_at=0.875\) .* `stop_at=1.0`"):
        fit(max_epochs=-1, max_steps=5)
    module, *_ = fit(max_epochs=-1, max_steps=9, subset=SubsetTraining(keep=0.5, stop_at=1.0, seed=3))
    assert [len(module.of_epoch(epoch)[0]) for epoch in range(4)] == [32, 16, 16, 8]


class Contrasts(Numbered):
    """Compares the samples of a batch; none has a loss of its own."""

    def training_step(self, batch, batch_idx):
        self.numbers.append(batch[2].tolist())
        features = F.normalize(self.backbone(batch[0]), dim=1)
        likeness = features @ features.T
        return (likeness.logsumexp(1) - likeness.diagonal()).mean()


def test_a_random_choice_needs_no_losses_and_no_numbers_of_samples():
    for data in (replay(), DataLoader(Keyed(), 8, sampler=[f"k{i}" for i in range(32)])):
        module, subset, run = fit(Contrasts(), data, subset=SubsetTraining(0.5, method="random", seed=3, log=True))
        assert [len(numbers) for numbers in module.numbers] == [8] * (4 + 2 + 2 + 2 + 4)
        assert all(len({*module.numbers[i], *module.numbers[i + 1]}) == 16 for i in (4, 6, 8))
        assert (subset.mean_loss, subset.samples_saved) == (None, 48)
        assert "subset_samples_saved" in run.callback_metrics
    with pytest.raises(MisconfigurationException, match="mean_over_samples"):
        fit(Contrasts())


class Sequences(LightningModule):
    """Has losses of several values a sample, which are noted in ``own`` by number, one sample at a time."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind, self.own, self.weights = nn.Linear(3, 6), kind, {}, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        x, y, numbers = batch
        scores = self.net(x)
        with torch.no_grad():
            self.own |= {int(n): float(self.by_hand(*one)) for n, *one in zip(numbers, scores, y, strict=True)}
        return getattr(self, self.kind)(scores, y)

    def tokens(self, scores, y):
        return F.cross_entropy(scores.view(-1, scores.size(-1)), y.view(-1), ignore_index=5)

    def dice(self, scores, y):
        chances, masks = scores[..., 0].sigmoid(), y.clamp(max=1)
        return mean_over_samples(1 - 2 * (chances * masks).sum(1) / (chances + masks).sum(1))

    def quantiles(self, scores, y):
        errors, levels = y.unsqueeze(2) - scores, torch.arange(6) / 6
        pinball = torch.maximum(levels * errors, (levels - 1) * errors)
        return mean_over_samples(pinball, (y != 5).unsqueeze(2))

    def by_hand(self, scores, y):
        if self.kind == "dice":
            return self.dice(scores.unsqueeze(0), y.unsqueeze(0))
        if self.kind == "tokens":
            return sum(F.cross_entropy(row, label) for row, label in zip(scores, y, strict=True) if label != 5) / sum(
                y != 5
            )
        errors = [[(label - q, i / 6) for i, q in enumerate(row)] for row, label in zip(scores, y, strict=True)]
        own = [max(e * at, e * (at - 1)) for row, label in zip(errors, y, strict=True) if label != 5 for e, at in row]
        return sum(own) / len(own)


@pytest.mark.parametrize("kind", ["tokens", "dice", "quantiles"])
@pytest.mark.parametrize("length", [8, 5])
def test_losses_of_tokens_masks_and_quantiles_are_read_as_the_means_of_what_counts(kind, length):
    x, y = torch.randn(32, length, 3), torch.randint(0, 5, (32, length))
    y[torch.rand(32, length) > 0.6] = 5
    y[:, 0] = 1  # something counts in each
    data = DataLoader(TensorDataset(x, y, torch.arange(32)), batch_size=8, shuffle=True)
    plain, module, subset = Sequences(kind), Sequences(kind), SubsetTraining(0.5, seed=3)
    module.load_state_dict(plain.state_dict())
    for one, tricks in ((plain, []), (module, [subset])):
        torch.manual_seed(1)
        trainer(callbacks=tricks, max_epochs=1).fit(one, data)
    assert_same_weights(weights(plain), weights(module))
    torch.testing.assert_close(subset.saved.losses, torch.tensor([module.own[n] for n in range(32)]))
    run = trainer(callbacks=[SubsetTraining(0.5, seed=3)], max_epochs=3)
    run.fit(module, data)
    assert run.global_step == 4 + 2 + 4


class Keyed(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, key):
        return numbered()[int(key[1:])]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Batches(*replay()), "SubsetTraining needs one training loader.*Batches"),
        (lambda: DataLoader(Keyed(), 8, sampler=[f"k{i}" for i in range(32)]), "a sampler of whole numbers"),
        (lambda: DataLoader(numbered(), 8, sampler=range(-1, 31)), "a sampler of whole numbers"),
        (lambda: DataLoader(numbered(), 20, sampler=range(32), drop_last=True), None),
    ],
)
def test_loaders_that_do_not_fit_are_refused(data, message):
    if message is None:
        fit(data=data())
        with pytest.raises(MisconfigurationException, match="too few samples for one batch"):
            fit(data=data(), subset=SubsetTraining(keep=0.5))
    else:
        with pytest.raises(MisconfigurationException, match=message):
            fit(data=data())
