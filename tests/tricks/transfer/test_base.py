"""The grip on layers: found, frozen and thawed at any moment, and given back."""

import inspect
import itertools
from functools import partial

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import ADD_PARAM_GROUP, patched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import FreezeBackboneFinetune, FreezeProgressively
from lightning_speedups.tricks.transfer.base import FreezingTrick, find_layers, forget_state
from zoo import (
    Classifier,
    Manual,
    ReplayLoader,
    Timm,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)


class Turns(FreezingTrick):
    """Freezes the named layers of a table from each step on."""

    def __init__(self, table, **options):
        super().__init__("backbone", **options)
        self.table, self.changed = table, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.table:
            self.changed.append(self.freeze_only(trainer, pl_module, self.table[trainer.global_step]))

    def group_values(self, optimizer, group, step, values):
        layer = self.run.layer_of_group.get((optimizer, group))
        return {} if layer is None else {"lr": values["lr"] / 2}


def deep():
    torch.manual_seed(2)
    module = Classifier()
    module.backbone = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return module


def test_layers_freeze_and_thaw_at_any_step_and_it_says_whether_that_changed_anything():
    module, states = deep(), []
    module.on_train_batch_end = lambda *_: states.append(weights(module.backbone))
    trick = Turns({1: {"0"}, 2: {"0"}, 3: {"0", "3"}, 5: {"3"}, 6: set()})
    trainer(callbacks=[trick], max_epochs=2).fit(module, loader())
    assert trick.changed == [True, False, True, True, True]
    pairs = itertools.pairwise(states)
    moved = [{name[0] for name in new if not torch.equal(old[name], new[name])} for old, new in pairs]
    first = {"0", "1"}
    assert moved == [{"3"}, {"3"}, set(), set(), first, first | {"3"}, first | {"3"}]
    assert len(module.values[0]) == 3
    assert sorted({group["lr"] for group in module.values[0]}) == [0.025, 0.05]


@pytest.mark.parametrize("failing", [False, True])
def test_everything_is_given_back_in_the_middle_as_well(failing):
    module = deep()
    before = [(dict(vars(sub)).keys(), sub.training) for sub in module.modules()]
    trick = Turns({0: {"0", "3"}})
    one = trainer(callbacks=[trick], max_epochs=1)
    if failing:
        fit_interrupted(module, loader(), 2, [trick], max_epochs=1)
    else:
        one.fit(module, loader())
        assert patched(one) == set()
    assert [sub.training for sub in module.modules()] == [training for _, training in before]
    assert not any({"train", "forward"} & vars(sub).keys() for sub in module.modules())
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(
    "make",
    [partial(FreezeBackboneFinetune, unfreeze_at_epoch=None), partial(FreezeProgressively, start=0.2)],
    ids=["finetune", "progressively"],
)
def test_the_module_is_handed_back_as_it_came(make, failing):
    def state(module):
        grads = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        return grads, [(sub.training, "train" in vars(sub)) for sub in module.modules()]

    module, callback = Classifier(), make()
    module.backbone[0].bias.requires_grad_(False)  # the user's own choice
    before = state(module)
    if failing:
        fit_interrupted(module, loader(), 7, [callback])
    else:
        trainer(callbacks=[callback]).fit(module, loader())
    assert state(module) == before
    assert callback.layers == []
    assert torch.optim.Optimizer.add_param_group is ADD_PARAM_GROUP


def test_forgotten_parameters_start_anew():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([one, other], lr=0.1)
    for _ in range(2):
        one.grad = other.grad = torch.ones(2)
        optimizer.step()
    forget_state([optimizer], [one])
    assert one not in optimizer.state
    optimizer.step()
    assert [int(optimizer.state[parameter]["step"]) for parameter in (one, other)] == [1, 3]


def test_a_timm_backbone_without_a_head_has_timms_layers():
    module = Classifier()
    module.backbone = timm.create_model("resnet10t", num_classes=0, in_chans=2)
    names = [layer.name for layer in find_layers(module, "backbone")[1]]
    assert names == ["stem", "layer1", "layer2", "layer3", "layer4"]


def test_families_of_timm_without_coarse_groups_or_without_any():
    def names(name):
        module = Classifier()
        module.model = timm.create_model(name, num_classes=4)
        _, layers = find_layers(module, None)
        parameters = [id(p) for layer in layers for p in layer.parameters()]
        assert len(set(parameters)) == len(parameters)
        head = {id(p) for p in module.model.get_classifier().parameters()}
        assert set(parameters) | head == {id(p) for p in module.model.parameters()}
        return [layer.name for layer in layers]

    assert len(names("test_rdnet" if "test_rdnet" in timm.list_models() else "rdnet_tiny")) > 3
    assert names("poolformer_s12") == ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]


