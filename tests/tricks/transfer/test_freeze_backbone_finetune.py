"""Frozen means frozen, to the bit; the optimizer's groups, the resume and the rates that follow."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import StepLR

from lightning_speedups import FreezeBackboneFinetune, OneCycleMomentum, WarmupLRScaler
from lightning_speedups.core.schedules import OneCycle
from lightning_speedups.tricks.transfer.base import find_layers
from zoo import (
    CLASSES,
    Classifier,
    ReplayLoader,
    Timm,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scheduled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [FreezeBackboneFinetune("backbone", unfreeze_at_epoch=1)]}


NORMS = {
    "batch": lambda: nn.BatchNorm2d(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "layer": lambda: nn.LayerNorm([6, 6, 6]),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "spectral": lambda: spectral_norm(nn.Conv2d(6, 6, 1)),
}


def model(norm="batch", optimizer="sgd", cls=Classifier):
    module = cls(optimizer=optimizer)
    module.backbone[1] = NORMS[norm]()
    return module


class Spy(Classifier):
    """Calls train() where it should not, and notes what it finds in each step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.notes = []

    def training_step(self, batch, batch_idx):
        self.train()
        features = self.backbone(batch[0])
        self.notes.append(
            (self.current_epoch, features.grad_fn is not None, self.backbone[1].training, weights(self.backbone))
        )
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_frozen_backbone_keeps_every_bit_and_no_graph_then_all_of_it_trains(norm, optimizer):
    module = model(norm, optimizer, Spy)
    start = weights(module)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=2)], max_epochs=4).fit(module, loader(), loader())
    for epoch, graph, _, backbone in module.notes:
        assert graph == (epoch >= 2)
        if epoch < 2:
            assert_same_weights(
                {f"backbone.{name}": value for name, value in backbone.items()},
                {k: v for k, v in start.items() if k.startswith("backbone.")},
            )
    if norm in ("batch", "instance"):
        assert [training for *_, training, _ in module.notes] == [epoch >= 2 for epoch, *_ in module.notes]
    assert not any(
        torch.equal(start[name], value) for name, value in weights(module).items() if value.is_floating_point()
    )


def test_gradients_left_from_before_do_not_move_a_frozen_backbone():
    class NeverZeroed(Classifier):
        def optimizer_zero_grad(self, *_):
            pass

    module = NeverZeroed()
    F.cross_entropy(module.head(module.backbone(torch.randn(8, 2, 8, 8))), torch.arange(8) % CLASSES).backward()
    start = weights(nn.ParameterList(module.backbone.parameters()))
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=None)], max_epochs=1).fit(module, loader())
    assert_same_weights(start, weights(nn.ParameterList(module.backbone.parameters())))


