"""Layer by layer: who trains when and at which rate, what is saved meanwhile, and the resume of all that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_speedups import FreezeBackboneFinetune, FreezeProgressively, OneCycleMomentum, Plateau, WarmupLRScaler
from lightning_speedups.core.schedules import OneCycle
from zoo import (
    Classifier,
    Interrupted,
    Memory,
    ReplayLoader,
    Timm,
    TwoOptimizers,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)

LAYERS = ["0", "3", "6"]
NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


class Deep(Classifier):
    """Three layers of convolution, norm and ReLU; notes after each step which of them could train."""

    def __init__(self, norm="batch", **arguments):
        torch.manual_seed(7)
        super().__init__(**arguments)
        blocks = [
            part for i in range(3) for part in (nn.Conv2d(6 if i else 2, 6, 3, padding=1), NORMS[norm](6), nn.ReLU())
        ]
        self.backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.training_layers, self.snapshots = [], []

    def on_train_batch_end(self, *_):
        free = {name.split(".")[1] for name, p in self.backbone.named_parameters(prefix="backbone") if p.requires_grad}
        self.training_layers.append({layer for layer in LAYERS if layer in free})
        self.snapshots.append(weights(self.backbone))


def layer_of(name):
    return LAYERS[int(name.split(".")[0]) // 3]


PLANS = {
    "gradual": ({"gradual": True}, ["", "6", "36", "036", "036"]),
    "gradual, every second epoch": ({"gradual": True, "every_n_epochs": 2}, ["", "6", "6", "36", "36"]),
    "gradual from the start": ({"gradual": True, "unfreeze_at_epoch": 0}, ["6", "36", "036", "036", "036"]),
    "schedule": ({"schedule": {0: "head", 1: "6", 3: ["0", "3"]}}, ["", "6", "6", "036", "036"]),
    "not all": ({"schedule": {2: "3"}}, ["", "", "3", "3", "3"]),
    "and frozen again": ({"schedule": {1: "all"}, "refreeze": {2: ["0", "3"], 4: "6"}}, ["", "036", "6", "6", ""]),
    "and once more thawed": (
        {"schedule": {0: "6", 1: "0", 3: "0"}, "refreeze": {2: "0"}},
        ["6", "06", "6", "06", "06"],
    ),
    "at once": ({"unfreeze_at_epoch": 3}, ["", "", "", "036", "036"]),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_layer_trains_when_it_shall_and_rests_to_the_bit_when_not(plan, norm, optimizer):
    options, expected = PLANS[plan]
    module = Deep(norm, optimizer=optimizer)
    before = weights(module.backbone)
    trainer(callbacks=[FreezeBackboneFinetune(**options)], max_epochs=5).fit(module, loader(16), loader(8))
    assert module.training_layers == [set(layers) for layers in expected for _ in range(2)]
    for now, training in zip(module.snapshots, module.training_layers, strict=True):
        for name, value in now.items():
            if not value.is_floating_point():
                continue
            assert torch.equal(value, before[name]) == (layer_of(name) not in training), name
        before = now


@pytest.mark.parametrize("fold", [False, True])
def test_frozen_weights_rest_while_an_average_stands_in_for_them_in_validation(fold):
    module = Deep()
    average = EMAWeightAveraging(decay=0.9)
    start = weights(module.backbone)
    callbacks = [FreezeBackboneFinetune(schedule={1: "6"}, fold=fold), average]
    trainer(callbacks=callbacks, max_epochs=3).fit(module, loader(), loader(8))
    for now in module.snapshots:
        for name, value in now.items():
            assert torch.equal(value, start[name]) or layer_of(name) == "6"
    assert not torch.equal(module.snapshots[-1]["6.weight"], start["6.weight"])
    # Its own arithmetic rounds, so that the average of equal values is not always that value to the last bit.
    for name, value in weights(module.backbone).items():
        if layer_of(name) != "6":
            torch.testing.assert_close(value, start[name], check_dtype=False)


# ---- rates


def rates(module):
    """The rate of each layer and of the head in each step."""
    groups = {}
    for g, group in enumerate(module.optimizers().param_groups):
        names = {id(p): name for name, p in module.named_parameters()}
        for parameter in group["params"]:
            name = names[id(parameter)]
            groups["head" if name.startswith("head") else layer_of(name.removeprefix("backbone."))] = g
    return {name: np.array([step[g]["lr"] for step in module.values]) for name, g in groups.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.1, 0.1]),
        ({"backbone_lr_ratio": 0.25}, [0.25] * 3),
        ({"backbone_lr_ratio": (0.01, 1.0)}, np.geomspace(0.01, 1.0, 3)),
        ({"lr_decay": 0.65}, [0.65**3, 0.65**2, 0.65]),
    ],
    ids=str,
)
def test_rates_by_depth(options, expected):
    module = Deep(lr=0.2)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=0, **options)], max_epochs=1).fit(module, loader())
    found = rates(module)
    np.testing.assert_allclose(found["head"], 0.2)
    np.testing.assert_allclose([found[layer] for layer in LAYERS], np.outer(expected, [0.2] * 4))


class Groups(Deep):
    """Two groups of the user's own, with and without weight decay, and a scheduler for each step."""

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr": 2 * self.lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        optimizer.register_step_pre_hook(self._note)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5), "interval": "step"}
        ]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_ramps_head_phase_depth_and_the_users_groups_and_scheduler_multiply():
    module = Groups(lr=0.01)
    callback = FreezeBackboneFinetune(
        schedule={1: "6", 2: "all"}, lr_decay=0.5, head_lr_ratio=3.0, unfreeze_warmup=3, fold=False
    )
    trainer(callbacks=[callback], max_epochs=4).fit(module, loader())  # 4 steps an epoch
    steps = np.arange(16)
    base = 0.01 * 0.5 ** (steps // 5)

    def ramp(start):
        return np.clip((steps - start + 1) / 3, None, 1.0)

    expected = {
        "head": base * np.where(steps < 4, 3.0, 1.0),
        "6": base * 0.5 * ramp(4),
        "3": base * 0.25 * ramp(8),
        "0": base * 0.125 * ramp(8),
    }
    names = {id(p): name for name, p in module.named_parameters()}
    seen = set()
    for g, group in enumerate(module.optimizers().param_groups):
        for parameter in group["params"]:
            name = names[id(parameter)]
            layer = "head" if name.startswith("head") else layer_of(name.removeprefix("backbone."))
            own = 2.0 if parameter.ndim == 1 else 1.0
            assert group["weight_decay"] == (0.0 if own == 2.0 else 0.1)
            since = {"head": 0, "6": 4, "3": 8, "0": 8}[layer]
            np.testing.assert_allclose(
                [step[g]["lr"] for step in module.values][since:], own * expected[layer][since:], err_msg=name
            )
            seen.add(layer)
    assert seen == {"head", *LAYERS}


def test_one_cycle_and_warm_up_go_on_beside_it_and_the_monitor_sees_every_group():
    module, logger = Deep(), Memory()
    tricks = [
        FreezeBackboneFinetune(gradual=True, lr_decay=0.5),
        OneCycleMomentum(0.4),
        WarmupLRScaler(scale=2.0, warmup_steps=0),
        LearningRateMonitor("step"),
    ]
    trainer(callbacks=tricks, logger=logger, log_every_n_steps=1).fit(module, loader())
    curve = np.array([2 * OneCycle().at(t, 12, max_lr=0.4)[0] for t in range(12)])
    found = rates(module)
    np.testing.assert_allclose(found["head"], curve)
    for i, layer in enumerate(LAYERS):
        np.testing.assert_allclose(found[layer], curve * 0.5 ** (3 - i))
    assert len([name for name in logger.metrics[0] if name.startswith("lr-SGD")]) == 4


def test_layers_that_always_do_the_same_share_a_group():
    module = Deep()
    trainer(callbacks=[FreezeBackboneFinetune(schedule={1: "6", 2: ["0", "3"]})]).fit(module, loader())
    assert len(module.values[0]) == 3


# ---- a metric decides


class Told(Deep):
    """Logs what it is told."""

    def __init__(self, values, **arguments):
        super().__init__(**arguments)
        self.told = values

    def validation_step(self, batch, batch_idx):
        self.log("score", self.told[self.current_epoch])


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 1, 0.5, 0.4, 0.3], {}, ["", "", "", "", "", ""]),
        ([3, 2, 2, 1, 1, 1], {}, ["", "", "", "6", "6", "36"]),
        ([1, 2, 3, 3, 3, 3], {"mode": "max"}, ["", "", "", "", "6", "36"]),
        ([3, 3, 3, 3, 3, 3], {"patience": 2}, ["", "", "", "6", "6", "36"]),
        ([3, 2.9, 2.8, 1, 0.9, 0], {"min_delta": 0.5}, ["", "", "6", "36", "36", "036"]),
        ([3, math.nan, 1, 1, 1, 1], {"unfreeze_at_epoch": 4}, ["", "", "", "", "6", "36"]),
    ],
    ids=str,
)
def test_a_plateau_thaws_the_next_layer(values, options, expected):
    module = Told(values)
    callback = FreezeBackboneFinetune(gradual=True, monitor="score", **options)
    trainer(callbacks=[callback], max_epochs=6).fit(module, loader(8), loader(8))
    assert module.training_layers == [set(layers) for layers in expected]


