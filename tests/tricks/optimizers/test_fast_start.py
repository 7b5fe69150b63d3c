"""A fresh network's start is made before its first step, once; all else of the run stays as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import two

from lightning_speedups import FastStart, FeatureCache, FreezeBackboneFinetune
from zoo import (
    CLASSES,
    STOPS,
    Batches,
    Classifier,
    Manual,
    ReplayLoader,
    Timm,
    assert_same_weights,
    endless,
    fit_interrupted,
    images,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [FastStart(logit_scale=0.5, batch_norm_momentum=0.4)]}


class Deep(Classifier):
    """A convolution more, and dropout, which draws; notes in each step what it has, and what its stem makes."""

    def __init__(self, optimizer="sgd", **arguments):
        super().__init__(optimizer=optimizer, **arguments)
        layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.backbone = nn.Sequential(*layers, nn.Dropout(0.2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.had, self.made, self.trained = [], [], []

    def training_step(self, batch, batch_idx):
        self.had.append(weights(self))
        self.made.append(self.backbone[0](batch[0]).detach())
        self.trained.append({name for name, p in self.named_parameters() if p.requires_grad})
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.without_gradient = {name for name, p in self.named_parameters() if p.grad is None}


STEM = {"backbone.0.weight", "backbone.0.bias"}


def fitted(*callbacks, data=None, module=None, **arguments):
    module = Deep() if module is None else module
    trainer(callbacks=list(callbacks), **arguments).fit(module, ReplayLoader() if data is None else data)
    return module


def test_the_first_steps_forward_has_the_new_weights():
    torch.manual_seed(1)
    fresh = Deep()
    before = weights(fresh)
    module = fitted(FastStart(dirac=True, logit_scale=0.25), module=fresh, max_steps=1)
    had, made = module.had[0], module.made[0].double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(np.cov(made[:4].numpy(), bias=True), np.eye(4), atol=0.01)
    torch.testing.assert_close(made[4:], -made[:4])
    assert torch.equal(had["backbone.3.weight"], nn.init.dirac_(torch.empty(6, 8, 3, 3)))
    for name in ("head.weight", "head.bias"):
        assert torch.equal(had[name], before[name] / 4)
    assert torch.equal(had["backbone.3.bias"], before["backbone.3.bias"])
    assert module.seen[0][0].shape == (8, 2, 8, 8)


def test_draws_and_data_of_the_run_are_those_of_a_run_without_it():
    seen = []
    for callbacks in ([], [FastStart(dirac=True)]):
        torch.manual_seed(5)
        module = Deep()
        data = DataLoader(TensorDataset(*images()), batch_size=8, shuffle=True)
        fitted(*callbacks, data=data, module=module, max_epochs=2)
        seen.append((module.seen, torch.rand(3)))
    for (one, _), (other, _) in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_frozen_stem_rests_to_the_bit_without_gradient_and_trains_again_after_the_fit(optimizer, precision):
    options = {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}
    module = fitted(FastStart(dirac=True), module=Deep(optimizer), accumulate_grad_batches=2, **options)
    for name in STEM:
        assert all(torch.equal(had[name], module.had[0][name]) for had in [*module.had, weights(module)])
    assert all(names == {n for n, _ in module.named_parameters()} - STEM for names in module.trained)
    assert module.without_gradient == STEM
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not torch.equal(weights(module)["backbone.3.weight"], module.had[0]["backbone.3.weight"])


def test_a_stem_that_is_not_frozen_trains_on():
    module = fitted(FastStart("trained", dirac=True))
    assert not torch.equal(module.had[0]["backbone.0.weight"], weights(module)["backbone.0.weight"])
    assert module.without_gradient == set()


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_keeps_its_weights_and_its_stem_frozen(stop):
    torch.manual_seed(2)
    whole = Deep()
    whole.backbone[5] = nn.Identity()
    parted = copy.deepcopy(whole)
    fitted(FastStart(dirac=True, fixed_norm_weights=True), module=whole)
    fit_interrupted(parted, ReplayLoader(), stop, [FastStart(dirac=True, fixed_norm_weights=True)])
    other = Deep()  # as a new process would have it, with another start
    other.backbone[5] = nn.Identity()
    resume(other, ReplayLoader(), [FastStart(dirac=True, fixed_norm_weights=True)])
    assert_same_weights(weights(whole), weights(other))
    fixed = STEM | {"backbone.1.weight", "backbone.4.weight"}
    assert all(not names & fixed for names in [*other.trained, *whole.trained])
    other.trained.clear()
    fitted(FastStart(dirac=True, fixed_norm_weights=True), module=other, max_steps=1)
    assert_same_weights(weights(whole), other.had[-1])
    assert not other.trained[0] & fixed


def test_a_run_that_began_without_it_goes_on_without_it():
    whole = Deep()
    whole.backbone[5] = nn.Identity()
    parted = copy.deepcopy(whole)
    fitted(module=whole)
    fit_interrupted(parted, ReplayLoader(), 4, [])
    with pytest.warns(UserWarning, match="FastStart does nothing in a run that began without it"):
        resume(parted, ReplayLoader(), [FastStart(dirac=True)])
    assert_same_weights(weights(whole), weights(parted))
    assert all(names >= STEM for names in parted.trained)


def test_a_second_fit_goes_on_from_the_weights_of_the_first():
    module = fitted(FastStart(dirac=True, logit_scale=0.5))
    for trick in (FastStart(dirac=True, logit_scale=0.5), FastStart(dirac=True, logit_scale=0.5)):
        before = weights(module)
        module.had.clear()
        fitted(trick, module=module, max_epochs=1)
        assert_same_weights(before, module.had[0])
        assert not module.trained[-1] & STEM


def test_a_network_that_has_its_first_weights_again_is_started_again():
    module = Deep()
    first = weights(module)
    fitted(FastStart(dirac=True), module=module, max_steps=2)
    after = module.had[0]
    module.load_state_dict(first)
    module.had.clear()
    fitted(FastStart(dirac=True), module=module, max_steps=2)
    assert_same_weights(after, module.had[0])


def test_a_network_that_has_trained_before_is_refused():
    module = fitted(max_steps=2)
    for fresh in (module, copy.deepcopy(module)):
        with pytest.raises(MisconfigurationException, match="overwrite weights that were trained, as norms show"):
            fitted(FastStart(dirac=True), module=fresh)
        assert all(parameter.requires_grad for parameter in fresh.parameters())
    before = weights(module)
    fitted(FastStart(None, batch_norm_momentum=0.4), module=module, max_steps=1)  # writes no weights
    assert_same_weights(before, module.had[-1])


def test_norms_have_their_momentum_for_the_time_of_the_fit_and_weights_of_one_stay():
    module, momenta = Deep(), []
    module.on_train_batch_end = lambda *_: momenta.append([module.backbone[i].momentum for i in (1, 4)])
    fitted(FastStart(None, batch_norm_momentum=0.4, fixed_norm_weights=True), module=module, max_steps=2)
    assert momenta == [[0.4, 0.4]] * 2
    for i in (1, 4):
        assert module.backbone[i].momentum == 0.1
        assert torch.equal(module.backbone[i].weight, torch.ones_like(module.backbone[i].weight))
        assert module.backbone[i].bias.any()
        assert module.backbone[i].weight.requires_grad


def test_a_network_of_timm_starts_as_the_functions_say():
    module = Timm("resnet18", zero_init_last=False)
    noted = {}

    class Notes(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            noted.setdefault("first", weights(pl_module.model))

    fitted(FastStart("trained", dirac=True, zero_residual=True, logit_scale=0.1), Notes(), module=module, max_steps=1)
    first, model = noted["first"], timm.create_model("resnet18", num_classes=CLASSES, in_chans=2)
    assert not any(first[f"layer{i}.{b}.bn2.weight"].any() for i in (1, 2, 3, 4) for b in (0, 1))
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and name.endswith(("conv1", "conv2")) and "." in name:
            same = min(conv.weight.shape[:2])
            expected = nn.init.dirac_(torch.empty_like(conv.weight))[:same]
            assert torch.equal(first[f"{name}.weight"][:same], expected)


def test_a_network_is_found_by_its_path_and_what_is_beside_it_or_frozen_stays():
    module = Deep()
    module.teacher = copy.deepcopy(module.backbone).requires_grad_(False)
    module.criterion = None
    before = weights(module.teacher)
    fitted(FastStart(dirac=True, network="backbone"), module=module, max_steps=1)
    assert_same_weights(before, weights(module.teacher))
    first = Deep()
    first.teacher, first.backbone = copy.deepcopy(first.backbone), first.backbone
    with pytest.raises(MisconfigurationException, match=r"FastStart\(network='body'\) finds no such part"):
        fitted(FastStart(network="body"), module=first)


def test_a_compiled_network_is_looked_at_as_it_is_written_and_compiled_as_before():
    compiled, ends = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for is_compiled in (False, True):
        torch.manual_seed(3)
        module = Classifier()
        if is_compiled:
            module.backbone = torch.compile(module.backbone, backend=backend, fullgraph=True)
        fitted(FastStart(), module=module, max_epochs=1)
        ends.append({name.replace("_orig_mod.", ""): value for name, value in weights(module).items()})
    assert len(compiled) == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


class Named(Deep):
    """Calls its stem by keyword, behind a frozen network."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher(batch[0])
        self.made.append(self.backbone[0](input=batch[0]).detach())
        return super().training_step(batch, batch_idx)


