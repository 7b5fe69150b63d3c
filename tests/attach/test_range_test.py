"""The sweep against a loop by hand, and everything of the user's exactly as before."""

import copy
import gc
import logging
import os
import random
import signal
import threading
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy
from two_processes import Regressor, regression, two

from lightning_speedups.attach import range_test
from lightning_speedups.core.range_test import Sweep
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    Manual,
    ReplayLoader,
    SometimesInfinite,
    Wrapper,
    assert_same_weights,
    images,
    loader,
    scaled,
    trainer,
    weights,
)

SWEEP = {"min_lr": 1e-3, "max_lr": 1.0, "steps": 10, "stop_factor": 1e6}


def run_range_test(trainer, module, loaders=None, datamodule=None, **settings):
    return range_test.run_range_test(trainer, module, Sweep(**settings), loaders, datamodule)[:2]


class Sweeps(Callback):
    """Runs the test where a trick would."""

    def __init__(self, **arguments):
        self.arguments = SWEEP | arguments
        self.result = None

    def on_train_start(self, trainer, pl_module):
        self.result = run_range_test(trainer, pl_module, trainer.train_dataloader, **self.arguments)


class Noted(Classifier):
    """Its copies write down here what they see: rates after the step, batches."""

    notes: list = []  # noqa: RUF012

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(self._rates)
        return optimizer

    def _rates(self, optimizer, *_):
        self.notes.append([float(group["lr"]) for group in optimizer.param_groups])


@pytest.fixture(autouse=True)
def _no_notes():
    Noted.notes.clear()


def shuffled(generator=None, count=32):
    return DataLoader(TensorDataset(*images(count)), batch_size=8, shuffle=True, generator=generator)


def by_hand(module, batches, rates=None, accumulate=1, clip=None):
    """The sweep of SWEEP as a plain loop over windows of batches."""
    module, losses = copy.deepcopy(module), []
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    for step, rate in enumerate(np.geomspace(1e-3, 1.0, 10) if rates is None else rates):
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        window = batches[step * accumulate : (step + 1) * accumulate]
        values = []
        for inputs, labels in window:
            loss = F.cross_entropy(module.head(module.backbone(inputs)), labels)
            (loss / accumulate).backward()
            values.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        losses.append(sum(values) / len(values))
    return losses


@pytest.mark.parametrize("where", ["before a fit", "inside a fit"])
def test_rates_and_losses_are_those_of_a_loop_by_hand(where):
    module, data = Noted(), loader(48)
    before = copy.deepcopy(module)
    if where == "before a fit":
        rates, losses = run_range_test(trainer(), module, data, **SWEEP)
    else:
        sweeps = Sweeps()
        trainer(callbacks=[sweeps], max_epochs=1).fit(module, data)
        rates, losses = sweeps.result
    np.testing.assert_allclose(rates, np.geomspace(1e-3, 1.0, 10), rtol=1e-12)
    assert Noted.notes[:10] == [[rate] for rate in rates]
    assert losses == by_hand(before, [*data, *data], rates)


@pytest.mark.parametrize("how", ["Trainer", "scheduler"])
def test_a_point_is_the_mean_of_an_accumulated_window(how):
    module, data = Noted(), loader(64)
    sweeps = Sweeps()
    arguments = {"accumulate_grad_batches": 4} if how == "Trainer" else {}
    scheduler = [] if how == "Trainer" else [GradientAccumulationScheduler({0: 4})]
    # Before Lightning's scheduler has had its turn.
    trainer(callbacks=[sweeps, *scheduler], max_epochs=1, **arguments).fit(module, data)
    np.testing.assert_allclose(sweeps.result[1], by_hand(module_like(module), 5 * [*data], accumulate=4), rtol=1e-5)


def module_like(module):
    """The module as it was before its fit: tests start from the same seed."""
    torch.manual_seed(7)  # as in conftest
    return type(module)()