class Averages(WeightAveraging):
    """An average of weights that stands in for them in validation."""

    def __init__(self):
        super().__init__(avg_fn=lambda average, now, count: 0.9 * average + 0.1 * now)


def test_validation_of_averaged_weights_sees_these_weights():
    module, seen = deep(), []

    def validation_step(batch, batch_idx):
        fresh = deep().eval()
        fresh.load_state_dict(module.state_dict())
        seen.append(float((module.backbone(batch[0]) - fresh.backbone(batch[0])).abs().max()))

    module.validation_step = validation_step
    table = {6: {"0"}}  # it has trained before, so that the average is another
    trainer(callbacks=[Turns(table), Averages()], max_epochs=4).fit(module, loader(), loader(8))
    assert len(seen) == 4
    assert max(seen) < 1e-5


def test_modules_that_a_callable_picks_are_a_layer_each_under_their_paths():
    module = deep()
    _, layers = find_layers(module, lambda m: [m.backbone[:2], m.backbone[3], m.head, nn.ReLU()])
    assert [layer.name for layer in layers] == ["part 0", "backbone.3", "backbone.head"]
    assert [list(layer.modules) for layer in layers] == [
        list(module.backbone[:2]),
        [module.backbone[3]],
        [module.head],
    ]


def test_the_name_of_the_trick_is_in_the_message():
    with pytest.raises(MisconfigurationException, match=r"FreezingTrick\(backbone=.*\) must pick nn\.Modules"):
        FreezingTrick(lambda module: [module.backbone, 3]).find_layers(Classifier())
    with pytest.raises(ValueError, match="Expected `backbone` to be"):
        FreezingTrick("")


# ---- optimizers


class Shrinks(torch.optim.Optimizer):
    """Takes a tenth off every weight in its groups, whether it has a gradient or not."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        loss = closure() if closure else None
        with torch.no_grad():
            for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
                parameter.mul_(1 - self.defaults["lr"])
        return loss


class FillsIn(torch.optim.AdamW):
    """Puts zeros where there is no gradient."""

    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        super().step()
        return loss


class ZerosByHook(Callback):
    """Puts them there before the step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class WithOptimizer(Classifier):
    """Takes any optimizer; notes the backbone, and what the groups hold, after each step."""

    def __init__(self, make):
        torch.manual_seed(2)
        super().__init__()
        self.make, self.after, self.heads, self.groups = make, [], [], []
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(128, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)
        )
        self.head = nn.Linear(6, 4, bias=False)

    def configure_optimizers(self):
        return self.make(self.parameters())

    def on_train_batch_end(self, *_):
        self.after.append(weights(self.backbone))
        self.heads.append(self.head.weight.detach().clone())
        self.groups.append([[id(p) for p in group["params"]] for group in self.trainer.optimizers[0].param_groups])


class WithOptimizerByHand(Manual, WithOptimizer):
    pass


KINDS = [
    cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")  # LBFGS takes one group, SparseAdam no dense gradients
]
MAKES = {cls.__name__: partial(cls, lr=0.01) for cls in KINDS}
MAKES |= {
    f"{cls.__name__}, {option}": partial(cls, lr=0.01, **{option: True})
    for cls in KINDS
    for option in ("foreach", "fused")
    if option in inspect.signature(cls).parameters
}
MAKES |= {
    "Shrinks": partial(Shrinks, lr=0.1),
    "FillsIn": partial(FillsIn, lr=0.1, weight_decay=0.1),
    "filled by a hook": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("scale", [[], [1.0]], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", MAKES)
def test_whatever_an_optimizer_does_it_leaves_what_is_frozen_alone(name, scale):
    module = WithOptimizer(MAKES[name])
    start = weights(module.backbone)
    callbacks = [FreezeBackboneFinetune(unfreeze_at_epoch=1), *[ZerosByHook()] * name.startswith("filled")]
    trainer(callbacks=callbacks, max_epochs=2, plugins=[scaled(one) for one in scale]).fit(module, loader(16))
    for frozen in module.after[:2]:
        assert_same_weights(start, frozen)
    assert not any(torch.equal(start[name], module.after[-1][name]) for name in start)
    assert module.groups == module.groups[:1] * 4
    assert len(set(itertools.chain(*module.groups[0]))) == 3  # everybody but the step sees them whole


@pytest.mark.parametrize("cls", [WithOptimizer, WithOptimizerByHand])
def test_layers_that_freeze_on_the_way_shrink_no_further(cls):
    module = cls(make=partial(Shrinks, lr=0.1))
    start = weights(module.backbone)
    trainer(callbacks=[FreezeProgressively(start=0.5, until=0.75, total_steps=8)], max_epochs=2).fit(module, loader())
    for layer, last in {"1.weight": 4, "3.weight": 6}.items():
        for step, seen in enumerate(module.after, start=1):
            torch.testing.assert_close(seen[layer], start[layer] * 0.9 ** min(step, last))
    torch.testing.assert_close(module.heads[-1], module.heads[0] * 0.9**7)


def test_an_optimizer_that_takes_the_place_of_another_leaves_it_alone_too():
    class Swaps(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers = [MakesStateAtOnce(pl_module.parameters(), 0.1)]
            elif trainer.current_epoch == 2:
                trainer.optimizers = [Shrinks(pl_module.parameters(), 0.1)]

    module = WithOptimizer(partial(Shrinks, lr=0.2))
    start = weights(module.backbone)
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=3), Swaps()], max_epochs=4).fit(module, loader(16))
    for frozen in module.after[:6]:
        assert_same_weights(start, frozen)
    torch.testing.assert_close(module.after[-1]["1.weight"], start["1.weight"] * 0.9**2)
    torch.testing.assert_close(module.heads[-1], module.heads[3] * 0.9**4)