SPELLINGS = [
    (
        {"gradual": Plateau("score", "max", 2, 0.5)},
        "{gradual: {monitor: score, mode: max, patience: 2, min_delta: 0.5}}",
    ),
    (
        {"gradual": True, "monitor": "score", "mode": "max", "patience": 2, "min_delta": 0.5},
        "{gradual: true, monitor: score, mode: max, patience: 2, min_delta: 0.5}",
    ),
    ({"gradual": True}, "{gradual: true, monitor: null, mode: min, patience: 1, min_delta: 0.0}"),
    ({"gradual": True, "mode": "max", "patience": 3}, "{gradual: true, mode: max, patience: 3}"),
    ({}, "{}"),
]


@pytest.mark.parametrize(("options", "yaml"), SPELLINGS, ids=str)
def test_a_plateau_is_one_object_or_given_argument_by_argument_in_yaml_too(options, yaml):
    jsonargparse = pytest.importorskip("jsonargparse")
    expected = Plateau("score", "max", 2, 0.5) if "score" in str(options) else None
    assert FreezeBackboneFinetune(**options).plateau == expected
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    path = "lightning_speedups.FreezeBackboneFinetune"
    config = parser.parse_string(f"callback: {{class_path: {path}, init_args: {yaml}}}")
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as it was called before 4.49
    made = make(config).callback
    assert (made.plateau, bool(made.gradual)) == (expected, "gradual" in options)
    with pytest.raises(Exception, match="patience"):
        parser.parse_string(f"callback: {{class_path: {path}, init_args: {{patience: long}}}}")