def test_the_short_last_window_of_an_epoch_is_a_mean_of_its_own_batches():
    module = Classifier(lr=0.0)
    data = loader(24)  # three batches: windows of two and of one
    _, losses = run_range_test(trainer(accumulate_grad_batches=2), module, data, **SWEEP | {"max_lr": 1.1e-3})
    twin = copy.deepcopy(module)
    first = [F.cross_entropy(twin.head(twin.backbone(inputs)), labels).item() for inputs, labels in data]
    assert losses[0] == pytest.approx((first[0] + first[1]) / 2, rel=1e-6)
    assert losses[1] == pytest.approx(first[2], rel=1e-2)


def test_gradients_are_clipped_and_batches_limited_as_in_the_fit():
    module, data = Classifier(), loader(48)
    batches = [*data][:2] * 5
    _, losses = run_range_test(trainer(gradient_clip_val=0.01, limit_train_batches=2), module, data, **SWEEP)
    np.testing.assert_allclose(losses, by_hand(module, batches, clip=0.01), rtol=1e-6)
    assert not np.allclose(losses, by_hand(module, batches), rtol=1e-6)


class Everything(Noted):
    """State of every kind, all of it moved by a training step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ticks", torch.zeros(()), persistent=False)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.dropout = nn.Dropout(0.3)
        self.history, self.count = {"losses": []}, 0
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        self.ticks += 1
        self.count += 1
        scores = self.head(self.dropout(self.backbone(inputs + torch.rand(1, generator=self.generator))))
        loss = F.cross_entropy(scores, labels) * (1 + 0.01 * random.random() + 0.01 * np.random.rand())  # noqa: NPY002
        self.accuracy(scores, labels)
        self.log("accuracy", self.accuracy)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.history["losses"].append(loss.item())
        return loss


def state(module):
    metric = {name: getattr(module.accuracy, name).clone() for name in module.accuracy._defaults}
    return {
        **weights(module),
        **{f"metric {name}": value for name, value in metric.items()},
        **{f"grad {name}": torch.tensor(p.grad is not None) for name, p in module.named_parameters()},
        "ticks": module.ticks.clone(),
        "count": torch.tensor(module.count),
        "losses": torch.tensor(module.history["losses"]),
        "generator": module.generator.get_state(),
        "updates": torch.tensor(module.accuracy._update_count),
        "modes": torch.tensor([part.training for part in module.modules()]),
    }


def randomness():
    torch_state, numpy_state = torch.get_rng_state().numpy().tobytes(), np.random.get_state()  # noqa: NPY002
    return torch_state, random.getstate(), numpy_state[1].tobytes(), *numpy_state[2:]


def flags():
    return (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        rank_zero_only.rank,
        dict(os.environ),
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        logging.getLogger("lightning.pytorch.utilities.rank_zero").level,
        list(warnings.filters),
    )


class Raises(Everything):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.count == 3:
            raise RuntimeError("third batch")
        return loss


@pytest.mark.parametrize("kind", [Everything, Raises])
def test_module_randomness_and_flags_are_as_before(kind):
    module, own = kind(), torch.Generator().manual_seed(5)
    user, data = trainer(), shuffled(own)
    before = state(module), randomness(), own.get_state()
    flags_before, attributes = flags(), set(vars(module))
    if kind is Raises:
        with pytest.raises(RuntimeError, match="third batch"):
            run_range_test(user, module, data, **SWEEP)
    else:
        run_range_test(user, module, data, **SWEEP)
    assert_same_weights(before[0], state(module))
    assert randomness() == before[1]
    assert torch.equal(own.get_state(), before[2])
    assert flags() == flags_before
    assert set(vars(module)) == attributes
    assert module._trainer is None
    assert user.state.fn is None
    assert user.fit_loop._combined_loader is None


class Own:
    """Loaders whose next order depends on what was drawn before."""

    @staticmethod
    def no_generator():
        return shuffled()

    @staticmethod
    def own_generator():
        return shuffled(torch.Generator().manual_seed(5))

    @staticmethod
    def own_sampler():
        data = TensorDataset(*images(32))
        sampler = WeightedRandomSampler(torch.rand(32), 32, generator=torch.Generator().manual_seed(6))
        return DataLoader(data, batch_size=8, sampler=sampler)

    @staticmethod
    def subset():
        return DataLoader(Subset(TensorDataset(*images(64)), range(1, 33)), batch_size=8, shuffle=True)

    @staticmethod
    def replay():
        return ReplayLoader()

    @staticmethod
    def workers():
        return DataLoader(
            TensorDataset(*images(32)), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True
        )


LOADERS = ["no_generator", "own_generator", "own_sampler", "subset", "replay"]


def fit(name, *callbacks, kind=Everything, **arguments):
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)  # noqa: NPY002
    module = kind()
    trainer(callbacks=list(callbacks), **arguments).fit(module, getattr(Own, name)())
    return module


@pytest.mark.parametrize("name", LOADERS)
def test_a_fit_with_a_sweep_at_its_start_ends_as_one_without(name):
    sweeps = Sweeps()
    with_sweep, without = fit(name, sweeps), fit(name)
    assert len(sweeps.result[0]) == 10
    assert_same_weights(state(without), state(with_sweep))
    assert [torch.equal(a, b) for (a, _), (b, _) in zip(without.seen, with_sweep.seen, strict=True)].count(False) == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_persistent_workers_stay_those_of_the_fit():
    sweeps = Sweeps()
    assert_same_weights(state(fit("workers")), state(fit("workers", sweeps)))
    assert len(sweeps.result[0]) == 10


@pytest.mark.parametrize("name", LOADERS)
def test_the_same_loader_goes_on_where_it_was(name):
    def run(sweep):
        torch.manual_seed(4)
        data, module = getattr(Own, name)(), Classifier()
        first = [inputs for inputs, _ in data]
        if sweep:
            run_range_test(trainer(), module, data, **SWEEP)
        return [*first, *(inputs for inputs, _ in data)]

    assert all(torch.equal(a, b) for a, b in zip(run(sweep=True), run(sweep=False), strict=True))


def test_several_loaders_keep_their_structure_and_their_mode():
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            Noted.notes.append(None if batch["b"] is None else len(batch["b"][0]))
            return super().training_step(batch["a"], batch_idx)

    data = {"a": loader(32), "b": loader(8, batch_size=4)}
    run_range_test(trainer(), Two(), data, **SWEEP)
    assert Noted.notes == 10 * [4]
    Noted.notes.clear()
    # Inside a fit, where only the loaders without their mode are at hand.
    sweeps = Sweeps()
    trainer(callbacks=[sweeps], max_epochs=1).fit(Two(), CombinedLoader(data, "max_size"))
    one_epoch = [4, 4, None, None]
    assert Noted.notes == [*one_epoch, *one_epoch, 4, 4, *one_epoch]  # the sweep, then the fit


def test_a_plain_iterable_is_iterated_and_a_dry_one_ends_the_sweep():
    batches = [*loader(32)]
    _, losses = run_range_test(trainer(), module := Classifier(), Batches(*batches), **SWEEP)
    np.testing.assert_allclose(losses, by_hand(module, 3 * batches), rtol=1e-6)
    rates, _ = run_range_test(trainer(), Classifier(), iter(batches), **SWEEP)
    assert len(rates) == 4


class KeepsItsIterator(DataLoader):
    """As timm's loader for many short epochs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stream = super().__iter__()