def test_what_the_user_froze_elsewhere_is_left_to_the_optimizer():
    module = WithOptimizer(partial(Shrinks, lr=0.1))
    module.backbone[1].weight.requires_grad_(False)
    trainer(callbacks=[FreezeBackboneFinetune("backbone.3", None)], max_epochs=1).fit(module, loader(16))
    one, other = module.after
    torch.testing.assert_close(other["1.weight"], one["1.weight"] * 0.9)
    assert torch.equal(other["3.weight"], one["3.weight"])


class MakesStateAtOnce(torch.optim.Optimizer):
    """Momentum whose buffers are made with it and never again."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["buffer"] = torch.zeros_like(parameter)

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                    buffer = self.state[parameter]["buffer"].mul_(0.9).add_(parameter.grad)
                    parameter.sub_(buffer, alpha=group["lr"])
        return loss


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
@pytest.mark.parametrize("cls", [MakesStateAtOnce, torch.optim.Adagrad])
def test_a_state_that_is_made_with_the_optimizer_is_there_when_layers_thaw(cls, stop):
    make = partial(FreezeBackboneFinetune, schedule={1: "all", 3: "1"}, refreeze={2: "1"})
    whole, parted = WithOptimizer(partial(cls, lr=0.1)), WithOptimizer(partial(cls, lr=0.1))
    trainer(callbacks=[make()], max_epochs=4).fit(whole, ReplayLoader(2))
    moved = [not torch.equal(one["1.weight"], other["1.weight"]) for one, other in itertools.pairwise(whole.after)]
    assert moved == [False, True, True, False, False, True, True]
    fit_interrupted(parted, ReplayLoader(2), stop, [make()], max_epochs=4)
    resume(parted, ReplayLoader(2), [make()], max_epochs=4)
    assert_same_weights(weights(whole), weights(parted))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of a callback that is missing
@pytest.mark.parametrize("make", [FreezeBackboneFinetune, partial(FreezeProgressively, start=0.5)])
@pytest.mark.parametrize("before", [[], [partial(Turns, {})]], ids=["plain", "another"])
def test_a_checkpoint_with_other_groups_is_refused_before_torch_does(make, before):
    module = deep()
    fit_interrupted(module, ReplayLoader(), 6, [one() for one in before])
    with pytest.raises(MisconfigurationException, match=r"groups.*checkpoint.*load the weights alone"):
        resume(module, ReplayLoader(), [make() if not before else make("backbone.0")])
    assert len(module.losses) == 6
    module.load_state_dict(torch.load("at.ckpt", weights_only=True)["state_dict"])
    trainer(callbacks=[make()]).fit(module, ReplayLoader())


def test_a_checkpoint_whose_groups_are_the_same_goes_on():
    class HasGroups(Classifier):
        def configure_optimizers(self):
            groups = [{"params": part.parameters()} for part in (self.head, self.backbone)]
            return torch.optim.SGD(groups, 0.1, momentum=0.9)

    module = HasGroups()
    fit_interrupted(module, ReplayLoader(), 6, [])
    resume(module, ReplayLoader(), [FreezeBackboneFinetune()])
    assert len(module.losses) == 12


# ---- shared weights


class Language(Classifier):
    """Predicts tokens by the embedding of its backbone."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.backbone[0].weight

    def training_step(self, batch, batch_idx):
        (words,) = batch
        return nn.functional.cross_entropy(self.head(self.backbone(words)), words)


