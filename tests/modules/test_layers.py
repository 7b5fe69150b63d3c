"""Layers against what timm says of its models, and by hand for others."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision import models
from transformers_like import BertLike, GptLike

from lightning_speedups.modules.layers import (
    Layer,
    find_layers_in,
    is_norm,
    layers_by_child,
    layers_by_number,
    matches,
    owners,
    pick_layers,
    rates_by_depth,
    split_layers,
    unreserved,
)

BLOCKS = [f"blocks.{i}" for i in range(6)]
TIMM = {
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4"],
    "mobilenetv3_small_050": ["stem", *BLOCKS, "conv_head"],
    "efficientnet_b0": ["stem", *BLOCKS, "blocks.6"],
    "test_vit": ["stem", *BLOCKS],
    "convnext_atto": ["stem", "stages.0", "stages.1", "stages.2", "stages.3"],
}


def timm_model(name):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=4)


def timm_layers(model, without=None):
    numbers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    return layers_by_number(model, numbers, [model.get_classifier()] if without is None else without)


def tensors(model, layer):
    """The names of a layer's parameters and buffers."""
    path_of = {module: path for path, module in model.named_modules()}
    return [
        f"{path_of[module]}.{name}".lstrip(".")
        for module in layer.modules
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]


def in_layers(model, layers):
    return [name for layer in layers for name in tensors(model, layer)]


def all_tensors(model):
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("name", TIMM)
def test_the_layers_of_timms_models_are_those_that_timm_groups(name):
    model = timm_model(name)
    layers = timm_layers(model)
    assert [layer.name for layer in layers] == TIMM[name]
    head = {name for name, p in model.named_parameters() if any(p is q for q in model.get_classifier().parameters())}
    found = in_layers(model, layers)
    assert sorted(found) == sorted(set(all_tensors(model)) - head)
    layer_of = {tensor: i for i, layer in enumerate(layers) for tensor in tensors(model, layer)}
    ends = []
    for group in group_parameters(model, model.group_matcher(coarse=True)).values():
        where = {layer_of[tensor] for tensor in group if tensor not in head}
        assert len(where) <= 1  # what belongs together for timm is not torn apart
        ends.extend(where)
    assert ends == sorted(ends)  # and comes in timm's order
    assert set(ends) == set(range(len(layers)))


@pytest.mark.parametrize("name", TIMM)
def test_statistics_go_with_the_norm_that_keeps_them(name):
    model = timm_model(name)
    layer_of = {tensor: layer.name for layer in timm_layers(model) for tensor in tensors(model, layer)}
    for tensor in layer_of:
        if tensor.endswith("running_mean"):
            assert layer_of[tensor] == layer_of[tensor.replace("running_mean", "weight")]


@pytest.mark.parametrize(
    ("name", "alone"),
    [("resnet18", []), ("efficientnet_b0", ["conv_head.weight", "bn2.weight"]), ("test_vit", ["norm.weight"])],
)
def test_what_stands_behind_the_blocks_joins_the_last_layer(name, alone):
    model = timm_model(name)
    assert set(alone) <= set(tensors(model, timm_layers(model)[-1]))


def test_without_a_head_to_leave_out_it_is_a_part_of_the_last_layer():
    model = timm_model("resnet18")
    assert "fc.weight" in in_layers(model, timm_layers(model, without=[])[-1:])


def test_parameters_of_a_model_itself_are_in_its_stem():
    model = timm_model("test_vit")
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(tensors(model, timm_layers(model)[0]))


def test_a_layer_has_its_modules_own_parameters_and_no_childs():
    outer = nn.Sequential(nn.Linear(2, 2))
    outer.scale = nn.Parameter(torch.ones(1))
    assert [p is outer.scale for p in Layer("x", (outer,)).parameters()] == [True]


class Torchvisionlike(nn.Module):
    """Children in the order of the forward pass, the classifier among them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
        self.norm, self.fc = nn.GroupNorm(2, 4), nn.Linear(4, 2)


class Tokens(nn.Module):
    """Parameters and a buffer of its own, registered before its children."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.ones(1))
        self.embed, self.block = nn.Linear(2, 2), nn.Linear(2, 2)


class OnlyItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.zeros(1)), nn.ReLU()


def conv():
    return nn.Conv2d(2, 2, 1)