class Locked(RandomSampler):
    def __init__(self, data):
        super().__init__(data)
        self.lock = threading.Lock()


def test_loaders_that_cannot_be_copied_are_refused():
    data = TensorDataset(*images(32))
    with pytest.raises(MisconfigurationException, match=r"KeepsItsIterator, which keeps an iterator \(`stream`\)"):
        run_range_test(trainer(), Classifier(), KeepsItsIterator(data, batch_size=8), **SWEEP)
    with pytest.raises(MisconfigurationException, match=r"cannot copy the sampler of DataLoader .*lock"):
        run_range_test(trainer(), Classifier(), DataLoader(data, batch_size=8, sampler=Locked(data)), **SWEEP)


def test_an_endless_dataset_is_shared():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*images(8), strict=True)

        def __deepcopy__(self, memo):
            raise AssertionError

    rates, _ = run_range_test(trainer(), Classifier(), DataLoader(Endless(), batch_size=8), **SWEEP)
    assert len(rates) == 10


def test_data_are_never_copied():
    class Large(TensorDataset):
        def __deepcopy__(self, memo):
            raise AssertionError

    class Holds(Classifier):
        def __init__(self):
            super().__init__()
            self.data = Large(*images(32))
            self.loader = DataLoader(Subset(self.data, range(32)), batch_size=8, sampler=RandomSampler(self.data))

        def train_dataloader(self):
            return self.loader

    rates, _ = run_range_test(trainer(), Holds(), **SWEEP)
    assert len(rates) == 10


