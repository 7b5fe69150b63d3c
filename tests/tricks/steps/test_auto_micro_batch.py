"""A run whose memory runs out ends where one with enough of it ends; what failed leaves no trace."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_speedups import (
    AutoMicroBatch,
    AveragedWeights,
    BatchAugmentation,
    EffectiveBatchSize,
    FeatureCache,
    FreezeBackboneFinetune,
    MixupCallback,
    OneCycleMomentum,
    SubsetTraining,
)
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    Manual,
    Memory,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    images,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)

PLACES = ["forward", "backward", "step"]
every_place = pytest.mark.parametrize("where", PLACES)


def EXAMPLE():
    return {"callbacks": [AutoMicroBatch()]}


class Scarce(torch.optim.SGD):
    """Makes some of its state, writes where it can, and then has no memory for the rest."""

    lacks = None

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weight = self.param_groups[0]["params"][0]
        try:
            self.lacks()
        except torch.OutOfMemoryError:
            self.state[weight]["half"] = torch.zeros_like(weight)
            with torch.no_grad():
                weight.mul_(0.5)
                weight.grad.mul_(3.0)
            raise
        super().step()
        return loss


class Net(LightningModule):
    """Runs out of memory with more than so many samples at one place in a step, after it has changed what it can."""

    def __init__(self, fits=None, where="forward", since=0, norm=None, dropout=0.0, noise=False):
        super().__init__()
        torch.manual_seed(3)
        norm = nn.GroupNorm(2, 6) if norm is None else norm
        self.backbone = nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(6, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.register_buffer("count", torch.zeros(()))
        self.fits, self.where, self.since, self.noise = fits, where, since, noise
        self.sizes, self.failed, self.optimizer = [], 0, None

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        self.sizes.append(len(inputs))
        self.number = batch_idx
        features = self.dropout(self.backbone(inputs))
        if features.requires_grad:
            features.register_hook(lambda _: self.lack("backward"))
        scores = self.head(features)
        losses = F.cross_entropy(scores.float(), labels, reduction="none")
        loss = losses.mean() * (1 + self.noise * (random.random() + np.random.rand()))  # noqa: NPY002
        self.count += len(inputs)
        self.accuracy(scores.detach(), labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("given", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
        self.log("constant", loss, on_step=False, on_epoch=True, batch_size=1)
        if batch_idx == 1:
            self.log("seldom", loss, on_step=False, on_epoch=True)
        self.log("worst", losses.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("total", losses.sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.lack("forward")
        return {"loss": loss, "scores": scores.detach()}

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", self.head.weight.grad.norm())

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.log("stepped", self.head.bias.norm(), on_step=False, on_epoch=True)

    def lack(self, where):
        is_large = self.fits is not None and self.sizes[-1] > self.fits
        # The optimizer's first step is what may lack memory.
        lacks = not self.failed if where == "step" else self.number >= self.since
        if where == self.where and is_large and lacks:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def configure_optimizers(self):
        self.optimizer = Scarce(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        self.optimizer.lacks = partial(self.lack, "step")
        return self.optimizer


def fitted(module, *tricks, data=None, **arguments):
    """A module after two epochs of three batches of 8 samples and one of 7."""
    memory = Memory()
    options = {"max_epochs": 2, "logger": memory, "log_every_n_steps": 1, **arguments}
    trainer(callbacks=[*tricks], **options).fit(module, loader(31) if data is None else data)
    module.logged = memory
    return module


def apart(one, other):
    """How far the parameters of two modules are apart, as a share of them."""
    one, other = (torch.cat([p.detach().double().flatten() for p in module.parameters()]) for module in (one, other))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.05), (2, 0.05), (3, None)])
@every_place
def test_a_run_that_runs_out_of_memory_ends_where_one_with_enough_ends(where, accumulate, clip):
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    whole = fitted(Net(), **arguments)
    micro = AutoMicroBatch()
    split = fitted(Net(fits=5, where=where, since=1), micro, **arguments)
    assert (split.failed, micro.size) == (1, None if where == "step" else 4)
    assert apart(split, whole) < 1e-6
    assert apart(split, Net()) > 1e-3
    assert len(whole.logged["norm"]) == len(split.logged["norm"])
    assert split.logged["norm"] == pytest.approx(whole.logged["norm"], rel=1e-4)


@pytest.mark.parametrize(("fits", "sizes"), [(5, [4, 4]), (3, [2, 2, 2, 2]), (1, [1] * 8)])
def test_the_size_is_halved_until_it_fits_and_remembered(fits, sizes):
    micro = AutoMicroBatch()
    split = fitted(Net(fits=fits), micro, max_epochs=1)
    attempts = [size for size in (8, 4, 2, 1) if size > sizes[0]]
    assert split.sizes[: len(attempts) + len(sizes)] == attempts + sizes
    assert split.sizes[len(attempts) :][: 3 * len(sizes)] == 3 * sizes
    assert max(split.sizes[len(attempts) :]) == micro.size == sizes[0]
    assert split.failed == len(attempts)
    assert apart(split, fitted(Net(), max_epochs=1)) < 1e-6


@pytest.mark.parametrize("start", [1, 3, 4, 5, 8, 100])
def test_any_size_gives_what_whole_batches_give_uneven_ones_too(start):
    whole, split = fitted(Net()), fitted(Net(), AutoMicroBatch(start))
    assert apart(split, whole) < 1e-6
    assert max(split.sizes) == {3: 3, 5: 4}.get(start, min(start, 8))
    assert split.count == whole.count == 62


def noisy(**options):
    """A module with everything that an attempt changes, and the random states as they were for the one before."""
    net = Net(norm=nn.BatchNorm2d(6), dropout=0.5, noise=True, **options)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    return net


def assert_same_run(one, other):
    assert_same_weights(weights(one), weights(other))
    assert one.logged.metrics == other.logged.metrics
    states = [{key: value for key, value in module.optimizer.state_dict()["state"].items()} for module in (one, other)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        assert all(torch.equal(value, states[1][number][key]) for key, value in state.items())


def test_a_run_that_fits_is_the_same_to_the_bit():
    assert_same_run(fitted(noisy(), AutoMicroBatch()), fitted(noisy()))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16 with a scaler"])
@pytest.mark.parametrize(
    ("where", "accumulate"), [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2), ("step", 1)]
)
def test_an_attempt_that_failed_leaves_no_trace(where, accumulate, half):
    def run(module, start):
        plugins = [scaled(64.0)] if half else []
        return fitted(module, AutoMicroBatch(start), plugins=plugins, accumulate_grad_batches=accumulate)

    failing = run(noisy(fits=5, where=where), "full")
    assert failing.failed == 1
    assert_same_run(failing, run(noisy(), "full" if where == "step" else 4))


def test_a_step_that_the_scaler_skips_is_skipped():
    class Infinite(Net):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return output | {"loss": output["loss"] * (float("inf") if batch_idx == 1 else 1.0)}

    runs = [
        fitted(Infinite(fits=fits), *tricks, plugins=[scaled(64.0)])
        for fits, tricks in ((None, []), (5, [AutoMicroBatch()]))
    ]
    assert runs[1].failed == 1
    assert apart(*runs) < 1e-2  # the digits of half precision


def test_loggers_get_one_right_value_for_each_batch_and_for_the_epoch():
    whole, split = fitted(Net()), fitted(Net(), AutoMicroBatch(start=3))
    names = {name for metrics in whole.logged.metrics for name in metrics}
    assert names >= {
        "loss_step",
        "loss_epoch",
        "accuracy_step",
        "accuracy_epoch",
        "worst_step",
        "total_epoch",
        "given",
        "constant",
        "seldom",
    }
    assert names == {name for metrics in split.logged.metrics for name in metrics}
    for name in names - {"accuracy_step"}:  # that of the last micro-batch
        assert split.logged[name] == pytest.approx(whole.logged[name], rel=1e-5), name


class Outputs(Callback):
    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def test_the_loss_is_handed_on_for_the_whole_batch_and_nothing_else():
    one, other = Outputs(), Outputs()
    fitted(Net(), one)
    fitted(Net(), AutoMicroBatch(start=3), other)
    for whole, split in zip(one.outputs, other.outputs, strict=True):
        torch.testing.assert_close(split["loss"], whole["loss"])
        assert split["loss"].grad_fn is None
        assert (split.keys(), whole.keys()) == ({"loss"}, {"loss", "scores"})


class Grows(Callback):
    """Asks for larger micro-batches after an epoch, from when on there is more memory."""

    def __init__(self, micro):
        self.micro = micro

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.fits = 6
        self.micro.grow()


def test_it_grows_on_request_and_takes_back_what_was_too_much():
    micro = AutoMicroBatch(start=1)
    net = fitted(Net(fits=8), micro, Grows(micro), max_epochs=4, data=loader(16))
    assert net.sizes == [1] * 16 + [2] * 8 + [4] * 4 + [8] + [4] * 4
    assert (net.failed, micro.size) == (1, 8)  # and it was asked once more


BESIDE = {
    "MixupCallback": lambda: MixupCallback(alpha=1.0, cutmix_alpha=1.0, seed=0),
    "BatchAugmentation": lambda: BatchAugmentation(crop=1, seed=0),
    "SubsetTraining": lambda: SubsetTraining(0.5, "random", stop_at=1.0, seed=0),
    "FreezeBackboneFinetune": lambda: FreezeBackboneFinetune(unfreeze_at_epoch=1),
    "OneCycleMomentum": lambda: OneCycleMomentum(0.2),
    "AveragedWeights": AveragedWeights,
    "EffectiveBatchSize": lambda: EffectiveBatchSize(24),
}


@pytest.mark.parametrize("name", BESIDE)
@every_place
def test_beside_tricks_that_change_batches_or_steps_a_run_ends_as_with_these_alone(name, where):
    whole = fitted(Net(), BESIDE[name]())
    split = fitted(Net(5, where), BESIDE[name](), AutoMicroBatch())
    assert split.failed == 1
    assert apart(split, whole) < 1e-5


@every_place
def test_a_resumed_run_knows_the_size_and_ends_with_the_same_bits(where):
    whole, parted, rest = (Net(fits, where) for fits in (5, 5, None if where == "step" else 5))
    fitted(whole, AutoMicroBatch(), data=ReplayLoader(), max_epochs=3)
    fit_interrupted(parted, ReplayLoader(), 6, [AutoMicroBatch()])
    micro = AutoMicroBatch()
    resume(rest, ReplayLoader(), [micro])
    assert (parted.failed, rest.failed, micro.size) == (1, 0, None if where == "step" else 4)
    assert_same_weights(weights(rest), weights(whole))


@pytest.mark.parametrize(("min_size", "largest"), [(1, 1), (3, 3), (4, 4), (8, 8)])
def test_a_batch_that_does_not_fit_in_the_smallest_size_ends_the_run(min_size, largest):
    said = rf"AutoMicroBatch\(min_size={min_size}\) ran out of memory with {largest} of a batch's samples at a time .*2\.00 GiB"
    with pytest.raises(MisconfigurationException, match=f"{said}.*half precision"):
        fitted(Net(fits=0), AutoMicroBatch(min_size=min_size))


def test_another_error_is_not_caught():
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    micro = AutoMicroBatch()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fitted(Wrong(), micro)
    assert micro.size is None


class Lacks(Net):
    def lack(self, where):
        if where == "step" and self.number == self.since:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("since", "attempts"), [(0, 2), (1, 1)])
def test_an_optimizer_that_fails_twice_or_in_a_later_step_ends_the_run(since, attempts):
    net = Lacks(since=since)
    with pytest.raises(torch.OutOfMemoryError):
        fitted(net, AutoMicroBatch())
    assert net.failed == attempts


class Twice(torch.optim.SGD):
    """Steps from two gradients, of which the second is that after the first step."""

    def step(self, closure=None):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            super().step()
        return loss


@pytest.mark.parametrize("start", ["full", 3])
def test_an_optimizer_that_asks_for_gradients_twice_gets_new_ones(start):
    nets = [Net(), Net()]
    for net, tricks in zip(nets, ([], [AutoMicroBatch(start)]), strict=True):
        net.configure_optimizers = lambda net=net: Twice(net.parameters(), lr=0.1)
        fitted(net, *tricks)
    assert apart(*nets) < 1e-6


def test_memory_that_runs_out_before_the_batch_begins_is_not_its_fault():
    class Early(Net):
        def optimizer_step(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fitted(Early(), AutoMicroBatch())


def test_a_batch_that_cannot_be_split_is_refused_although_it_fits():
    inputs, labels = images(8)
    for batch, said in (
        (
            [inputs, labels, torch.ones(3)],
            r"^AutoMicroBatch cuts .* 8 samples first, but got \(3,\)\. Let `collate_fn`.*graphs",
        ),
        (["no tensor"], "tensors with samples, but found none"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            fitted(Net(), AutoMicroBatch(), data=Batches(batch))


class Fetches(Net):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_fetches_its_batches_itself_is_refused():
    with pytest.raises(MisconfigurationException, match="tensors with samples, but found none"):
        fitted(Fetches(), AutoMicroBatch())


class Lbfgs(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("make", "tricks", "what"),
    [
        (Manual, [], "manual optimization"),
        (Lbfgs, [], "LBFGS"),
        (Classifier, [lambda: SubsetTraining(0.5)], "SubsetTraining"),
        (Classifier, [FeatureCache], "FeatureCache"),
    ],
    ids=["manual", "LBFGS", "subsets", "features"],
)
def test_what_does_not_go_with_it_is_refused_by_name(make, tricks, what):
    with pytest.raises(MisconfigurationException, match=f"AutoMicroBatch does not go with {what}.*Leave out one"):
        trainer(callbacks=[AutoMicroBatch(), *(trick() for trick in tricks)]).fit(make(), loader())


def test_strategies_that_split_or_wait_are_refused():
    synchronised, static = Classifier(), DDPStrategy()
    synchronised.backbone[1] = nn.SyncBatchNorm(6)
    static.model = SimpleNamespace(static_graph=True)
    for strategy, module, what in (
        (FSDPStrategy(), Classifier(), "whole gradients, which FSDPStrategy may split"),
        (DDPStrategy(), synchronised, "SyncBatchNorm"),
        (static, Classifier(), "static_graph"),
    ):
        with pytest.raises(MisconfigurationException, match=what):
            AutoMicroBatch().on_fit_start(SimpleNamespace(strategy=strategy, world_size=2, callbacks=[]), module)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"min_size": 0}, "Expected `min_size` to be a whole number of 1 or more, but got 0."),
        ({"start": 0}, "Expected `start` to be a whole number of 1 or more, but got 0."),
        ({"start": 4, "min_size": 8}, "Expected `start` to be a whole number of 8 or more, but got 4."),
        ({"start": "half"}, "Expected `start` to be a whole number of 1 or more, but got 'half'."),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        AutoMicroBatch(**arguments)