def test_a_stem_may_be_called_by_keyword_and_behind_what_does_not_train():
    made = fitted(FastStart(dirac=True), module=Named(), max_steps=1).made[0].double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(np.cov(made[:4].numpy(), bias=True), np.eye(4), atol=0.01)


def test_a_stem_stays_frozen_when_the_backbone_around_it_thaws():
    module = fitted(FastStart(), FreezeBackboneFinetune(unfreeze_at_epoch=1), max_epochs=3)
    assert {frozenset(names & STEM) for names in module.trained} == {frozenset()}
    assert "backbone.3.weight" in module.trained[-1]
    assert torch.equal(module.had[-1]["backbone.0.weight"], weights(module)["backbone.0.weight"])
    made = module.made[0].double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(np.cov(made[:4].numpy(), bias=True), np.eye(4), atol=0.01)


class Own(Classifier):
    """Each process sees images of its own."""

    def train_dataloader(self):
        return loader(seed=self.trainer.global_rank)


def test_all_ranks_start_from_the_first_ones_sample_and_stay_equal():
    module = Own()
    fitted_alone = fitted(FastStart(), module=copy.deepcopy(module), data=loader(seed=0), max_steps=1)
    two([FastStart(), Keeps()], max_epochs=2).fit(module)
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_weights(first, second)
    assert torch.equal(first["backbone.0.weight"], weights(fitted_alone)["backbone.0.weight"])