def test_where_validation_has_its_own_rhythm_each_one_counts():
    module = Told([3, 3, 3, 3, 3, 3])
    callback = FreezeBackboneFinetune(gradual=True, monitor="score", patience=3)
    trainer(callbacks=[callback], max_epochs=6, val_check_interval=0.5).fit(module, loader(16), loader(8))
    # The first is the best; the three after it end in the middle of the second epoch.
    assert module.training_layers[::2] == [set(), set(), {"6"}, {"6"}, {"3", "6"}, {"3", "6"}]
    module = Told([3, 3, 3, 3, 3, 3])
    callback = FreezeBackboneFinetune(gradual=True, monitor="score")
    trainer(callbacks=[callback], max_epochs=6, check_val_every_n_epoch=2).fit(module, loader(8), loader(8))
    assert module.training_layers == [set(), set(), set(), set(), {"6"}, {"6"}]


def test_a_training_metric_counts_once_an_epoch_whatever_validation_does():
    for options in ({"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}):
        module = Told([3] * 4)
        callback = FreezeBackboneFinetune(gradual=True, monitor="train_loss", min_delta=100.0)
        trainer(callbacks=[callback], max_epochs=4, **options).fit(module, loader(16), loader(8))
        assert module.training_layers[::2] == [set(), set(), {"6"}, {"3", "6"}], options


def test_a_metric_that_nobody_logs_is_named_after_the_first_epoch():
    callback = FreezeBackboneFinetune(gradual=True, monitor="scroe")
    module = Told([1, 1, 1])
    with pytest.raises(MisconfigurationException, match=r"monitor='scroe'.*only \['score', 'train_loss'\]"):
        trainer(callbacks=[callback]).fit(module, loader(8), loader(8))
    assert len(module.training_layers) == 1


# ---- resume

COURSES = {
    "schedule": {"schedule": {1: "6", 2: "all"}, "lr_decay": 0.5, "unfreeze_warmup": 3, "head_lr_ratio": 2.0},
    "gradual": {"gradual": True, "unfreeze_warmup": "0.5 epochs"},
    "refrozen": {"schedule": {0: "6", 1: "0", 3: "0"}, "refreeze": {2: "0"}, "unfreeze_warmup": 2},
    "by a metric": {"gradual": True, "monitor": "train_loss", "min_delta": 100.0, "unfreeze_warmup": 2},
}


@pytest.mark.parametrize("epoch_end", [False, True])
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_interrupted_anywhere_and_resumed_it_equals_the_whole_run(course, optimizer, epoch_end):
    def make():
        return [FreezeBackboneFinetune(**COURSES[course])]

    whole = Deep(optimizer=optimizer)
    trainer(callbacks=make(), max_epochs=4).fit(whole, ReplayLoader(batches=2))
    assert len(whole.training_layers) == 8
    assert whole.training_layers[0] != whole.training_layers[-1]
    for stop in (2, 6) if epoch_end else (1, 4, 5, 7):
        parted = Deep(optimizer=optimizer)
        fit_interrupted(parted, ReplayLoader(batches=2), stop, make(), epoch_end=epoch_end, max_epochs=4)
        resume(parted, ReplayLoader(batches=2), make(), max_epochs=4)
        # Lightning keeps no epoch's metric in a checkpoint between its last batch and its end.
        if course != "by a metric" or epoch_end or stop % 2:
            assert_same_weights(weights(whole), weights(parted))


class SavesAfterValidation(Callback):
    """Saves as a ModelCheckpoint does that looks at validation, and stops the run there."""

    def __init__(self, step):
        self.step = step

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("at.ckpt")
            raise Interrupted


@pytest.mark.parametrize(("interval", "steps"), [(1.0, (2, 4, 6)), (0.5, (1, 3, 5, 7))])
def test_resumed_from_a_checkpoint_that_validation_made_it_thaws_as_the_whole_run(interval, steps):
    def make(**options):
        finetune = FreezeBackboneFinetune(gradual=True, monitor="score", unfreeze_warmup=2)
        return trainer(callbacks=[finetune, *options.values()], max_epochs=4, val_check_interval=interval)

    def data():
        return ReplayLoader(batches=2), loader(8)

    whole = Told([3, 3, 3, 3])
    make().fit(whole, *data())
    for step in steps:
        with pytest.raises(Interrupted):
            make(last=SavesAfterValidation(step)).fit(Told([3, 3, 3, 3]), *data())
        parted = Told([3, 3, 3, 3])
        make().fit(parted, *data(), ckpt_path="at.ckpt", weights_only=True)
        assert parted.training_layers == whole.training_layers[step:]
        assert_same_weights(weights(whole), weights(parted))


def test_a_resume_with_other_groups_is_refused_by_name():
    module = Deep()
    fit_interrupted(module, ReplayLoader(), 6, [FreezeBackboneFinetune(schedule={0: "6"})])
    for options in ({"schedule": {0: "3"}}, {"gradual": True}, {"lr_decay": 0.5}):
        with pytest.raises(MisconfigurationException, match="FreezeBackboneFinetune found other parameter groups"):
            resume(module, ReplayLoader(), [FreezeBackboneFinetune(**options)])
    resume(module, ReplayLoader(), [FreezeBackboneFinetune(schedule={0: "6", 2: "6"})])


def test_a_checkpoint_of_a_run_without_it_can_go_on_with_it():
    module = Deep()
    fit_interrupted(module, ReplayLoader(), 6, [], max_epochs=4)
    with pytest.raises(Exception, match="parameter group"):  # torch's own words: one group there, two here
        resume(module, ReplayLoader(), [FreezeBackboneFinetune()], max_epochs=4)


# ---- what is saved


def test_optimizers_remember_nothing_of_what_has_not_moved_or_was_frozen_again():
    class Looks(Callback):
        def __init__(self):
            self.remembered = []

        def on_train_epoch_end(self, trainer, pl_module):
            names = {id(p): name for name, p in pl_module.backbone.named_parameters()}
            state = trainer.optimizers[0].state
            assert all(state[p] for p in pl_module.head.parameters())
            self.remembered.append({layer_of(names[id(p)]) for p in state if id(p) in names})

    module, looks = Deep(optimizer="adam"), Looks()
    callback = FreezeBackboneFinetune(schedule={1: ["3", "6"]}, refreeze={2: "3"})
    trainer(callbacks=[callback, looks]).fit(module, loader())
    assert looks.remembered == [set(), {"3", "6"}, {"6"}]


def test_an_optimizer_that_makes_its_state_at_once_keeps_it():
    class Ada(Deep):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters(), lr=0.01)

    callback = FreezeBackboneFinetune(schedule={0: "6", 2: "6"}, refreeze={1: "6"})
    module = Ada()
    trainer(callbacks=[callback]).fit(module, loader(8))
    assert module.training_layers == [{"6"}, set(), {"6"}]


class Saves(Deep):
    """Counts the bytes that the forward pass keeps for the backward pass, beside the parameters."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.saved = []

    def training_step(self, batch, batch_idx):
        own, kept = {p.data_ptr() for p in self.parameters()}, {}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().training_step(batch, batch_idx)
        self.saved.append(sum(kept.values()))
        return loss


def test_a_frozen_prefix_keeps_no_activations():
    module = Saves()
    trainer(callbacks=[FreezeBackboneFinetune(gradual=True)], max_epochs=4).fit(module, loader(8))
    head, *more = module.saved
    image = 8 * 6 * 8 * 8 * 4  # one map of the backbone
    assert head < image / 10
    assert all(later - earlier > image for earlier, later in zip(module.saved, more, strict=False))


def test_a_gradient_reaches_no_further_than_the_last_layer_that_trains():
    class Reached(Deep):
        def on_after_backward(self):
            self.reached = {layer_of(name) for name, p in self.backbone.named_parameters() if p.grad is not None}

    module = Reached()
    trainer(callbacks=[FreezeBackboneFinetune(schedule={0: "6"})], max_epochs=2).fit(module, loader())
    assert module.reached == {"6"}


# ---- convolutions with their norms in them


class Watches(Callback):
    """Notes which modules compute something else than their class does, and what a checkpoint would hold."""

    def __init__(self):
        self.folded, self.states = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.folded.append({name for name, m in pl_module.backbone.named_modules() if "forward" in vars(m)})
        self.states.append(weights(pl_module.backbone))


def test_frozen_convolutions_take_their_norms_in_and_give_them_back_bit_for_bit():
    module, watches = Deep(), Watches()
    start = weights(module.backbone)
    trainer(callbacks=[FreezeBackboneFinetune(gradual=True), watches], max_epochs=4).fit(module, loader(8))
    assert watches.folded == [{"0", "1", "3", "4", "6", "7"}, {"0", "1", "3", "4"}, {"0", "1"}, set()]
    assert watches.states[0].keys() == start.keys()
    assert all(torch.equal(value, watches.states[2][name]) for name, value in start.items() if layer_of(name) == "0")
    assert not any("forward" in vars(sub) for sub in module.modules())


@pytest.mark.parametrize("options", [{"fold": False}, {"train_norm": True}], ids=str)
def test_nothing_is_folded_when_it_must_not_be(options):
    module, watches = Deep(), Watches()
    trainer(callbacks=[FreezeBackboneFinetune(gradual=True, **options), watches]).fit(module, loader(8))
    assert watches.folded == [set()] * 3


def test_folding_changes_the_course_of_training_by_rounding_only():
    folded, plain = Deep(), Deep()
    for module, fold in ((folded, True), (plain, False)):
        for norm in module.backbone[1::3][:3]:
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
        trainer(callbacks=[FreezeBackboneFinetune(gradual=True, fold=fold)], max_epochs=5).fit(module, loader())
    pairs = zip(folded.parameters(), plain.parameters(), strict=True)
    assert max(float((one - other).detach().abs().max()) for one, other in pairs) < 1e-4
    assert folded.losses == pytest.approx(plain.losses, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule", "counts"),
    [
        ("resnet10t", {1: "layer4", 2: ["layer3", "layer2"]}, [0, 1, 3]),
        ("test_vit", {1: "blocks", 2: "stem"}, [0, 6, 7]),
        ("mobilenetv3_small_050", {1: "conv_head", 2: "blocks"}, [0, 1, 7]),
        ("test_convnext", {1: "stages.3", 2: "all"}, [0, 1, 5]),
        ("test_efficientnet", {1: "blocks", 2: "all"}, [0, 5, 6]),
    ],
)
def test_timms_own_layers_by_name(name, schedule, counts):
    module = Timm(name)
    callback = FreezeBackboneFinetune(None, schedule=schedule)
    labels = []

    class Looks(Callback):
        def on_train_batch_start(self, *_):
            labels.append(len(callback.layers) - len(callback.run.frozen))

    trainer(callbacks=[callback, Looks()]).fit(module, loader(8))
    assert labels == counts
    assert module.trained[0] == module.of_classifier
    assert module.trained[0] < module.trained[1] < module.trained[2]


# ---- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backbone_lr_ratio": (0.1, 0.0)}, "Expected `backbone_lr_ratio` to be .*, but got 0.0"),
        ({"backbone_lr_ratio": (0.1, 0.2, 0.3)}, "a pair of numbers, but got"),
        ({"backbone_lr_ratio": 0.5, "lr_decay": 0.5}, "one of `backbone_lr_ratio` and `lr_decay`"),
        ({"lr_decay": 0.0}, "Expected `lr_decay`"),
        ({"lr_decay": 1.5}, "Expected `lr_decay`"),
        ({"head_lr_ratio": 0}, "Expected `head_lr_ratio`"),
        ({"unfreeze_warmup": -1}, "Expected `unfreeze_warmup`"),
        ({"unfreeze_warmup": "soon"}, "Expected `unfreeze_warmup`"),
        ({"schedule": {1.5: "layer4"}}, "Expected `schedule` to map epochs"),
        ({"schedule": {-1: "layer4"}}, "Expected `schedule` to map epochs"),
        ({"schedule": {1: 4}}, "Expected `schedule` to map epochs"),
        ({"schedule": {1: []}}, "Expected `schedule` to map epochs"),
        ({"schedule": ["layer4"]}, "Expected `schedule` to map epochs"),
        ({"refreeze": {1: None}}, "Expected `refreeze` to map epochs"),
        ({"schedule": {1: "layer4"}, "gradual": True}, "one of `schedule` and `gradual=True`"),
        ({"gradual": True, "unfreeze_at_epoch": None}, "`unfreeze_at_epoch` to be an epoch with `gradual=True`"),
        ({"gradual": True, "every_n_epochs": 0}, "Expected `every_n_epochs`"),
        ({"monitor": "val_loss"}, "`monitor` with `gradual=True`"),
        ({"gradual": True, "monitor": "val_loss", "refreeze": {3: "stem"}}, "without `refreeze`"),
        ({"gradual": True, "monitor": ""}, "Expected `monitor` to be the name of a metric, but got ''"),
        (
            {"gradual": Plateau("val_loss"), "refreeze": {3: "stem"}},
            "`monitor` with `gradual=True` and without `refreeze`",
        ),
        ({"gradual": Plateau("val_loss"), "schedule": {1: "stem"}}, "one of `schedule` and `gradual=True`"),
        ({"gradual": Plateau("val_loss"), "patience": 2}, "all of its settings, but got {'patience': 2} beside it"),
        ({"mode": "least"}, "Expected `mode` to be 'min' or 'max', but got 'least'"),
        ({"patience": 0}, "Expected `patience`"),
        ({"min_delta": -1.0}, "Expected `min_delta`"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_construction(options, told):
    with pytest.raises(ValueError, match=told):
        FreezeBackboneFinetune(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": {1: "layer4"}}, r"no layer 'layer4'. Its layers are \['0', '3', '6'\]"),
        ({"refreeze": {2: "8"}}, "no layer '8'"),  # which has no parameters
        ({"schedule": {2: "head"}}, "the head trains from the start"),
        ({"refreeze": {0: "6"}}, r"must train before it, but \['6'\] does not"),
        ({"refreeze": {2: "head"}}, "the head always trains, but in epoch 2"),
    ],
    ids=str,
)
def test_names_that_do_not_fit_the_model_are_refused_at_fit_start(options, told):
    module = Deep()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[FreezeBackboneFinetune(**options)]).fit(module, loader())
    assert not module.losses


@pytest.mark.parametrize(
    ("options", "epoch"),
    [
        ({"unfreeze_at_epoch": 3}, 3),
        ({"gradual": True, "unfreeze_at_epoch": 4}, 4),
        ({"schedule": {0: "6", 7: "all"}}, 7),
    ],
    ids=str,
)
def test_a_run_that_ends_before_the_last_layer_thaws_says_so(options, epoch):
    callback = FreezeBackboneFinetune(**options)
    with pytest.warns(
        UserWarning, match=f"thaws or freezes layers in epoch {epoch}, but the run ends before, after 3 epochs"
    ):
        trainer(callbacks=[callback]).fit(Deep(), loader(8))


def test_two_that_freeze_the_same_layers_are_refused_and_two_backbones_are_not():
    class Second(FreezeBackboneFinetune):
        pass

    with pytest.raises(MisconfigurationException, match="FreezeBackboneFinetune and Second both freeze the same"):
        trainer(callbacks=[FreezeBackboneFinetune(), Second()]).fit(Deep(), loader(8))
    module = Deep()
    first, second = FreezeBackboneFinetune("backbone.0"), Second("backbone.3", unfreeze_at_epoch=2)
    trainer(callbacks=[first, second]).fit(module, loader(8))
    assert module.training_layers == [{"6"}, {"0", "6"}, {"0", "3", "6"}]


def test_a_stage_in_which_nothing_trains_is_refused_at_fit_start():
    class Whole(Deep):
        def __init__(self):
            super().__init__()
            self.all = nn.Sequential(self.backbone, self.head)
            del self.backbone, self.head

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.all(batch[0]), batch[1])

        def on_train_batch_end(self, *_):
            pass

    def parts(module):
        return [module.all[0], module.all[1]]

    with pytest.raises(MisconfigurationException, match="every parameter in epoch 2: nothing is left to train"):
        trainer(callbacks=[FreezeBackboneFinetune(parts, schedule={0: "all.1"}, refreeze={2: "all.1"})]).fit(
            Whole(), loader()
        )
    module = Whole()
    before = weights(module)
    trainer(callbacks=[FreezeBackboneFinetune(parts, schedule={0: "all.1"})]).fit(module, loader())
    assert {name for name, value in weights(module).items() if not torch.equal(value, before[name])} == {
        "all.1.weight",
        "all.1.bias",
    }


def test_a_train_method_of_the_users_own_is_called_and_given_back():
    module, calls = Deep(), []
    norm = module.backbone[1]
    own = norm.train = lambda mode=True: calls.append(mode) or norm
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=None)]).fit(module, loader(8), loader(8))
    assert vars(norm)["train"] is own
    assert calls


def test_norms_that_train_count_as_something_that_trains():
    callback = FreezeBackboneFinetune(lambda module: [module.backbone, module.head], None, train_norm=True)
    module = Deep()
    before = weights(module)
    trainer(callbacks=[callback]).fit(module, loader())
    changed = {name.split(".")[1] for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {"1", "4", "7"}


class EachWithAnOptimizer(TwoOptimizers, Deep):
    """Head and backbone have an optimizer each, and both step on every batch."""


def test_an_optimizer_whose_parameters_are_all_frozen_rests_also_under_a_gradient_scaler():
    module = EachWithAnOptimizer(every=1, lr=(0.05, 0.05))
    callback = FreezeBackboneFinetune(schedule={1: "6"}, refreeze={2: "6"}, fold=False)
    trainer(callbacks=[callback], plugins=[scaled(1.0)], max_epochs=3).fit(module, loader(16))
    assert module.training_layers == [set(), set(), {"6"}, {"6"}, set(), set()]
    assert callback.steps_done == [6, 2]


def test_a_compiled_backbone_has_the_layers_of_the_one_in_it():
    module = Timm("resnet10t")
    module.model = torch.compile(module.model, backend="eager")
    callback, found = FreezeBackboneFinetune(None, schedule={0: "layer4"}), []

    class Looks(Callback):
        def on_train_start(self, *_):
            found.extend(layer.name for layer in callback.layers)

    trainer(callbacks=[callback, Looks()], max_epochs=1).fit(module, loader(8))
    assert found == ["stem", "layer1", "layer2", "layer3", "layer4"]


class Whole(Deep):
    """All of it in one attribute, the head its last child."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.model = nn.Sequential()
        for i, name in enumerate(("layer1", "layer2", "layer3")):
            self.model.add_module(name, self.backbone[3 * i : 3 * i + 3])
        self.model.add_module("pool", self.backbone[9:])
        self.model.add_module("fc", self.head)
        del self.backbone, self.head

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, *_):
        names = {id(p): name.split(".")[1] for name, p in self.named_parameters()}
        groups = zip(self.trainer.optimizers[0].param_groups, self.values[-1], strict=True)
        self.snapshots.append({names[id(p)]: noted["lr"] for group, noted in groups for p in group["params"]})


