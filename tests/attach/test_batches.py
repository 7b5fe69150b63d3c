"""Every kind of batch is changed on its way to training_step, in training only, and nothing is left behind."""

import signal
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups import BatchAugmentation, MixupCallback, ProgressiveResizing, WarmupLRScaler
from lightning_speedups.attach.batches import BatchOrder, BatchTrick, batch_number, rest_of_pipeline, transferred
from lightning_speedups.core.batch import get_part, replace_part
from zoo import Batches, Classifier, loader, trainer, weights


class Linear(BatchTrick):
    """x → times·x + plus, so that the order of two of them shows."""

    def __init__(self, times, plus, order=BatchOrder.MIX, place=0):
        super().__init__()
        self.times, self.plus, self.batch_order, self.place = times, plus, order, place
        self.numbers = []

    def change_batch(self, trainer, pl_module, batch):
        self.numbers.append(batch_number(trainer))
        return replace_part(batch, self.place, get_part(batch, self.place) * self.times + self.plus)


class Seer(LightningModule):
    """Keeps what its steps receive."""

    def __init__(self, place=0):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.place = place
        self.trained, self.validated, self.kinds = [], [], []

    def training_step(self, batch, batch_idx):
        part = get_part(batch, self.place)
        self.trained.append(part.clone())
        self.kinds.append(type(batch))
        return self.layer(part).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(get_part(batch, self.place).clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class NamedPair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@dataclass
class Record:
    image: torch.Tensor
    label: torch.Tensor


@dataclass(frozen=True)
class FrozenRecord:
    image: torch.Tensor
    label: torch.Tensor

    def to(self, *args, **kwargs):  # Lightning refuses a frozen dataclass that does not move itself
        return FrozenRecord(self.image.to(*args, **kwargs), self.label.to(*args, **kwargs))


class Own:
    def __init__(self, image, label):
        self.image, self.label = image, label


class OwnDict(dict):
    pass


CONTAINERS = {
    "list": (lambda x, y: [x, y], 0, 1),
    "tuple": (lambda x, y: (x, y), 0, 1),
    "dict": (lambda x, y: {"image": x, "label": y}, "image", "label"),
    "dict subclass": (lambda x, y: OwnDict(image=x, label=y), "image", "label"),
    "namedtuple by index": (NamedPair, 0, 1),
    "namedtuple by name": (NamedPair, "image", "label"),
    "dataclass": (Record, "image", "label"),
    "frozen dataclass": (FrozenRecord, "image", "label"),
    "own class": (Own, "image", "label"),
    "namespace": (lambda x, y: SimpleNamespace(image=x, label=y), "image", "label"),
}


class WholeBatches(list):
    """A dataset of ready batches: on a CPU training_step then gets the dataset's own memory."""


def as_it_is(batch):
    return batch


def batches(container, count=3):
    make = CONTAINERS[container][0]
    parts = [(torch.arange(8.0).view(4, 2) + 10 * i, torch.arange(4) % 2) for i in range(count)]
    copies = [(x.clone(), y.clone()) for x, y in parts]
    return DataLoader(WholeBatches(make(x, y) for x, y in parts), batch_size=None, collate_fn=as_it_is), parts, copies


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_changed_keeps_its_type_and_leaves_the_dataset_alone(container):
    make, place, _ = CONTAINERS[container]
    data, parts, copies = batches(container)
    module = Seer(place)
    trainer(max_epochs=2, callbacks=[Linear(2.0, 1.0, place=place)]).fit(module, data)
    expected = [x * 2 + 1 for x, _ in copies] * 2
    assert len(module.trained) == 6
    assert all(torch.equal(seen, want) for seen, want in zip(module.trained, expected, strict=True))
    assert set(module.kinds) == {type(make(*parts[0]))}
    assert all(
        torch.equal(a, b) for now, before in zip(parts, copies, strict=True) for a, b in zip(now, before, strict=True)
    )


class ReadsMixture(Seer):
    def __init__(self, place, labels):
        super().__init__(place)
        self.labels = labels

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        logits = torch.cat([self.layer(get_part(batch, self.place)), torch.zeros(4, 1)], 1)
        return nn.functional.cross_entropy(logits, get_part(batch, self.labels))


@pytest.mark.parametrize("container", CONTAINERS)
def test_mixup_changes_every_container_and_leaves_the_dataset_alone(container):
    make, inputs, labels = CONTAINERS[container]
    data, parts, copies = batches(container)
    module = ReadsMixture(inputs, labels)
    trainer(max_epochs=1, callbacks=[MixupCallback(alpha=1.0, inputs=inputs, labels=labels, seed=3)]).fit(module, data)
    assert any(not torch.equal(seen, x) for seen, (x, _) in zip(module.trained, copies, strict=True))
    for seen, (x, _) in zip(module.trained, copies, strict=True):
        # One λ a batch: each row is λ·own + (1-λ)·partner's, so the mean over the batch stays.
        torch.testing.assert_close(seen.mean(0), x.mean(0))
    assert set(module.kinds) == {type(make(*parts[0]))}
    assert all(
        torch.equal(a, b) for now, before in zip(parts, copies, strict=True) for a, b in zip(now, before, strict=True)
    )


class MovesBatchesItself(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def train_dataloader(self):
        return batches("tuple")[0]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("before")
        return batch[0] + 1, batch[1]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls.append("transfer")
        return batch[0] * 10, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("after")
        return batch[0] + 3, batch[1]


class MovesInModule(Seer):
    on_before_batch_transfer = MovesBatchesItself.on_before_batch_transfer
    transfer_batch_to_device = MovesBatchesItself.transfer_batch_to_device
    on_after_batch_transfer = MovesBatchesItself.on_after_batch_transfer
    calls: list


@pytest.mark.parametrize("owner", ["datamodule", "module"])
def test_the_users_transfer_hooks_run_and_come_first(owner):
    if owner == "datamodule":
        module, data = Seer(), MovesBatchesItself()
        hooks = data
    else:
        module, data = MovesInModule(), batches("tuple")[0]
        module.calls = []
        hooks = module
    trainer(max_epochs=1, callbacks=[Linear(2.0, 0.5)]).fit(module, data)
    for seen, (x, _) in zip(module.trained, batches("tuple")[2], strict=True):
        torch.testing.assert_close(seen, ((x + 1) * 10 + 3) * 2 + 0.5)
    assert hooks.calls == ["before", "transfer", "after"] * 3


@pytest.mark.parametrize("listed", [False, True])
def test_tricks_apply_in_their_order_however_they_are_listed(listed):
    tricks = [
        Linear(10.0, 0.0, BatchOrder.RESIZE),
        Linear(1.0, 1.0, BatchOrder.MEMORY_FORMAT),
        Linear(-1.0, 0.0, BatchOrder.MIX),
    ]
    module = Seer()
    trainer(max_epochs=1, callbacks=tricks[::-1] if listed else tricks).fit(module, batches("tuple")[0])
    for seen, (x, _) in zip(module.trained, batches("tuple")[2], strict=True):
        torch.testing.assert_close(seen, -(x * 10 + 1))


class SetsUpTwice(Linear):
    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        super().setup(trainer, pl_module, stage)


def test_setting_up_twice_changes_a_batch_once():
    module = Seer()
    trainer(max_epochs=1, callbacks=[SetsUpTwice(2.0, 1.0), Linear(1.0, 0.0)]).fit(module, batches("tuple")[0])
    torch.testing.assert_close(module.trained[0], batches("tuple")[2][0][0] * 2 + 1)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_of_none_is_left_to_lightning():
    trick, module = Linear(2.0, 1.0), Seer()
    with_a_gap = WholeBatches([batches("tuple")[1][0], None, batches("tuple")[1][1]])
    trainer(max_epochs=1, callbacks=[trick]).fit(module, DataLoader(with_a_gap, batch_size=None, collate_fn=as_it_is))
    assert len(module.trained) == len(trick.numbers) == 2


def test_validation_and_sanity_check_get_unchanged_batches():
    module, one = Seer(), trainer(max_epochs=2, num_sanity_val_steps=1, callbacks=[Linear(2.0, 1.0)])
    one.fit(module, batches("tuple")[0], batches("tuple", 2)[0])
    assert len(module.validated) == 1 + 2 * 2
    copies = [x for x, _ in batches("tuple", 2)[2]]
    for seen, x in zip(module.validated, [copies[0], *copies, *copies], strict=True):
        assert torch.equal(seen, x)
    one.validate(module, batches("tuple", 2)[0], verbose=False)
    assert torch.equal(module.validated[-1], copies[-1])


def test_a_trick_works_in_validation_between_training_batches_without_touching_it():
    module = Seer()
    trainer(max_epochs=1, val_check_interval=1, callbacks=[Linear(2.0, 1.0)]).fit(
        module, batches("tuple")[0], batches("tuple", 1)[0]
    )
    first = batches("tuple", 1)[2][0][0]
    assert len(module.validated) == 3
    assert all(torch.equal(seen, first) for seen in module.validated)
    torch.testing.assert_close(module.trained[2], batches("tuple")[2][2][0] * 2 + 1)


def test_batch_numbers_count_the_whole_run_and_go_on_after_a_resume():
    trick, module = Linear(1.0, 0.0), Seer()
    first = trainer(max_epochs=2, callbacks=[trick])
    first.fit(module, batches("tuple")[0])
    assert trick.numbers == [0, 1, 2, 3, 4, 5]
    first.save_checkpoint("last.ckpt")
    again = Linear(1.0, 0.0)
    trainer(max_epochs=3, callbacks=[again]).fit(Seer(), batches("tuple")[0], ckpt_path="last.ckpt")
    assert again.numbers == [6, 7, 8]


class StopsAt(Callback):
    def __init__(self, hook, error):
        self.hook, self.error = hook, error
        setattr(self, hook, self._raise)

    def _raise(self, *args, **kwargs):
        raise self.error


def test_after_a_fit_nothing_is_left_and_the_same_objects_fit_again():
    trick, module = Linear(2.0, 1.0), Seer()
    one = trainer(max_epochs=1, callbacks=[trick])
    one.fit(module, batches("tuple")[0])
    assert patched(one) == set()
    one.fit_loop.max_epochs = 2
    one.fit(module, batches("tuple")[0])
    other = trainer(max_epochs=1, callbacks=[trick])
    other.fit(module, batches("tuple")[0])
    assert patched(one) == patched(other) == set()
    assert len(module.trained) == 9
    for seen, (x, _) in zip(module.trained, batches("tuple")[2] * 3, strict=True):
        torch.testing.assert_close(seen, x * 2 + 1)


HOOKS = ["setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_validation_start", "on_train_end"]


@pytest.mark.parametrize("position", ["before the tricks", "after the tricks"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_leaves_nothing_and_the_same_objects_fit_again(hook, position):
    tricks, stop = [Linear(2.0, 1.0), MixupCallback(seed=0)], StopsAt(hook, ZeroDivisionError("on purpose"))
    callbacks = [stop, *tricks] if position == "before the tricks" else [*tricks, stop]
    one = trainer(max_epochs=1, callbacks=callbacks)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        one.fit(ReadsMixture(0, 1), batches("tuple")[0], batches("tuple", 1)[0])
    assert patched(one) == set()
    one.callbacks.remove(stop)
    module = Seer()
    trainer(max_epochs=1, callbacks=tricks[:1]).fit(module, batches("tuple")[0])
    torch.testing.assert_close(module.trained[0], batches("tuple")[2][0][0] * 2 + 1)


def test_the_same_trainer_fits_again_after_an_exception():
    stop, trick = StopsAt("on_train_batch_start", ZeroDivisionError()), Linear(2.0, 1.0)
    one = trainer(max_epochs=1, callbacks=[trick, stop])
    with pytest.raises(ZeroDivisionError):
        one.fit(Seer(), batches("tuple")[0])
    one.callbacks.remove(stop)
    module = Seer()
    one.fit(module, batches("tuple")[0])
    assert patched(one) == set()
    assert module.trained
    torch.testing.assert_close(module.trained[-1], batches("tuple")[2][2][0] * 2 + 1)


def test_ctrl_c_leaves_nothing():
    before = signal.getsignal(signal.SIGINT)
    one = trainer(max_epochs=1, callbacks=[Linear(2.0, 1.0), StopsAt("on_train_batch_end", KeyboardInterrupt())])
    try:
        with pytest.raises(SystemExit):
            one.fit(Seer(), batches("tuple")[0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert patched(one) == set()


class FetchesItself(Seer):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.layer(batch[0]).sum()


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_module_that_fetches_its_own_batches_is_refused_by_name():
    one = trainer(max_epochs=1, callbacks=[Linear(2.0, 1.0)])
    with pytest.raises(MisconfigurationException, match=r"(?s)Linear.*FetchesItself\.training_step.*dataloader_iter"):
        one.fit(FetchesItself(), batches("tuple")[0])
    assert patched(one) == set()


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_beside_a_trick_changes_nothing_for_either(averaging, first):
    def fit(*callbacks):
        torch.manual_seed(0)
        module = Classifier()
        trainer(max_epochs=2, callbacks=list(callbacks)).fit(module, loader(), loader(8))
        return module

    tricks = [MixupCallback(alpha=1.0, seed=1), WarmupLRScaler(scale=2.0, warmup_steps=2)]
    ema = averaging()
    module = fit(*([ema, *tricks] if first else [*tricks, ema]))
    alone = fit(*tricks)
    assert len(module.losses) == 8
    assert module.losses == alone.losses  # the training went on unaveraged
    averaged = weights(module)
    assert any(not torch.equal(averaged[name], value) for name, value in weights(alone).items())


class Sized(Classifier):
    def __init__(self):
        super().__init__()
        self.batch_size = 2
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return loader(16, self.batch_size)

    def val_dataloader(self):
        return loader(4, 4)


@pytest.mark.parametrize("tuner", ["lr_find", "scale_batch_size"])
def test_tuners_run_without_the_tricks_and_leave_nothing(tuner):
    trick, warmup = Linear(0.0, 99.0), WarmupLRScaler(scale=2.0, warmup_steps=2)
    module, one = Sized(), trainer(max_epochs=2, callbacks=[warmup, trick])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tuner == "lr_find":
            found = Tuner(one).lr_find(module, num_training=6, min_lr=1e-4, max_lr=0.1, early_stop_threshold=None)
            assert found is not None
        else:
            assert Tuner(one).scale_batch_size(module, init_val=2, max_trials=2, steps_per_trial=1) == 4
    trials = len(module.seen)
    assert trials
    assert not any((inputs == 99).all() for inputs, _ in module.seen)
    assert patched(one) == set()
    one.fit(module)
    assert len(module.seen) > trials
    assert all((inputs == 99).all() for inputs, _ in module.seen[trials:])


def test_the_finder_callback_runs_without_the_tricks_and_the_fit_with_them():
    from lightning.pytorch.callbacks import LearningRateFinder

    trick = Linear(0.0, 99.0)
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=6, early_stop_threshold=None)
    module, one = Sized(), trainer(max_epochs=1, callbacks=[trick, finder, MixupCallback(seed=0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.fit(module)
    changed = [bool((inputs == 99).all()) for inputs, _ in module.seen]
    assert changed == [False] * 6 + [True] * 8
    assert patched(one) == set()


class KeepsItsBatches(Classifier):
    def __init__(self):
        super().__init__()
        self.before = weights(self)

    def on_train_end(self):
        torch.save([inputs for inputs, _ in self.seen], f"rank{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(
    ("strategy", "processes"), [("ddp_fork", 1), ("ddp_fork", 2), pytest.param("ddp_spawn", 2, marks=pytest.mark.slow)]
)
def test_processes_of_their_own_change_their_batches(strategy, processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tricks = [Linear(0.0, 99.0), MixupCallback(seed=0), WarmupLRScaler(scale=2.0, warmup_steps=1)]
    one, module = trainer(max_epochs=1, strategy=strategy, devices=processes, callbacks=tricks), KeepsItsBatches()
    one.fit(module, loader(8 * processes, 4))
    for rank in range(processes):
        seen = torch.load(f"rank{rank}.pt", weights_only=True)
        assert len(seen) == 2
        assert all((inputs == 99).all() for inputs in seen)
    # The worker's weights came back, and the objects are as good as new here.
    assert any(not torch.equal(a, b) for a, b in zip(weights(module).values(), module.before.values(), strict=True))
    assert patched(one) == set()


def test_the_rest_of_the_pipeline_can_be_run_by_itself_and_is_not_noticed():
    class First(Linear):
        def change_batch(self, trainer, pl_module, batch):
            batch = super().change_batch(trainer, pl_module, batch)
            self.rest = rest_of_pipeline(trainer, self, batch)
            return batch

    class Counting(Linear):
        calls = 0

        def change_batch(self, trainer, pl_module, batch):
            self.calls += 1
            return super().change_batch(trainer, pl_module, batch)

    earlier, first, later = (
        Linear(7, 0, BatchOrder.LOOK),
        First(2, 0, BatchOrder.RESIZE),
        Counting(1, 5, BatchOrder.MIX),
    )
    module = Seer()
    trainer(callbacks=[later, first, earlier], max_epochs=1).fit(module, Batches([torch.ones(2, 2)]))
    assert torch.equal(first.rest[0], torch.full((2, 2), 19.0))
    assert torch.equal(module.trained[0], first.rest[0])
    assert later.calls == 1


def test_a_batch_comes_to_the_tricks_as_the_users_hooks_and_the_precision_leave_it():
    class Looks(Linear):
        def change_batch(self, trainer, pl_module, batch):
            self.found.append((transferred(trainer, [torch.ones(8, 2, 8, 8), torch.zeros(8)]), batch))
            return super().change_batch(trainer, pl_module, batch)

    module, trick = Classifier(), Looks(2, 1)
    trick.found = []
    module.on_before_batch_transfer = lambda batch, dataloader_idx: [batch[0] + 1, batch[1]]
    module.on_after_batch_transfer = lambda batch, dataloader_idx: [batch[0] * 3, batch[1]]
    trainer(callbacks=[trick], max_steps=1, precision="64-true").fit(
        module, Batches([torch.ones(8, 2, 8, 8), torch.zeros(8).long()])
    )
    ((made, batch),) = trick.found
    assert torch.equal(made[0], torch.full((8, 2, 8, 8), 6.0, dtype=torch.float64))
    assert torch.equal(made[0], batch[0])


def test_it_comes_to_them_as_those_leave_it_that_change_batches_in_every_stage():
    class Looks(Linear):
        def change_batch(self, trainer, pl_module, batch):
            self.found.append((transferred(trainer, [torch.ones(2, 2)]), batch))
            return super().change_batch(trainer, pl_module, batch)

    first, trick, second = Linear(3, 0, BatchOrder.CONVERT), Looks(2, 1, BatchOrder.LOOK), Linear(7, 0)
    trick.found = []
    trainer(callbacks=[second, trick, first], max_epochs=1).fit(Seer(), Batches([torch.ones(2, 2)]))
    ((made, batch),) = trick.found
    assert torch.equal(made[0], torch.full((2, 2), 3.0))
    assert torch.equal(made[0], batch[0])


class Stored:
    """Its attributes live in a store, which it copies with itself, and are items too, as torch_geometric's Data."""

    def __init__(self, **parts):
        self.__dict__["_store"] = parts

    def __getattr__(self, name):
        if name == "_store" or name not in self._store:
            raise AttributeError(name)
        return self._store[name]

    def __setattr__(self, name, part):
        self._store[name] = part

    def __getitem__(self, name):
        return self._store[name]

    def __copy__(self):
        return type(self)(**self._store)


class ReadOnly:
    def __init__(self, image, label):
        self._image, self._label = image, label

    image = property(lambda self: self._image)
    label = property(lambda self: self._label)


def pictures(count=8, *shape):
    return torch.rand(count, *(shape or (3, 16, 16)), generator=torch.Generator().manual_seed(count))


class Looks(LightningModule):
    """Keeps its batches; learns nothing."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


TRICKS = {
    "augmentation": lambda **places: BatchAugmentation(crop=2, seed=1, **places),
    "resizing": lambda **places: ProgressiveResizing(full_from=0.8, probe=False, **places),
    "cutmix": lambda **places: MixupCallback(alpha=0, cutmix_alpha=1, seed=1, targets="soft", num_classes=2, **places),
}


def said(told, name):
    return [str(one.message) for one in told if name in str(one.message)]


def fit(trick, batch, **options):
    module = Looks()
    trainer(callbacks=[TRICKS[trick](**options)], max_epochs=1).fit(module, Batches(*[batch] * 3))
    return module.seen


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_changes_what_a_store_hands_out_as_attribute_and_as_item(trick):
    image = pictures()
    batch = Stored(image=image, label=torch.arange(8) % 2)
    more = {"labels": "label"} if trick == "cutmix" else {}
    seen = fit(trick, batch, inputs="image", **more)[0]
    assert seen.image is seen["image"]
    assert seen.image.shape != image.shape or not torch.equal(seen.image, image)
    assert batch.image is batch["image"] is image


@pytest.mark.parametrize("trick", ["augmentation", "resizing"])
def test_a_container_that_cannot_be_changed_is_refused_with_the_names_of_both(trick):
    with pytest.raises(
        MisconfigurationException, match=r"inputs='image'\) .*'image', but got ReadOnly .*hand out.*collate_fn"
    ):
        fit(trick, ReadOnly(pictures(), torch.arange(8)), inputs="image")


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("last", [1, 3, 4])
def test_images_with_their_channels_last_are_refused_with_the_way_out(trick, last):
    with pytest.raises(
        MisconfigurationException, match=r"\(8, 16, 16, \d\) seem .*\(N, ..., H, W, C\).*permute\(2, 0, 1\)"
    ):
        fit(trick, [pictures(8, 16, 16, last), torch.arange(8) % 2])


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (3, 6, 4), (16, 8, 8), (4, 8, 12)])
def test_images_with_their_channels_second_are_not(trick, shape):
    assert len(fit(trick, [pictures(8, *shape), torch.arange(8) % 2])) == 3


def test_mixup_alone_does_not_ask_how_pixels_lie():
    trick, module = MixupCallback(seed=1, targets="soft", num_classes=2), Looks()
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches([pictures(8, 16, 16, 3), torch.arange(8) % 2]))
    assert len(module.seen) == 1


def test_labels_that_are_no_maps_of_the_images_are_not_cut():
    with pytest.raises(MisconfigurationException, match=r"cutmix_alpha=1\) .*\(8, 3, 16, 16\), not \(8, 5, 10\)"):
        fit("cutmix", [pictures(), torch.rand(8, 5, 10)])
    assert len(fit("cutmix", [pictures(), torch.rand(8, 4, 4)])) == 3


SCENE = {"image": pictures(), "mask": torch.zeros(8, 16, 16).long(), "label": torch.arange(8) % 2}
POINTS = {"boxes": torch.full((8, 2, 4), 7.0), "targets": [{"keypoints": torch.full((5, 2), 3.0)}]}


@pytest.mark.parametrize("trick", ["augmentation", "resizing"])
def test_maps_that_nobody_named_are_told_once_in_the_words_that_name_them(trick):
    with pytest.warns(UserWarning, match=r"maps of their size.*name it: `maps='mask'`") as told:
        seen = fit(trick, SCENE, inputs="image")
    assert len(said(told, "maps")) == 1
    assert seen[0]["mask"] is SCENE["mask"]
    with pytest.warns(UserWarning, match=r"name it: `maps=\['mask', 'edges'\]`"):
        fit(trick, {**SCENE, "edges": torch.zeros(8, 1, 16, 16)}, inputs="image", maps="mask")
    with pytest.warns(UserWarning, match=r"name it: `maps=\(1, 'mask'\)`"):
        fit(trick, [SCENE["image"], {"mask": SCENE["mask"]}])


@pytest.mark.parametrize("trick", TRICKS)
def test_boxes_and_points_that_stay_behind_are_told(trick):
    options = {"inputs": "image", "labels": "label"} if trick == "cutmix" else {"inputs": "image", "maps": "mask"}
    scene = {**SCENE, **POINTS}
    if trick == "cutmix":
        del scene["mask"]
    with pytest.warns(UserWarning, match=r"cannot move what is at 'boxes', \('targets', 0, 'keypoints'\)") as told:
        fit(trick, scene, **options)
    assert len(said(told, "cannot move")) == 1


def test_boxes_given_as_shares_stay_right_where_images_are_resized_and_not_where_they_move():
    scene = {"image": pictures(), "boxes": torch.rand(8, 2, 4)}
    assert len(fit("resizing", scene, inputs="image")) == 3
    with pytest.warns(UserWarning, match="cannot move what is at 'boxes'"):
        fit("augmentation", scene, inputs="image")


def test_cutmix_takes_more_images_as_inputs_and_no_class_ids():
    scene = {**SCENE, "depth": pictures(8, 1, 16, 16)}
    with pytest.warns(UserWarning, match="MixupCallback") as told:
        fit("cutmix", scene, inputs="image", labels="label")
    maps, fixed = said(told, "MixupCallback")
    assert "name it: `inputs=['image', 'depth']`" in maps
    assert "cannot move what is at 'mask'" in fixed


@pytest.mark.parametrize("trick", TRICKS)
def test_ordinary_batches_are_not_told_of(trick):
    more = {"labels": "label"} if trick == "cutmix" else {}
    metadata = {"label": torch.arange(8) % 2, "age": torch.rand(8), "place": torch.rand(8, 4), "text": ["a"] * 8}
    assert fit(trick, {"image": pictures(), **metadata, "tokens": torch.zeros(8, 12, 16)}, inputs="image", **more)
    assert fit(trick, [pictures(), torch.arange(8) % 2, torch.rand(8, 4), torch.zeros(8, 5)])


def test_two_views_with_a_trick_each_are_not_told_of():
    module, tricks = Looks(), [ProgressiveResizing(start=start, inputs=i) for i, start in enumerate((0.25, 0.5))]
    trainer(callbacks=tricks, max_epochs=1).fit(module, Batches([pictures(), pictures()]))
    assert [view.shape[-1] for view in module.seen[0]] == [4, 8]


def test_what_an_object_hands_out_under_two_names_is_not_told_of_and_both_are_moved():
    batch = ReadOnly(pictures(), torch.arange(8))
    seen = fit("augmentation", batch, inputs="_image")[0]
    assert seen.image is seen._image
    assert not torch.equal(seen.image, batch.image)


@pytest.mark.parametrize(
    ("trick", "options", "batch", "argument"),
    [
        ("augmentation", {}, [(pictures(), torch.arange(8))], "inputs"),
        ("augmentation", {"inputs": "image"}, [(pictures(), torch.arange(8))], "inputs"),
        ("augmentation", {"inputs": (0, 1)}, [(pictures(), torch.arange(8))], "inputs"),
        ("augmentation", {"inputs": (0, 0), "maps": [(0, 1)]}, [(pictures(), torch.arange(8))], "maps"),
        ("resizing", {}, [(pictures(), torch.arange(8))], "inputs"),
        ("resizing", {"inputs": (0, 1)}, [(pictures(), torch.arange(8))], "inputs"),
        ("resizing", {"inputs": (0, 0), "maps": 1}, [(pictures(), torch.arange(8))], "maps"),
        ("cutmix", {"inputs": (0, 0)}, [(pictures(), torch.arange(8))], "labels"),
        ("cutmix", {}, [(pictures(), torch.arange(8))] * 2, "inputs"),
    ],
)
def test_who_names_a_wrong_place_is_shown_those_that_there_are(trick, options, batch, argument):
    places = (
        rf"Name the right place with `{argument}=`: .*at \(0, 0\) of shape \(8, 3, 16, 16\), \(0, 1\) of shape \(8,\)"
    )
    with pytest.raises(MisconfigurationException, match=places):
        fit(trick, batch, **options)


def several(mode, **lengths):
    made = {
        name: Batches(*[[pictures(8), torch.arange(8) % 2] for _ in range(length)]) for name, length in lengths.items()
    }
    return CombinedLoader(made, mode)


@pytest.mark.parametrize("trick", TRICKS)
def test_a_loader_that_has_ended_leaves_batches_as_they_are_and_the_user_is_told(trick):
    options = {"inputs": ("b", 0)} | ({"labels": ("b", 1)} if trick == "cutmix" else {})
    module = Looks()
    with pytest.warns(UserWarning, match=r"\('b', 0|1\)\) found None.* loader that ended"):
        trainer(callbacks=[TRICKS[trick](**options)], max_epochs=2).fit(module, several("max_size", a=3, b=1))
    assert [batch["b"] is None for batch in module.seen] == [False, True, True] * 2
    assert not any(
        batch["b"][0].shape == (8, 3, 16, 16) and torch.equal(batch["b"][0], pictures(8)) for batch in module.seen[::3]
    )
    assert all(torch.equal(batch["a"][0], pictures(8)) for batch in module.seen)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_loaders_in_a_nest_are_reached_by_paths(mode):
    module = Looks()
    loaders = CombinedLoader({"a": [Batches([pictures()]), Batches([pictures()])], "b": Batches([pictures()])}, mode)
    places = [("a", 0, 0), ("a", 1, 0)]
    trainer(callbacks=[ProgressiveResizing(inputs=places, probe=False)], max_epochs=1).fit(module, loaders)
    (batch,) = module.seen
    assert batch["a"][0][0].shape == batch["a"][1][0].shape == (8, 3, 8, 8)
    assert batch["b"][0].shape == (8, 3, 16, 16)


@pytest.mark.parametrize("trick", TRICKS)
def test_none_in_the_first_batch_is_refused(trick):
    more = {"labels": "label"} if trick == "cutmix" else {}
    with pytest.raises(MisconfigurationException, match=r"inputs='image'\) found None. Name a place that has a tensor"):
        fit(trick, {"image": None, "label": torch.arange(8)}, inputs="image", **more)