BY_CHILD = {
    "torchvision": (
        Torchvisionlike(),
        {"conv1": ["conv1", "bn1"], "layer1": ["layer1"], "layer2": ["layer2", "norm"], "fc": ["fc"]},
    ),
    "wrapped": (nn.Sequential(nn.Sequential(conv(), conv())), {"0.0": ["0.0"], "0.1": ["0.1"]}),
    "wrapped twice": (
        nn.ModuleDict({"net": nn.Sequential(nn.ReLU(), nn.Sequential(conv(), nn.BatchNorm2d(2), conv()))}),
        {"net.1.0": ["net.1.0", "net.1.1"], "net.1.2": ["net.1.2"]},
    ),
    "tokens": (Tokens(), {"embed": ["", "embed"], "block": ["block"]}),
    "wrapped tokens": (nn.Sequential(Tokens()), {"0.embed": ["0", "0.embed"], "0.block": ["0.block"]}),
    "norm first": (nn.Sequential(nn.BatchNorm2d(2), conv(), nn.BatchNorm2d(2)), {"0": ["0"], "1": ["1", "2"]}),
    "norms only": (nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm(2)), {"0": ["0", "1"]}),
    "statistics only": (nn.Sequential(conv(), nn.BatchNorm2d(2, affine=False)), {"0": ["0", "1"]}),
    "head": (nn.ModuleDict({"stem": conv(), "head": conv()}), {"stem": ["stem"], "backbone.head": ["head"]}),
    "linear": (nn.Linear(2, 2), {"stem": [""]}),
    "itself": (OnlyItself(), {"stem": [""]}),
    "one child": (nn.Sequential(nn.ReLU(), conv()), {"1": ["1"]}),
    "nothing": (nn.Sequential(nn.ReLU()), {}),
}


@pytest.mark.parametrize("case", BY_CHILD)
def test_each_child_is_a_layer_and_has_every_tensor_in_it_once(case):
    model, expected = BY_CHILD[case]
    layers = layers_by_child(model)
    assert [layer.name for layer in layers] == list(expected)
    for layer, paths in zip(layers, expected.values(), strict=True):
        # A path that stands beside paths in it means what its module holds itself.
        nested = any(path.startswith(paths[0]) for path in paths[1:])
        own = [paths[0]] if nested else []
        want = {model.get_submodule(path) for path in own}
        want |= {module for path in paths[len(own) :] for module in model.get_submodule(path).modules()}
        assert set(layer.modules) == {m for m in want if list(m.parameters(False)) + list(m.buffers(False))}
    assert sorted(in_layers(model, layers)) == sorted(all_tensors(model))


def test_what_is_left_out_is_in_no_layer():
    model = Torchvisionlike()
    layers = layers_by_child(model, [model.fc, model.layer1])
    assert [layer.name for layer in layers] == ["conv1", "layer2"]
    assert list(owners(model, [model])) == []


def test_a_module_that_is_used_twice_belongs_to_its_first_place():
    shared = conv()
    layers = layers_by_child(nn.Sequential(nn.Sequential(shared), nn.Sequential(conv(), shared)))
    assert [shared in layer.modules for layer in layers] == [True, False]
    assert [len(layer.modules) for layer in layers] == [1, 1]


def test_owners_hold_the_tensor_of_that_name():
    model = Torchvisionlike()
    held = owners(model)
    assert sorted(held) == sorted(all_tensors(model))
    for name, module in held.items():
        tensor = dict(model.named_parameters()) | dict(model.named_buffers())
        assert getattr(module, name.rpartition(".")[2]) is tensor[name]


def test_numbers_make_layers_in_their_order_and_norms_alone_make_none():
    net = nn.ModuleDict(
        {"b": nn.Linear(2, 2), "a": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2), "free": nn.BatchNorm1d(2, affine=False)}
    )
    numbers = {name: {"a": 3, "b": 7, "norm": 9}[name.partition(".")[0]] for name, _ in net.named_parameters()}
    layers = layers_by_number(net, numbers)
    assert [layer.modules for layer in layers] == [(net["a"],), (net["b"], net["norm"], net["free"])]


def test_a_module_whose_own_tensors_have_two_numbers_is_in_one_layer():
    net = Tokens()
    net.late = nn.Parameter(torch.zeros(1))
    numbers = {name: int(name.startswith(("late", "block"))) for name, _ in net.named_parameters()}
    layers = layers_by_number(net, numbers)
    assert [layer.modules for layer in layers] == [(net, net.embed), (net.block,)]


def test_a_layer_that_no_path_names_has_a_number():
    net = nn.ModuleDict({"x": nn.ModuleList(nn.Linear(1, 1) for _ in range(9))})
    layers = layers_by_number(net, {name: int(name.split(".")[1]) % 3 for name in net.state_dict()})
    assert [layer.name for layer in layers] == ["stem", "layer 1", "layer 2"]
    assert [layer.modules for layer in layers] == [(net["x"][i], net["x"][i + 3], net["x"][i + 6]) for i in range(3)]