def test_bf16_is_that_of_the_user():
    class Autocast(Classifier):
        def training_step(self, batch, batch_idx):
            Noted.notes.append(self.head(self.backbone(batch[0])).dtype)
            return super().training_step(batch, batch_idx)

    run_range_test(trainer(precision="bf16-mixed"), Autocast(), loader(), **SWEEP)
    assert set(Noted.notes) == {torch.bfloat16}


def test_a_module_may_hold_its_trainer(monkeypatch):
    def never(self, memo):
        raise AssertionError

    class Holds(Classifier):
        def on_fit_start(self):
            self.kept = [self.trainer, self.trainer.strategy, *self.trainer.callbacks, *self.trainer.loggers]

    for kind in (Trainer, Strategy, Sweeps, CSVLogger):
        monkeypatch.setattr(kind, "__deepcopy__", never, raising=False)
    sweeps = Sweeps()
    trainer(callbacks=[sweeps], logger=CSVLogger("logs"), max_epochs=1).fit(Holds(), loader())
    assert len(sweeps.result[0]) == 10


def test_nothing_is_validated():
    class Validates(Classifier):
        def val_dataloader(self):
            raise AssertionError

    assert len(run_range_test(trainer(), Validates(), loader(), **SWEEP)[0]) == 10


class NotedSometimesInfinite(SometimesInfinite, Noted):
    """Both."""


def test_a_step_that_the_grad_scaler_skips_is_no_point():
    scaler = (plugin := scaled()).scaler
    before = copy.deepcopy(scaler.state_dict())
    user = trainer(plugins=[plugin])
    rates, losses = run_range_test(user, NotedSometimesInfinite({0, 5, 6}), loader(), **SWEEP)
    np.testing.assert_allclose(rates, np.geomspace(1e-3, 1.0, 10), rtol=1e-12)
    assert Noted.notes == [[rate] for rate in rates]
    assert np.isfinite(losses).all()
    assert scaler.state_dict() == before
    assert user.precision_plugin.scaler is scaler


