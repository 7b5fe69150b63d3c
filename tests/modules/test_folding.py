"""Folded networks against the same networks unfolded; what may not be folded is not."""

import copy
import pickle
import random
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct, StdConv2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, weight_norm

from lightning_speedups.modules.folding import FoldedNorms, conv_norm_pairs


def lively(module, seed=0):
    """Statistics and weights of norms as after a training, so that a norm left out or done twice shows."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            values = ((norm.running_mean, -0.3, 0.3), (norm.running_var, 0.5, 2.0), (norm.weight, 0.5, 1.5))
            for tensor, low, high in (*values, (norm.bias, -0.3, 0.3)):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return module.eval().requires_grad_(False)


def images(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 3, 9, 9)), generator=torch.Generator().manual_seed(1)).to(dtype)


def tower(**arguments):
    return lively(nn.Sequential(nn.Conv2d(3, 4, 3, **arguments), nn.BatchNorm2d(4), nn.ReLU()))


def attributes(module):
    return {name: list(vars(part).items()) for name, part in module.named_modules()}


class Calls:
    """Counts the batch norms that are computed."""

    def __init__(self, monkeypatch):
        self.norms = 0
        whole = F.batch_norm

        def counted(*args, **kwargs):
            self.norms += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(F, "batch_norm", counted)


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Untraceable(Residual):
    """Its own convolution is paired only if the rest is taken for black boxes; its forward goes by what it sees."""

    def forward(self, x):
        if x.mean() > 1e6:
            return x
        return super().forward(x)


class Gate(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.inner(x) if x.mean() < 1e6 else x


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Gate()

    def forward(self, x):
        return self.gate(self.norm(self.conv(x)))


# name: number of pairs, number of norms
TIMM = {
    "resnet18": (20, 20),
    "resnet26d": (31, 31),
    "mobilenetv3_small_050": (34, 34),
    "efficientnet_lite0": (49, 49),
    "tf_efficientnet_b0": (49, 49),  # convolutions with a forward of their own
    "regnetx_002": (44, 44),
    "densenet121": (59, 121),  # most norms come before the convolution
    "convnext_atto": (0, 0),
    "test_vit": (0, 0),
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_models_give_the_same_folded_and_are_left_as_they_were(name):
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=5))
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    before = attributes(model)
    pairs = conv_norm_pairs(model)
    assert (len(pairs), norms) == TIMM[name]
    assert attributes(model) == before
    size = 160 if name == "test_vit" else 64
    single = images(2, 3, size, size)
    expected = model(single)
    folded = FoldedNorms(pairs)
    assert len(folded) == len(pairs)
    torch.testing.assert_close(model(single), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    double = copy.deepcopy(model).double()
    got = double(single.double())
    folded.undo()
    assert attributes(model) == before
    assert torch.equal(model(single), expected)
    expected = copy.deepcopy(model).double()(single.double())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize(("make", "pairs"), [(Residual, 6), (Untraceable, 6), (Gated, 2)])
def test_networks_by_hand_compute_no_norm_at_all(make, pairs, monkeypatch):
    torch.manual_seed(0)
    model = lively(make()).double()
    x = images(dtype=torch.double)
    expected = model(x)
    folded = FoldedNorms(conv_norm_pairs(model))
    assert len(folded) == pairs
    calls = Calls(monkeypatch)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert calls.norms == 0


def test_stochastic_depth_can_be_searched_and_draws_nothing():
    model = timm.create_model("test_efficientnet", drop_path_rate=0.3).train()
    state, ours = torch.get_rng_state(), random.getstate()
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert len(conv_norm_pairs(model)) == norms > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == ours
    assert model.training


class Two(nn.Module):
    """A convolution and a norm; each way to use them is a forward."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.way, self.stored = way, []

    def forward(self, x, scale=None):
        return self.way(self, x, scale)


def kept(self, x):
    self.stored.append(self.conv(x))
    return self.norm(self.stored[-1])


