"""The grip on layers: found, frozen and thawed at any moment, and given back."""

import itertools
from functools import partial

import pytest
import timm
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import ADD_PARAM_GROUP, patched
from torch import nn

from lightning_speedups import FreezeBackboneFinetune, FreezeProgressively
from lightning_speedups.tricks.transfer.base import FreezingTrick, find_layers, forget_state
from zoo import Classifier, fit_interrupted, loader, trainer, weights


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


def test_forgotten_parameters_start_anew_but_for_adagrad_whose_state_is_made_once():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for cls in (torch.optim.AdamW, torch.optim.Adagrad):
        optimizer = cls([one, other], lr=0.1)
        for parameter in (one, other):
            parameter.grad = torch.ones(2)
        optimizer.step()
        forget_state([optimizer], iter([one]))
        assert (one in optimizer.state) == (cls is torch.optim.Adagrad)
        assert other in optimizer.state
        optimizer.step()


def test_a_timm_backbone_without_a_head_has_timms_layers():
    module = Classifier()
    module.backbone = timm.create_model("resnet10t", num_classes=0, in_chans=2)
    names = [layer.name for layer in find_layers(module, "backbone")]
    assert names == ["stem", "layer1", "layer2", "layer3", "layer4"]


def test_families_of_timm_without_coarse_groups_or_without_any():
    def names(name):
        module = Classifier()
        module.model = timm.create_model(name, num_classes=4)
        layers = find_layers(module, None)
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
    layers = find_layers(module, lambda m: [m.backbone[:2], m.backbone[3], m.head, nn.ReLU()])
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