RATES = {
    "a tenth": ({}, (0.1, 0.1, 0.1)),
    "two ends": ({"backbone_lr_ratio": (0.01, 1.0)}, (0.01, 0.1, 1.0)),
    "by depth": ({"lr_decay": 0.5}, (0.125, 0.25, 0.5)),
}


@pytest.mark.parametrize(("options", "ratios"), RATES.values(), ids=RATES)
def test_the_last_layer_of_a_whole_model_trains_as_a_head(options, ratios):
    module = Whole(lr=0.5)
    callback = FreezeBackboneFinetune("model", schedule={0: "fc", 1: "all"}, head_lr_ratio=2.0, **options)
    trainer(callbacks=[callback], max_epochs=2).fit(module, loader(16))
    assert [rates["fc"] for rates in module.snapshots] == [1.0, 1.0, 0.5, 0.5]
    layers = ("layer1", "layer2", "layer3")
    np.testing.assert_allclose([module.snapshots[-1][layer] for layer in layers], [0.5 * ratio for ratio in ratios])


def test_a_whole_model_that_is_resumed_equals_the_whole_run():
    make = {"schedule": {0: "fc", 1: "layer3", 2: "all"}, "unfreeze_warmup": 3, "head_lr_ratio": 0.5}
    whole, parted = Whole(), Whole()
    trainer(callbacks=[FreezeBackboneFinetune("model", **make)]).fit(whole, ReplayLoader())
    for stop in (2, 4, 7):
        parted = Whole()
        fit_interrupted(parted, ReplayLoader(), stop, [FreezeBackboneFinetune("model", **make)])
        resume(parted, ReplayLoader(), [FreezeBackboneFinetune("model", **make)])
        assert_same_weights(weights(whole), weights(parted))