WRONG_USES = {
    "added": lambda self, x, _: (y := self.conv(x)) + self.norm(y),
    "given back": lambda self, x, _: (y := self.conv(x), self.norm(y)),
    "two norms": lambda self, x, _: self.norm(y := self.conv(x)) + self.other(y),
    "shared convolution": lambda self, x, _: self.norm(self.conv(self.conv(x))),
    "shared norm": lambda self, x, _: self.norm(self.norm(self.conv(x))),
    "something between": lambda self, x, _: self.norm(self.conv(x).relu()),
    "the other way round": lambda self, x, _: self.conv(self.norm(x)),
    "called by forward": lambda self, x, _: self.norm(self.conv(x)) + self.conv.forward(x),
    "kept": lambda self, x, _: kept(self, x),
    "in training only": lambda self, x, _: (
        self.norm(y := self.conv(x)) + y if self.training else self.norm(self.conv(x))
    ),
    "in eval only": lambda self, x, _: self.norm(self.conv(x)) if self.training else self.norm(y := self.conv(x)) + y,
    "without the option": lambda self, x, scale: (
        self.norm(y := self.conv(x)) + y if scale is None else self.norm(self.conv(x))
    ),
    "with the option": lambda self, x, scale: (
        self.norm(self.conv(x)) if scale is None else self.norm(y := self.conv(x)) + y
    ),
    "never": lambda self, x, _: x,
}


@pytest.mark.parametrize("use", WRONG_USES)
def test_what_more_than_the_norm_sees_is_no_pair(use):
    model = Two(WRONG_USES[use])
    assert conv_norm_pairs(model) == []
    assert model.stored == []


def test_the_plain_use_is_a_pair_whatever_the_mode():
    model = Two(lambda self, x, _: self.norm(input=self.conv(input=x)))
    assert conv_norm_pairs(model.train()) == conv_norm_pairs(model.eval()) == [(model.conv, model.norm)]
    lively(model)
    x = images()
    expected = model(x)
    FoldedNorms(conv_norm_pairs(model))
    torch.testing.assert_close(model(x), expected)


def test_a_search_writes_to_no_buffer_and_warns_of_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.plain, self.conv, self.norm = torch.zeros(()), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            warnings.warn("look", stacklevel=1)
            self.calls.add_(1)
            self.plain.add_(1)
            torch.rand(3), random.random()
            return self.norm(self.conv(x))

    model = Counting()
    state, ours = torch.get_rng_state(), random.getstate()
    assert len(conv_norm_pairs(model)) == 1
    assert model.calls == model.plain == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == ours


def hooked(model, name):
    getattr(model, name)(lambda *_: None)
    return model