def words():
    return DataLoader(TensorDataset(torch.arange(8) % 5), batch_size=2)


@pytest.mark.parametrize(
    "make",
    [
        FreezeBackboneFinetune,
        partial(FreezeBackboneFinetune, gradual=True),
        partial(FreezeProgressively, start=0.2, share=0.4),
    ],
)
def test_a_head_that_shares_a_weight_with_a_frozen_layer_is_warned_of(make):
    with pytest.warns(UserWarning, match="`head.weight` with `backbone.0.weight`, which is the same parameter"):
        trainer(callbacks=[make()], max_epochs=4).fit(Language(), words())


def test_layers_that_share_a_weight_are_warned_of_if_they_go_apart():
    class Within(Language):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5)
            self.backbone[2].weight = self.backbone[1].weight

    trainer(callbacks=[FreezeBackboneFinetune()]).fit(Within(), words())
    with pytest.warns(UserWarning, match="`backbone.2.weight` with `backbone.1.weight`"):
        trainer(callbacks=[FreezeBackboneFinetune(schedule={1: "2", 2: "all"})]).fit(Within(), words())


def test_a_shared_weight_that_the_user_froze_or_that_is_outside_is_none_to_warn_of():
    module = Language()
    module.head.weight.requires_grad_(False)
    trainer(callbacks=[FreezeBackboneFinetune()]).fit(module, words())
    trainer(callbacks=[FreezeBackboneFinetune(lambda module: module.backbone[1:])]).fit(Language(), words())


def test_a_shared_weight_rests_in_the_group_of_another_layer_too():
    class Whole(Language):
        """Its head is a layer like the others."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*self.backbone, self.head)
            self.backbone, self.head = self.net[:-1], self.net[-1]

        def configure_optimizers(self):
            return Shrinks(self.parameters(), 0.1)

    module = Whole()
    start = weights(module.net)
    with pytest.warns(UserWarning, match="which is the same parameter"):
        trainer(callbacks=[FreezeBackboneFinetune("net", schedule={0: "3"})], max_epochs=1).fit(module, words())
    moved = {name for name, value in weights(module.net).items() if not torch.equal(start[name], value)}
    assert moved == {"3.bias"}


# ---- modes


class DropsOut(Timm):
    """Drops out everywhere: behind the position, in attention, in mixing, whole branches, and before the classifier."""

    def __init__(self):
        rates = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "drop_rate")
        super().__init__("test_vit", **dict.fromkeys(rates, 0.5))
        self.modes, self.features = [], []

    def training_step(self, batch, batch_idx):
        self.train()
        self.modes.append({name for name, part in self.model.named_modules() if part.training})
        with torch.no_grad():
            one, other = (self.model.forward_features(nn.functional.interpolate(batch[0], 32)) for _ in range(2))
        self.features.append(torch.equal(one, other))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("train_norm", [False, True])
def test_what_is_frozen_evaluates_and_what_stands_before_the_classifier_trains(train_norm):
    module = DropsOut()
    trick = FreezeBackboneFinetune(None, schedule={0: "head", 1: "blocks.5"}, train_norm=train_norm)
    trainer(callbacks=[trick], max_epochs=2).fit(module, loader(16))
    of = {name: part for name, part in module.model.named_modules() if name}
    norms = {name for name, part in of.items() if isinstance(part, nn.LayerNorm)} if train_norm else set()
    of_head = {"", "fc_norm", "head_drop", "head"}
    of_last = {name for name in of if name.startswith("blocks.5") or name == "norm"} | {"blocks"}
    assert module.modes == [of_head | norms] * 2 + [of_head | norms | of_last] * 2
    assert module.features == [True, True, False, False]
    assert all(part.training for part in module.modules())


def test_dropout_goes_on_until_its_layer_freezes_and_when_it_thaws_again():
    module, modes = deep(), []
    module.backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.Dropout(0.1)),
        nn.Dropout(0.1),
        nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    inner, between = module.backbone[0][1], module.backbone[1]
    module.on_train_batch_end = lambda *_: modes.append((inner.training, between.training, module.backbone.training))
    table = {1: {"0"}, 2: {"0", "2"}, 3: {"2"}, 4: set()}
    trick = Turns(table)
    trainer(callbacks=[trick], max_epochs=2).fit(module, loader(24), loader(8))
    assert modes == [
        (True, True, True),
        (False, True, True),
        (False,) * 3,
        (True, True, True),
        (True, True, True),
        (True,) * 3,
    ]