# ---- blocks


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "test_mambaout", "mixer_s32_224"]
)
def test_blocks_are_the_layers_that_timm_names_where_it_has_a_list_of_them(name):
    model = timm_model(name)
    ours, timms = find_layers_in(model, [model.get_classifier()]), timm_layers(model)
    assert [set(layer.modules) for layer in ours] == [set(layer.modules) for layer in timms]
    assert [layer.name for layer in ours] == [layer.name for layer in timms]


class Late(nn.Module):
    """Blocks first, then what is called before them and after them; rotary positions are a buffer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3, nn.LayerNorm(8), False)
        self.rotary = nn.Module()
        self.rotary.register_buffer("frequencies", torch.ones(2))
        self.words, self.neck, self.proj = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)


class Two(nn.Module):
    def __init__(self, one, other, wide=4):
        super().__init__()
        self.one, self.other = nn.Sequential(stack(one)), nn.Sequential(stack(other, wide))


def stack(count, wide=4):
    return nn.ModuleList(nn.Sequential(nn.Linear(wide, wide), nn.ReLU()) for _ in range(count))


def meta(make, *args):
    with torch.device("meta"):
        return make(*args)


IN_BLOCKS = {
    "bert": (BertLike(), ["embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "pooler"]),
    "gpt": (GptLike(), ["stem", "h.0", "h.1", "h.2", "projection"]),
    "torch's": (Late(), ["words", "blocks.layers.0", "blocks.layers.1", "blocks.layers.2", "neck"]),
    "torchvision's": (
        meta(models.vit_b_16),
        ["stem", *(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "heads"],
    ),
    "blocks alone": (stack(3), ["0", "1", "2"]),
    "stages of a ResNet": (meta(models.resnet101), ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]),
    "stages of a Swin": (meta(models.swin_b), [*(f"features.{i}" for i in range(8)), "backbone.head"]),
    "stages of one block and two": (nn.ModuleDict({"a": stack(1), "b": stack(2)}), ["a", "b"]),
    "ways down and up": (
        nn.ModuleDict({"down": stack(2), "up": nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(3))}),
        ["down", "up"],
    ),
    "as many again": (Two(3, 3, 6), ["one", "other"]),
    "most of it": (Two(3, 2), ["one.0.0", "one.0.1", "one.0.2", "other"]),
    "no more than half": (nn.Sequential(stack(2), nn.Linear(10, 10)), ["0", "1"]),
    "a single block": (nn.Sequential(stack(1)), ["0.0.0"]),
    "plain layers": (
        nn.ModuleDict({"a": nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]), "b": conv()}),
        ["a.0", "a.1", "b"],
    ),
    "other classes": (nn.ModuleDict({"a": nn.ModuleList([BertLike(), stack(2)]), "b": nn.Linear(40, 40)}), ["a", "b"]),
}


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_each_block_is_a_layer_what_stands_before_them_one_and_what_follows_one(case):
    model, expected = IN_BLOCKS[case]
    layers = find_layers_in(model)
    assert [layer.name for layer in layers] == expected
    assert sorted(in_layers(model, layers)) == sorted(all_tensors(model))


def test_embeddings_come_first_and_buffers_alone_make_no_layer():
    model = Late()
    found = {layer.name: tensors(model, layer) for layer in find_layers_in(model)}
    assert found["words"] == ["words.weight"]
    assert "rotary.frequencies" in found["blocks.layers.2"]
    assert {name.split(".")[0] for name in found["neck"]} == {"blocks", "neck", "proj"}
    model.neck = model.proj = nn.Identity()
    assert "blocks.norm.weight" in tensors(model, find_layers_in(model)[-1])  # a norm alone makes none either


class NormAround(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)


class RootMeanSquareNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2),
        nn.RMSNorm(2), nn.LocalResponseNorm(2), nn.LazyBatchNorm1d(), timm.layers.BatchNormAct2d(2),
        timm.layers.GroupNormAct(2, 1), timm.layers.LayerNorm2d(2), RootMeanSquareNorm(),
    ],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_norms_are_known(norm):
    assert is_norm(norm)


@pytest.mark.parametrize(
    "other",
    [nn.Linear(2, 2), nn.ReLU(), NormAround(), spectral_norm(nn.Linear(2, 2)), weight_norm(nn.Linear(2, 2))],
    ids=lambda other: type(other).__name__,
)
def test_what_is_no_norm_is_not_taken_for_one(other):
    assert not is_norm(other)


PICKS = [Layer(name, ()) for name in ("stem", "blocks.1", "blocks.10", "backbone.head")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("all", {"stem", "blocks.1", "blocks.10", "backbone.head"}),
        ("blocks", {"blocks.1", "blocks.10"}),
        ("blocks.1", {"blocks.1"}),
        (["blocks.10", "stem", "stem"], {"blocks.10", "stem"}),
        ("head", {"head"}),
        (("head", "backbone.head"), {"head", "backbone.head"}),
        ((), set()),
    ],
)
def test_names_and_paths_pick_layers(names, expected):
    assert pick_layers(names, PICKS) == expected


@pytest.mark.parametrize("wrong", ["block", "blocks.", "blocks.2", "blocks.1.conv", "", "Stem"])
def test_a_name_of_no_layer_is_an_error_that_holds_it(wrong):
    with pytest.raises(LookupError) as caught:
        pick_layers(["stem", wrong], PICKS)
    assert caught.value.args == (wrong,)


ROOTED = [Layer(name, (), "net.bert") for name in ("embeddings", "encoder.layer.0", "encoder.layer.1", "pooler")]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("encoder.layer.*", "01"), ("bert.encoder.layer.*", "01"), ("net.bert.encoder.layer.*", "01"),
        ("encoder.layer.[1-9]", "1"), ("encoder.*", "01"), ("*", "e01p"), ("net.bert", "e01p"), ("net", "e01p"),
        ("bert.pooler", "p"), ("net.bert.pooler", "p"), ("e*", "e01"), ("*.layer", "01"),
    ],
)  # fmt: skip
def test_patterns_and_paths_from_further_up_pick_layers(name, found):
    assert {layer.name for layer, sign in zip(ROOTED, "e01p", strict=True) if sign in found} == pick_layers(
        name, ROOTED
    )


@pytest.mark.parametrize(
    "wrong", ["net.encoder", "layer.*", "encoder.layer.*.*", "ert.pooler", "*.pooler.x", "encoder*1"]
)
def test_a_pattern_that_fits_nothing(wrong):
    assert matches(wrong, ROOTED) == []
    with pytest.raises(LookupError):
        pick_layers(wrong, ROOTED)


def test_matches_are_paths_in_the_layers_order():
    assert matches("net.bert.encoder.layer.*", ROOTED) == ["encoder.layer.0", "encoder.layer.1"]
    assert matches("*", ROOTED) == ["embeddings", "encoder", "pooler"]


def test_what_is_named_inside_a_layer_is_one_of_its_own():
    model = Torchvisionlike()
    layers = [Layer(layer.name, layer.modules, "net") for layer in layers_by_child(model)]
    names = ["layer2", "net.layer1.*", "bn1", "head", "all", "nothing"]
    parts = split_layers(layers, names, model)
    assert [layer.name for layer in parts] == ["conv1", "bn1", "layer1.0", "layer1.1", "layer2", "fc"]
    assert sorted(in_layers(model, parts)) == sorted(all_tensors(model))
    assert {layer.root for layer in parts} == {"net"}
    assert pick_layers("layer1", parts) == {"layer1.0", "layer1.1"}
    assert split_layers(layers, ["layer1", "net", "*"], model) == layers


def test_only_the_heads_own_name_is_reserved():
    assert [unreserved(name) for name in ("head", "header", "head.norm")] == ["backbone.head", "header", "head.norm"]


@given(st.integers(2, 30), st.floats(1e-4, 10), st.floats(1e-4, 10))
def test_rates_between_two_ends_are_numpys_geometric_steps(layers, first, last):
    np.testing.assert_allclose(rates_by_depth(layers, ends=(first, last)), np.geomspace(first, last, layers), rtol=1e-9)


def test_a_single_layer_has_the_last_ones_rate_and_none_has_none():
    assert rates_by_depth(1, ends=(0.01, 0.5)) == (0.5,)
    assert rates_by_depth(0, ends=(0.01, 0.5)) == rates_by_depth(0, decay=0.5) == ()
    assert rates_by_depth(3) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_decayed_rates_are_those_of_timms_optimizer_groups(decay):
    model = timm_model("test_vit")  # whose fine and coarse groups are the same
    scale_of = {
        parameter: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=decay)
        for parameter in group["params"]
    }
    layers = timm_layers(model)
    for layer, rate in zip(layers, rates_by_depth(len(layers), decay=decay), strict=True):
        assert rate > 0
        for parameter in layer.parameters():
            if (
                parameter is not model.norm.weight and parameter is not model.norm.bias
            ):  # which timm has beside the head
                assert math.isclose(scale_of[parameter], rate, rel_tol=1e-12)