class Keeps(Callback):
    def on_train_end(self, trainer, pl_module):
        parameters = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        torch.save(parameters, f"rank{trainer.global_rank}.pt")


class Fetches(Classifier):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class Idle(Classifier):
    """Does not call its first convolution."""

    def __init__(self):
        super().__init__()
        self.backbone.insert(0, nn.Identity())
        self.unused = self.backbone[1]
        self.backbone[1] = nn.Conv2d(2, 6, 3)
        self._modules = {"unused": self.unused, **self._modules}


class Late(Deep):
    """Its first layers stand behind the others."""

    def __init__(self):
        super().__init__()
        self.head, self.backbone = nn.Sequential(*self.backbone[3:], self.head), self.backbone[:3]
        self._modules = {"head": self.head, "backbone": self.backbone}


REFUSED = {
    "cannot try the first training step: Manual optimizes manually": lambda: (Manual(), loader()),
    r"cannot whiten by the first batch: Expected `images` to hold more": lambda: (Classifier(), Batches((torch.randn(1, 2, 5, 4), torch.tensor([1])))),
    "first batch: Fetches.training_step fetches its batches itself": lambda: (Fetches(), loader()),
    "first batch: Idle.training_step does not call `unused`": lambda: (Idle(), loader()),
    r"first batch: Late.training_step does not call `head\.0` first, but `backbone\.0`": lambda: (Late(), loader()),
    "finds no first convolution that is plain": lambda: (Timm("resnetv2_18d", stem_type="same", conv_layer=timm.layers.StdConv2d), loader()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_whitened_is_refused_with_a_way_out(what):
    module, data = REFUSED[what]()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=rf"FastStart\(whiten='frozen'\).*{what}.*Use `whiten=None`"):
        fitted(FastStart(), module=module, data=data)
    assert_same_weights(before, weights(module))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_cache_of_features_and_a_strategy_that_splits_are_refused():
    with pytest.raises(MisconfigurationException, match=r"FastStart changes a fresh network .* FeatureCache"):
        fitted(FastStart(), FeatureCache())
    run = trainer()
    run._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        FastStart().setup(run, Deep(), "fit")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"whiten": True}, "`whiten` to be 'frozen' or 'trained', or None, but got True"),
        ({"logit_scale": 0}, "`logit_scale` to be a number above 0, or None, but got 0"),
        ({"batch_norm_momentum": 1.5}, r"`batch_norm_momentum` to be a number in \(0, 1\], or None, but got 1.5"),
        ({"zero_residual": True, "fixed_norm_weights": True}, "`fixed_norm_weights` to be False with `zero_residual`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=f"Expected {rule}"):
        FastStart(**arguments)


def test_a_part_that_finds_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"finds no convolutions to begin as the identity in Classifier"):
        fitted(FastStart(dirac=True), module=Classifier(), max_steps=1)


def test_no_loader_is_asked_twice():
    fitted(FastStart(dirac=True), data=endless(), max_epochs=-1, max_steps=3)