class PacesAllAlike(FreezeBackboneFinetune):
    """As it was before the last layer of a whole model took the head's place."""

    state_key = FreezeBackboneFinetune.__qualname__

    def settle_courses(self, pl_module):
        self.resumed, resumed = True, self.resumed
        super().settle_courses(pl_module)
        self.resumed = resumed

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if name != "head"}


@pytest.mark.parametrize(
    "options", [{}, {"gradual": True}, {"schedule": {0: "fc", 1: "all"}, "head_lr_ratio": 2.0}], ids=str
)
def test_a_run_of_a_whole_model_that_was_begun_without_a_head_goes_on_so(options):
    whole, parted, make = Whole(), Whole(), {"unfreeze_at_epoch": 0} | options
    trainer(callbacks=[PacesAllAlike("model", **make)]).fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 5, [PacesAllAlike("model", **make)])
    resume(parted, ReplayLoader(), [FreezeBackboneFinetune("model", **make)])
    assert_same_weights(weights(whole), weights(parted))
    assert all(rates["fc"] == parted.snapshots[0]["fc"] for rates in parted.snapshots)


def test_what_trains_outside_the_backbone_is_its_head_and_what_is_frozen_there_is_none():
    class WithTeacher(Whole):
        def __init__(self, trains, **arguments):
            super().__init__(**arguments)
            self.teacher = nn.Linear(2, 2).requires_grad_(trains)

    for trains, rate in ((False, 0.5), (True, 0.05)):
        module = WithTeacher(trains, lr=0.5)
        trainer(callbacks=[FreezeBackboneFinetune("model", schedule={0: "all"})], max_epochs=1).fit(module, loader(8))
        assert module.snapshots[0]["fc"] == pytest.approx(rate)


@pytest.mark.parametrize("options", [{}, {"schedule": {0: "head", 1: "all"}}, {"gradual": True}], ids=str)
def test_a_head_that_there_is_not_is_explained_with_the_layers_to_choose_from(options):
    told = r"'head' is what lies outside `backbone`.* of \['layer1', 'layer2', 'layer3', 'fc'\]\. `backbone=None` is"
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[FreezeBackboneFinetune("model", **options)]).fit(Whole(), loader(8))


@pytest.mark.parametrize("make", [FreezeBackboneFinetune, FreezeProgressively])
def test_a_whole_model_of_timm_by_its_name_is_told_of_none(make):
    with pytest.raises(MisconfigurationException, match=r"`backbone=None` is a network without its head\.$"):
        trainer(callbacks=[make("model")]).fit(Timm("resnet10t"), loader(8))