def test_norms_may_train_while_the_rest_is_frozen():
    module = model(cls=Spy)
    start = weights(module.backbone)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=None, train_norm=True)]).fit(module, loader())
    changed = {name for name, value in weights(module.backbone).items() if not torch.equal(start[name], value)}
    assert changed == {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_the_backbone_trains_at_its_ratio_in_groups_that_exist_from_the_start():
    module = Classifier(lr=0.2)
    trainer(callbacks=[FreezeBackboneFinetune(backbone_lr_ratio=0.25)]).fit(module, loader())
    assert [[group["lr"] for group in step] for step in module.values] == [[0.2, 0.05]] * 12


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_the_ratio_stays_on_top_of_schedulers_and_of_the_other_tricks():
    module = scheduled(lambda optimizer: StepLR(optimizer, 5, gamma=0.1), lr=0.2)
    trainer(callbacks=[FreezeBackboneFinetune(backbone_lr_ratio=0.25)]).fit(module, loader())
    head = np.array([0.2 * 0.1 ** (t // 5) for t in range(12)])
    np.testing.assert_allclose(
        [[group["lr"] for group in step] for step in module.values], np.stack([head, head / 4], 1)
    )
    module = Classifier()
    tricks = [
        FreezeBackboneFinetune(backbone_lr_ratio=0.25),
        OneCycleMomentum(0.4),
        WarmupLRScaler(scale=2.0, warmup_steps=0),
    ]
    trainer(callbacks=tricks).fit(module, loader())
    head = np.array([2 * OneCycle().at(t, 12, max_lr=0.4)[0] for t in range(12)])
    np.testing.assert_allclose(
        [[group["lr"] for group in step] for step in module.values], np.stack([head, head / 4], 1)
    )


@pytest.mark.parametrize("stop", [1, 6, 8, 9, 15])  # it thaws after 8 of 16 steps
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_before_at_and_past_the_unfreeze_it_equals_the_whole_run(stop, optimizer):
    whole, parted = model(optimizer=optimizer), model(optimizer=optimizer)
    parted.load_state_dict(whole.state_dict())
    make = partial(FreezeBackboneFinetune, unfreeze_at_epoch=2)
    trainer(callbacks=[make()], max_epochs=4).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), stop, [make()], max_epochs=4)
    resume(parted, ReplayLoader(), [make()], max_epochs=4)
    assert_same_weights(weights(whole), weights(parted))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resumed_from_the_end_of_an_epoch_it_equals_the_whole_run(epoch):
    whole, parted = model(), model()
    parted.load_state_dict(whole.state_dict())
    make = partial(FreezeBackboneFinetune, unfreeze_at_epoch=2)
    trainer(callbacks=[make()], max_epochs=4).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 4 * epoch, [make()], epoch_end=True, max_epochs=4)
    resume(parted, ReplayLoader(), [make()], max_epochs=4)
    assert_same_weights(weights(whole), weights(parted))


class NormFreeBlock(nn.Module):
    """Named after a norm and with a buffer, but a container: of a norm, a dropout and a norm inside another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.inner = nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.0))

    def forward(self, inputs):
        return self.inner(inputs - self.mean)


def test_modes_of_nested_modules_are_kept_and_given_back():
    class Module(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone[1] = NormFreeBlock()
            self.modes = []

        def training_step(self, batch, batch_idx):
            self.train()
            block = self.backbone[1]
            self.modes.append((block.inner[0].training, block.inner[1].training, self.head.training))
            return super().training_step(batch, batch_idx)

    module = Module()
    start = weights(module.backbone)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=None)], max_epochs=1).fit(module, loader())
    assert set(module.modes) == {(False, False, True)}  # the norm and the dropout rest, the head does not
    assert_same_weights(start, weights(module.backbone))
    assert all(sub.training for sub in module.modules())
    module.modes.clear()
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=1)], max_epochs=2).fit(module, loader())
    assert module.modes[4:] == [(True, True, True)] * 4


def test_a_frozen_root_with_a_buffer_does_not_switch_off_its_head():
    class Root(Classifier):
        def __init__(self):
            super().__init__()
            self.model = NormFreeBlock()
            self.model.head = self.head
            del self.head
            self.model.backbone = self.backbone
            del self.backbone

        def training_step(self, batch, batch_idx):
            self.train()
            assert self.model.head.training
            return F.cross_entropy(self.model.head(self.model.backbone(batch[0])), batch[1])

    module = Root()

    def all_but_the_head(module):
        return [module.model.backbone, module.model.inner]

    trainer(callbacks=[FreezeBackboneFinetune(all_but_the_head)], max_epochs=2).fit(module, loader())
    assert all(sub.training for sub in module.modules())


def test_groups_keep_their_places_and_what_is_split_off_comes_last():
    class Grouped(Classifier):
        def configure_optimizers(self):
            groups = [
                {"params": [self.backbone[0].weight, self.head.weight], "lr": 0.1},
                {"params": [self.head.bias], "lr": 0.2},
                {"params": [*self.backbone[1].parameters(), self.backbone[0].bias], "lr": 0.3},
            ]
            optimizer = torch.optim.SGD(groups, 1.0)
            assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.1]
            optimizer.register_step_pre_hook(self._note)
            return optimizer

    module = Grouped()
    callback = FreezeBackboneFinetune(unfreeze_at_epoch=None, backbone_lr_ratio=0.5)
    trainer(callbacks=[callback], max_epochs=1).fit(module, loader())
    np.testing.assert_allclose([group["lr"] for group in module.values[0]], [0.1, 0.2, 0.15, 0.05])


def test_an_error_that_the_split_groups_may_have_caused_names_the_trick():
    class OneLambda(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])]

    with pytest.raises(ValueError, match="Expected 2 lr_lambdas") as caught:
        trainer(callbacks=[FreezeBackboneFinetune()]).fit(OneLambda(), loader())
    assert caught.value.__notes__ == ["FreezeBackboneFinetune split the parameter groups; the new ones come last."]


def test_a_frozen_module_can_be_copied_and_pickled():
    class Copying(Classifier):
        def on_train_batch_end(self, *_):
            for twin in (copy.deepcopy(self.backbone), pickle.loads(pickle.dumps(self.backbone))):
                twin.train()
                assert not twin[1].training
                assert twin[1] is not self.backbone[1]
                assert twin[1].train.module is twin[1]
            self.copied = True

    module = model(cls=Copying)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=None)], max_epochs=1).fit(module, loader())
    assert module.copied


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit", "efficientnet_lite0"])
def test_a_timm_model_without_a_name_is_frozen_all_but_its_classifier(name):
    module = Timm(name)
    start = weights(module)
    trainer(callbacks=[FreezeBackboneFinetune(None, unfreeze_at_epoch=None)], max_steps=2).fit(module, loader())
    changed = {name for name, value in weights(module).items() if not torch.equal(start[name], value)}
    assert changed == {f"model.{name}" for name in module.of_classifier}


@pytest.mark.parametrize("pick", [lambda m: m.backbone, lambda m: [m.backbone[0], m.backbone[1]], "backbone"])
def test_a_backbone_by_path_or_by_callable(pick):
    module = model()
    start = weights(module)
    trainer(callbacks=[FreezeBackboneFinetune(pick, unfreeze_at_epoch=None)]).fit(module, loader())
    changed = {name for name, value in weights(module).items() if not torch.equal(start[name], value)}
    assert changed == {"head.weight", "head.bias"}


class OnlyHead(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.1)


class MadeBefore(Classifier):
    def __init__(self):
        super().__init__()
        self.made = [torch.optim.SGD(self.parameters(), 0.1)]

    def configure_optimizers(self):
        return self.made[0]


class NothingTimm(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("resnet10t", num_classes=0)

    training_step = Classifier.training_step
    configure_optimizers = Timm.configure_optimizers


@pytest.mark.parametrize(
    ("module", "backbone", "told"),
    [
        (Classifier, "encoder", r"Classifier has no such submodule. It has \['backbone', 'head'\]"),
        (Classifier, lambda module: 3, "must pick nn.Modules, but it picked 3"),
        (Classifier, lambda module: [], "must pick nn.Modules"),
        (Classifier, lambda module: module, "nothing is left to train"),
        (OnlyHead, "backbone", "4 of the backbone's trainable parameters are in no optimizer"),
        (MadeBefore, "backbone", "backbone and head in one parameter group"),
        (NothingTimm, None, "the classifier of ResNet has no parameters"),
    ],
)
def test_what_cannot_work_is_refused_at_fit_start(module, backbone, told):
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[FreezeBackboneFinetune(backbone)]).fit(module(), loader())


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": ""},
        {"backbone": 3},
        {"unfreeze_at_epoch": -1},
        {"backbone_lr_ratio": 0.0},
        {"backbone_lr_ratio": float("nan")},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Expected `{name}` to be .*, but got"):
        FreezeBackboneFinetune(**arguments)


def test_modules_of_the_backbone_come_once_each():
    module = model()
    _, layers = find_layers(module, lambda module: [module.backbone, module.backbone[0]])
    assert [(layer.name, list(layer.modules)) for layer in layers] == [("backbone", list(module.backbone[:2]))]


def test_lightnings_own_finetuning_moves_the_statistics_that_ours_keeps():
    """The reason for this callback: frozen BatchNorm there still normalises with the batch (Lightning #15062)."""

    class Finetuned(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    def first_features(callback, cls):
        module, features = cls(), []
        module.backbone.register_forward_hook(lambda *args: features.append(args[2].detach()))
        trainer(callbacks=[callback], max_epochs=1).fit(module, loader(8))
        module.eval()
        return features[0], module.backbone(loader(8).dataset.tensors[0])

    trained, evaluated = first_features(FreezeBackboneFinetune(unfreeze_at_epoch=None, fold=False), Classifier)
    assert torch.equal(trained, evaluated)
    trained, evaluated = first_features(BackboneFinetuning(5, verbose=False, train_bn=False), Finetuned)
    assert not torch.allclose(trained, evaluated, rtol=0.01)


@pytest.mark.parametrize(("norm", "traces"), [(nn.BatchNorm2d, True), (partial(nn.GroupNorm, 2), False)])
def test_a_backbone_without_batch_norm_is_not_traced_whatever_the_head_holds(norm, traces, monkeypatch):
    class Whole(Classifier):
        def __init__(self):
            super().__init__()
            backbone = nn.Sequential(nn.Conv2d(2, 6, 3), norm(6))
            self.backbone = nn.Sequential(
                backbone, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )

    seen, trace = [], torch.fx.Tracer.trace
    monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *args: seen.append(args[1]) or trace(*args))
    module = Whole()
    trainer(callbacks=[FreezeBackboneFinetune("backbone.0", unfreeze_at_epoch=None)], max_epochs=1).fit(
        module, loader()
    )
    assert bool(seen) == traces