def test_when_all_steps_are_skipped_it_ends():
    assert run_range_test(trainer(plugins=[scaled()]), NotedSometimesInfinite(range(1000)), loader(), **SWEEP) == (
        [],
        [],
    )


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e6])
def test_it_stops_when_the_loss_diverges(bad):
    class Diverges(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * bad if len(self.losses) == 4 else loss

    _, losses = run_range_test(trainer(), Diverges(), loader(), **SWEEP | {"stop_factor": 4.0})
    assert len(losses) == 4


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says so once in a process
def test_batches_without_a_loss_are_no_points():
    class Skips(Noted):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    rates, losses = run_range_test(trainer(), Skips(), loader(32), **SWEEP)
    assert len(rates) == len(losses) == 10


def test_all_groups_get_the_rate_tensors_as_tensors_and_the_schedulers_rest():
    class Grouped(Noted):
        def configure_optimizers(self):
            groups = [
                {"params": self.backbone.parameters(), "lr": torch.tensor(5.0)},
                {"params": self.head.parameters(), "lr": 7.0},
            ]
            optimizer = torch.optim.SGD(groups)
            optimizer.register_step_post_hook(self._rates)
            length = self.trainer.max_epochs * 4  # the user's run, not the sweep's
            assert (length, self.trainer.estimated_stepping_batches) == (12, 12)
            step = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
            return [optimizer], [{"scheduler": step, "interval": "step", "monitor": "never logged"}]

        def _rates(self, optimizer, *_):
            super()._rates(optimizer)
            assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
            assert self.lr_schedulers() is not None

    rates, _ = run_range_test(trainer(), Grouped(), loader(), **SWEEP)
    np.testing.assert_allclose(Noted.notes, np.stack([rates, rates], axis=1), rtol=1e-6)


def test_rates_that_the_module_writes_in_its_hooks_do_not_disturb_the_sweep():
    class Writes(Noted):
        def training_step(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 77.0
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(self._rates)
            return optimizer

    rates, _ = run_range_test(trainer(), Writes(), loader(), **SWEEP)
    np.testing.assert_allclose(np.ravel(Noted.notes), rates)
    assert len(rates) == 10


def test_an_optimizer_without_torchs_hooks_is_swept_too():
    class Wrapped(Classifier):
        def configure_optimizers(self):
            return Wrapper(torch.optim.SGD(self.parameters(), lr=0.1))

    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    losses = []
    for make in (Plain, Wrapped):
        torch.manual_seed(0)
        losses.append(run_range_test(trainer(), make(), loader(), **SWEEP)[1])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_a_plateau_scheduler_misses_its_metric_and_nobody_minds():
    class Plateau(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    assert len(run_range_test(trainer(), Plateau(), loader(), **SWEEP)[0]) == 10


class Data(LightningDataModule):
    """Doubles the inputs on the device, and counts its hooks; its copies count in the class."""

    calls: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.value = 0

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append("setup")
        self.value += 1
        self.set = TensorDataset(*images(32))

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=8, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer.training
        return batch[0] * 2, batch[1]

    def teardown(self, stage):
        self.calls.append("teardown")


class Hooked(Noted):
    """Builds its head late, and has callbacks of its own."""

    def setup(self, stage):
        Data.calls.append("module setup")
        self.late = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        self.notes.append((float(batch[0].abs().max()), type(self.trainer.datamodule)))
        return super().training_step(batch, batch_idx)

    def configure_callbacks(self):
        Data.calls.append("callbacks")
        return [Callback()]


def test_a_datamodules_hooks_work_on_the_copy_and_its_own_state_stays():
    Data.calls.clear()
    data, sweeps, module = Data(), Sweeps(), Hooked()
    user = trainer(callbacks=[sweeps], max_epochs=1)
    user.fit(module, datamodule=data)
    assert Data.calls == ["callbacks", "prepare", "setup", "module setup", "teardown"]
    assert data.trainer is user
    assert data.value == 1
    batches = [note for note in Noted.notes if isinstance(note, tuple)]
    assert len(batches) == 10 + 4
    assert {kind for _, kind in batches} == {Data}
    assert batches[0][0] > 5  # doubled


def test_before_a_fit_the_copies_are_set_up_and_the_originals_are_not():
    Data.calls.clear()
    data, module, user = Data(), Hooked(), trainer()
    rates, _ = run_range_test(user, module, datamodule=data, **SWEEP)
    assert len(rates) == 10
    assert Data.calls == ["prepare", "setup", "module setup", "teardown"]
    assert data.trainer is None
    assert data.value == 0
    assert not hasattr(data, "set")
    assert not hasattr(module, "late")


def test_a_loader_beside_a_datamodule_is_taken():
    rates, _ = run_range_test(trainer(), Classifier(), loader(), datamodule=Data(), **SWEEP)
    assert len(rates) == 10


def test_loggers_and_callbacks_hear_nothing():
    class Talks(Everything):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"said": 1.0})
            return super().training_step(batch, batch_idx)

    class Counts(Callback):
        batches = 0

        def on_train_batch_start(self, *_):
            self.batches += 1

    logger, counts = CSVLogger("logs"), Counts()
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.append(metrics)
    run_range_test(trainer(callbacks=[counts], logger=logger), Talks(), loader(), **SWEEP)
    assert not logged
    assert counts.batches == 0
    assert not os.path.exists("logs")


def test_the_copy_is_not_kept(monkeypatch):
    copies = []
    deepcopy = copy.deepcopy

    def noted(thing, memo=None):
        twin = deepcopy(thing, memo)
        if isinstance(thing, LightningModule):
            copies.append(weakref.ref(twin))
        return twin

    monkeypatch.setattr("lightning_speedups.attach.range_test.copy.deepcopy", noted)
    result = run_range_test(trainer(), Everything(), shuffled(), **SWEEP)
    gc.collect()
    assert [reference() for reference in copies] == [None]
    assert len(result[0]) == 10


@pytest.mark.parametrize("compiled", ["module", "in place", "part"])
def test_of_a_compiled_module_the_copy_alone_is_trained(compiled):
    module = Everything()
    if compiled == "module":
        module = torch.compile(module, backend="eager", dynamic=False)
    elif compiled == "in place":
        module.compile(backend="eager")
    else:
        module.backbone = torch.compile(module.backbone, backend="eager")

    class Compares(Sweeps):
        def on_train_start(self, trainer, pl_module):
            before, called = state(pl_module), pl_module.training_step
            super().on_train_start(trainer, pl_module)
            assert_same_weights(before, state(pl_module))
            assert pl_module.training_step == called

    sweeps = Compares()
    arguments = {"callbacks": [sweeps], "max_epochs": 1, "limit_train_batches": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(**arguments).fit(module, loader())
    assert len(sweeps.result[0]) == 10


def test_no_second_banner_and_a_bar_only_where_there_is_one(capsys, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    quiet, shown = trainer(), trainer(enable_progress_bar=True)
    caplog.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_range_test(quiet, Classifier(), loader(), **SWEEP)
    assert not [warning for warning in told if issubclass(warning.category, PossibleUserWarning)]
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    run_range_test(shown, Classifier(), loader(), **SWEEP)
    assert "LR range test" in capsys.readouterr().err
    trainer()
    assert any("GPU available" in record.message for record in caplog.records)


class NoOptimizer(Classifier):
    def configure_optimizers(self):
        return None


class Lambda(Classifier):
    def __init__(self):
        super().__init__()
        self.read = lambda: self.lr


class LambdaOnAMethod(Classifier):
    def __init__(self):
        super().__init__()
        method = self.configure_optimizers
        self.make = lambda: method()


class Hook(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone.register_forward_hook(lambda *_: self.seen.append(None))


class Uncopyable(Classifier):
    def __init__(self):
        super().__init__()
        self.stream = (i for i in range(3))


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Manual, "Manual optimizes manually"),
        (NoOptimizer, "drives one optimizer with an `lr`"),
        (Lambda, "`read` is a function that has captured"),
        (LambdaOnAMethod, "`make` is a function that has captured"),
        (Hook, "`backbone._forward_hooks` is a function that has captured"),
        (Uncopyable, "Uncopyable cannot be copied .*generator"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_way_out(kind, told):
    with pytest.raises(MisconfigurationException, match=f"{told}.* Give the learning rate as a number"):
        run_range_test(trainer(), kind(), loader(), **SWEEP)


def test_functions_that_do_not_hold_the_model_are_no_hindrance():
    class Harmless(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone.register_forward_hook(self.note)
            self.backbone.register_forward_hook(partial(self.note))
            factor = 2.0
            self.double = lambda x: x * factor
            self.twice = nn.ModuleList([self.head])

        def note(self, *_):
            Noted.notes.append(id(self))

    module = Harmless()
    run_range_test(trainer(), module, loader(), **SWEEP)
    assert len(Noted.notes) == 20
    assert id(module) not in Noted.notes


class Groups(Classifier):
    def configure_optimizers(self):
        groups = [{"params": self.backbone.parameters(), "lr": torch.tensor(0.01)}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=5)]


@pytest.mark.parametrize("within", [False, True])
def test_the_modules_own_rates_are_those_before_any_schedule(within):
    found = []

    class Asks(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(range_test.run_range_test(trainer, pl_module, Sweep(**SWEEP)))

    if within:
        trainer(callbacks=[Asks()], max_epochs=1).fit(Groups(), loader())
    else:
        found.append(range_test.run_range_test(trainer(), Groups(), Sweep(**SWEEP), loader()))
    np.testing.assert_allclose(found[0][2], [0.01, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("hook", "call", "place"),
    [
        ("configure_optimizers", 1, "in its set-up."),
        ("training_step", 1, "in step 1 of 10, at the rate 0.001."),
        ("training_step", 4, "in step 4 of 10, at the rate 0.01."),
        ("on_after_backward", 10, "in step 10 of 10, at the rate 1."),
        ("on_train_end", 1, "in step 10 of 10, at the rate 1."),
    ],
)
def test_an_error_of_the_modules_carries_a_note_of_the_place_in_the_sweep(hook, call, place):
    class Breaks(Classifier):
        calls = 0

    def broken(self, *args, **kwargs):
        self.calls += 1
        if self.calls == call:
            raise KeyError("the module's own")
        return getattr(Classifier, hook)(self, *args, **kwargs)

    setattr(Breaks, hook, broken)
    with pytest.raises(KeyError, match="the module's own") as told:
        run_range_test(trainer(), Breaks(), loader(), **SWEEP)
    (note,) = told.value.__notes__
    assert note == f"This was raised in a learning-rate range test, on a copy of the module: {place}"


def test_strategies_that_split_the_parameters_are_refused():
    user = trainer()
    user._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy may split .* as a number"):
        run_range_test(user, Classifier(), loader(), **SWEEP)


class Writes(Callback):
    """Sweeps in each of two processes, and writes what came out."""

    def on_train_start(self, trainer, pl_module):
        before = weights(pl_module)
        try:
            result = range_test.run_range_test(trainer, pl_module, Sweep(**SWEEP), trainer.train_dataloader)
        except RuntimeError as error:
            result = str(error)
        assert_same_weights(before, weights(pl_module))
        torch.save(result, f"rank{trainer.global_rank}.pt")


class Measured(Regressor):
    """A metric that waits for the other processes, and a step that can break."""

    broken = False

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch, batch_idx):
        self.accuracy(torch.rand(4, CLASSES), torch.zeros(4, dtype=torch.int64))
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.broken and self.trainer.world_size == 1:
            raise RuntimeError("broken on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("broken", [False, True])
def test_of_two_processes_the_first_sweeps_and_tells_the_other(broken, monkeypatch):
    monkeypatch.setattr(Measured, "broken", broken)
    two([Writes()], max_epochs=1, accumulate_grad_batches=2).fit(Measured())
    first, second = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    if broken:
        assert first == "broken on purpose"
        assert second == "The learning-rate range test failed in the first process: RuntimeError: broken on purpose"
        return
    assert first == second
    assert first[2] == [Measured().configure_optimizers().param_groups[0]["lr"]]
    # Four batches of its own make a step: what one process alone does with four times the accumulation.
    module = Measured()
    alone = trainer(accumulate_grad_batches=4)
    data = DataLoader(TensorDataset(*(part[::2] for part in regression().tensors)), batch_size=4)
    np.testing.assert_allclose(first[1], run_range_test(alone, module, data, **SWEEP)[1], rtol=1e-6)


def test_before_two_processes_are_started_one_sweeps_for_both():
    module, data = Classifier(), loader(64)
    _, losses = run_range_test(two([], accumulate_grad_batches=2), module, data, **SWEEP)
    np.testing.assert_allclose(losses, by_hand(module, 5 * [*data], accumulate=4), rtol=1e-5)