def own_forward(model, part):
    module = model[part]
    module.forward = lambda x: type(module).forward(module, x)
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Late(nn.BatchNorm2d):
    """Has what timm's have, and does otherwise."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


UNFOLDABLE = {
    "hook": lambda: nn.Sequential(hooked(nn.Conv2d(3, 4, 3), "register_forward_hook"), nn.BatchNorm2d(4)),
    "pre-hook": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), hooked(nn.BatchNorm2d(4), "register_forward_pre_hook")),
    "hook on a wrapper": lambda: nn.Sequential(
        hooked(nn.Sequential(nn.Conv2d(3, 4, 3)), "register_forward_hook"), nn.BatchNorm2d(4)
    ),
    "backward hook": lambda: nn.Sequential(
        hooked(nn.Conv2d(3, 4, 3), "register_full_backward_hook"), nn.BatchNorm2d(4)
    ),
    "no statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()),
    "another width": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8)),
    "other dimensions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), backend="eager"),
    "compiled in place": lambda: compiled_in_place(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    "forward of its own on the convolution": lambda: own_forward(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0
    ),
    "forward of its own on the norm": lambda: own_forward(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1),
    "weights standardised": lambda: nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "norm that adds": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Shifted(4)),
    "norm that acts first": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Late(4)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_is_not_certain_is_not_folded(name):
    model = UNFOLDABLE[name]()
    before = attributes(model)
    assert conv_norm_pairs(model) == []
    assert attributes(model) == before
    if not name.startswith("compiled") and len(list(model.children())) == 2:
        assert len(FoldedNorms([tuple(model.children())])) == 0  # pairs that somebody else found
        assert attributes(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")
def test_neighbours_of_what_cannot_be_folded_are():
    model = lively(nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1)), hooked(tower(), "register_forward_hook")))
    assert conv_norm_pairs(model) == [(model[1][0], model[1][1])]


FOLDABLE = {
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 9)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 5, 5, 5)),
    "sync": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), (2, 3, 9, 9)),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 9, 9)),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.1)), (2, 3, 9, 9)),
    "reflect": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(4)),
        (2, 3, 9, 9),
    ),
    "zeros around": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, stride=2), nn.BatchNorm2d(4)), (2, 3, 9, 9)),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.BatchNorm2d(8)),
        (2, 4, 9, 9),
    ),
    "same": (lambda: nn.Sequential(Conv2dSame(3, 4, 3, 2), nn.BatchNorm2d(4)), (2, 3, 9, 9)),
    "same in groups": (lambda: nn.Sequential(Conv2dSame(4, 8, 3, 2, groups=4), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    "norm and activation": (lambda: ConvNormAct(3, 4, 3, act_layer=nn.Hardswish), (2, 3, 9, 9)),
    "norm and no activation": (lambda: ConvNormAct(3, 4, 3, apply_act=False), (2, 3, 9, 9)),
    "no image": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (0, 3, 9, 9)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_all_kinds_of_pairs_agree_with_themselves_unfolded(name, monkeypatch):
    make, shape = FOLDABLE[name]
    torch.manual_seed(0)
    model, x = lively(make()).double(), images(*shape, dtype=torch.double)
    expected = model(x)
    assert len(FoldedNorms(conv_norm_pairs(model))) == 1
    calls = Calls(monkeypatch)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert calls.norms == 0


def test_dropout_and_activation_behind_a_norm_still_run_with_their_own_mode():
    norm = BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=lambda: nn.Dropout(0.5))
    synced = SyncBatchNormAct(4)
    synced.drop, synced.act = norm.drop, norm.act
    for each in (norm, synced):
        model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), each))
        norm.drop.train()
        norm.act.requires_grad_(True)
        torch.manual_seed(2)
        expected = model(images())
        folded = FoldedNorms(conv_norm_pairs(model))
        assert len(folded) == 1
        torch.manual_seed(2)
        got = model(images())
        torch.testing.assert_close(got, expected)
        assert (got == 0).any()
        got.sum().backward()
        assert norm.act.weight.grad.abs().sum() > 0
        folded.undo()


def test_the_state_is_the_same_while_folded():
    model = Residual()
    lively(model)
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.named_parameters())
    folded = FoldedNorms(conv_norm_pairs(model))
    model(images())
    for state in (model.state_dict(), copy.deepcopy(model).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Residual().named_modules()]
    assert all(a is b for (_, a), (_, b) in zip(parameters, model.named_parameters(), strict=True))
    other = lively(Residual(), seed=5)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(images()), other(images()))
    folded.undo()
    folded.undo()
    assert torch.equal(model(images()), other(images()))


def test_folding_twice_folds_once():
    model = tower()
    before = attributes(model)
    pairs = conv_norm_pairs(model)
    first = FoldedNorms(pairs + pairs)
    assert (len(first), len(FoldedNorms(pairs)), conv_norm_pairs(model)) == (1, 0, [])
    first.undo()
    assert len(first) == 0
    assert attributes(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("called", [True, False])
def test_a_copy_stands_on_its_own(copied, called):
    model, x = tower(), images()
    expected = model(x)
    folded = FoldedNorms(conv_norm_pairs(model))
    if called:
        model(x)
    twin = copied(model)
    torch.testing.assert_close(twin(x), expected)
    twin[0].weight.data.zero_()
    twin[0].bias.data.zero_()
    for part, original in zip(twin, model, strict=True):
        if "forward" in vars(part):
            assert part.forward.module is part is not original
    torch.testing.assert_close(model(x), expected)
    twin[0].weight.zero_()
    assert not torch.allclose(twin(x), expected)
    folded.undo()
    assert torch.equal(model(x), expected)


CHANGES = {
    "weight": lambda model: model[0].weight.mul_(2),
    "bias": lambda model: model[0].bias.add_(1),
    "scale": lambda model: model[1].weight.mul_(3),
    "shift": lambda model: model[1].bias.add_(3),
    "mean": lambda model: model[1].running_mean.add_(1),
    "variance": lambda model: model[1].running_var.mul_(2),
    "eps": lambda model: setattr(model[1], "eps", 1.0),
    "in inference mode": lambda model: torch.inference_mode()(model[0].weight.mul_)(2),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight * 2, False)),
    "data": lambda model: setattr(model[0].weight, "data", model[0].weight * 2),
    "no bias": lambda model: setattr(model[0], "bias", None),
    "state": lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    "hook": lambda model: model[0].register_forward_hook(lambda module, args, out: out.relu()),
    "hook on the norm": lambda model: model[1].register_forward_hook(lambda module, args, out: out + 1),
    "weight_norm": lambda model: parametrizations.weight_norm(model[0]).requires_grad_(False),
    "training": lambda model: model[1].train(),
    "no statistics": lambda model: setattr(model[1], "running_mean", setattr(model[1], "running_var", None)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_is_seen(name):
    plain = tower()
    model = copy.deepcopy(plain)
    FoldedNorms(conv_norm_pairs(model))
    before = model(images())
    for each in (plain, model):
        CHANGES[name](each)
    expected = plain(images())
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(model(images()), expected)
    torch.testing.assert_close(model(images()), plain(images()))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_what_is_written_past_the_version_counter_is_seen_after_forget():
    model = tower()
    folded = FoldedNorms(conv_norm_pairs(model))
    model(images())
    model[0].weight.data.mul_(2)
    folded.forget()
    got = model(images())
    folded.undo()
    torch.testing.assert_close(got, model(images()))


def test_a_new_weight_at_an_old_address_is_seen():
    model = tower()
    FoldedNorms(conv_norm_pairs(model))
    for _ in range(20):
        model(images())
        for factor in (3, -1 / 3):  # the second takes the memory of the first one's predecessor, if that is free
            model[0].weight = nn.Parameter(model[0].weight * factor, False)
        expected = F.relu(F.batch_norm(F.conv2d(images(), model[0].weight, model[0].bias), *norm_of(model[1])))
        torch.testing.assert_close(model(images()), expected)


def norm_of(norm):
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


@pytest.mark.parametrize("trained", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_gradients_flow_as_always_where_something_trains(trained):
    plain = tower()
    model = copy.deepcopy(plain)
    FoldedNorms(conv_norm_pairs(model))
    model(images())
    for each in (plain, model):
        each.get_parameter(trained).requires_grad_(True)
        each(images()).square().sum().backward()
    assert torch.equal(model.get_parameter(trained).grad, plain.get_parameter(trained).grad)
    model.get_parameter(trained).requires_grad_(False)
    assert not model(images()).requires_grad


def test_the_norm_learns_its_statistics_when_it_trains():
    plain = tower()
    model = copy.deepcopy(plain)
    FoldedNorms(conv_norm_pairs(model))
    for mode in (False, True, False):
        for each in (plain, model):
            each.train(mode)
        torch.testing.assert_close(model(images()), plain(images()))
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_the_input_gets_its_gradient():
    model = tower()
    gradients = []
    for fold in (False, True):
        if fold:
            FoldedNorms(conv_norm_pairs(model))
        x = images().requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_weights_folded_in_inference_mode_serve_in_training():
    model = tower()
    FoldedNorms(conv_norm_pairs(model))
    with torch.inference_mode():
        model(images())
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_norm_alone_still_norms():
    model = tower()
    x = images(2, 4, 9, 9)
    expected = model[1](x)
    FoldedNorms(conv_norm_pairs(model))
    model(images())
    assert torch.equal(model[1](x), expected)


def test_an_input_without_batch_is_not_folded():
    model = lively(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
    x = images(3, 6)  # the norm takes the 4 x 4 output for 4 samples of 4 channels
    expected = model(x)
    FoldedNorms(conv_norm_pairs(model))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_is_followed(dtype):
    model, x = tower(), images()
    exact = copy.deepcopy(model).to(dtype).double()(x.to(dtype).double())
    FoldedNorms(conv_norm_pairs(model))
    model(x)
    got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=4 * eps, atol=16 * eps)
    assert model.float()(x).dtype == torch.float32


def test_statistics_of_half_precision_are_folded_in_single():
    model = tower(bias=False).half()
    model[1].running_var.fill_(1e-4)
    scale = (model[1].weight.double() / (model[1].running_var.double() + 1e-5).sqrt()).reshape(-1, 1, 1, 1)
    FoldedNorms(conv_norm_pairs(model))
    model(images(dtype=torch.half))
    expected = (model[0].weight.double() * scale).half()
    torch.testing.assert_close(model[0].forward.folded["weight"], expected, rtol=1e-3, atol=0)
    assert (model[0].forward.folded["weight"] == expected).float().mean() > 0.95


def test_autocast_is_followed():
    model, x = tower(), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        FoldedNorms(conv_norm_pairs(model))
        got = model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
    assert model(x).dtype == torch.float32
    assert model[0].forward.folded["weight"].dtype == torch.float32


def test_another_device_is_followed():
    model = tower()
    FoldedNorms(conv_norm_pairs(model))
    model(images())
    assert model.to("meta")(images().to("meta")).shape == (2, 4, 7, 7)


def test_a_whole_that_is_compiled_later_computes_the_plain_way():
    model, x = tower(), images()
    expected = model(x)
    FoldedNorms(conv_norm_pairs(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_tensors_of_vmap_are_refused():
    model, x = tower(), images()
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in model.named_parameters()}

    def outputs():
        return torch.vmap(lambda parameters: torch.func.functional_call(model, parameters, (x,)))(stacked)

    folded = FoldedNorms(conv_norm_pairs(model))
    with pytest.raises(RuntimeError, match=r"vmap|data pointer|storage"):
        outputs()
    folded.undo()
    assert len(outputs()) == 2


def test_the_search_shares_what_it_is_told_to():
    class Refuses:
        def __deepcopy__(self, memo):
            raise RuntimeError("do not copy")

    model = Two(lambda self, x, _: self.norm(self.conv(x)))
    model.trainer = Refuses()
    assert conv_norm_pairs(model) == []
    assert len(conv_norm_pairs(model, shared=[model.trainer])) == 1


def test_forward_put_on_a_container_is_not_looked_past():
    model = nn.Sequential(tower(), nn.Identity())
    inner = model[0]
    inner.forward = lambda x: inner[1](inner[0](x)) + inner[0](x)
    assert conv_norm_pairs(model) == conv_norm_pairs(inner) == []


def test_a_convolution_with_a_norm_for_each_of_two_domains_is_no_pair():
    class Domains(nn.Module):
        """Cannot be traced, but its children can."""

        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(3, 3, 3)
            self.day, self.night = (nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2))

        def forward(self, x):
            return self.day(x) if x.mean() > 0 else self.night(x)

    assert conv_norm_pairs(Domains()) == []


def test_pairs_come_in_the_order_of_the_modules():
    model = Residual()
    assert [conv for conv, _ in conv_norm_pairs(model)] == [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.fixture
def traced(monkeypatch):
    """The modules that are traced."""
    seen, trace = [], torch.fx.Tracer.trace
    monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *args: seen.append(type(args[1])) or trace(*args))
    return seen


@pytest.mark.parametrize("lacking", ["norms", "convolutions", "both"])
def test_what_holds_no_pair_at_all_is_not_traced(lacking, traced):
    parts = {"norms": nn.Conv2d(1, 2, 3), "convolutions": nn.BatchNorm2d(2), "both": nn.LayerNorm(2)}
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    assert (
        conv_norm_pairs(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), parts[lacking]))
        == []
    )
    assert traced == []


class Chooses(nn.Module):
    """What a tracer cannot follow, around something without a convolution and without a norm."""

    def __init__(self):
        super().__init__()
        self.tower, self.rest = (
            tower(),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False),
        )

    def forward(self, inputs):
        return self.rest(inputs) if inputs.mean() > 0 else self.tower(inputs)


def test_parts_without_convolutions_and_norms_are_passed_over_and_the_others_are_found(traced):
    assert len(conv_norm_pairs(nn.Sequential(Chooses()))) == 1
    assert not set(traced) & {nn.TransformerEncoder, nn.TransformerEncoderLayer}
