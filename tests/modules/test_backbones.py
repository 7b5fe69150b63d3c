"""Heads that are found by name or by what the network says, in the networks as people keep them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from transformers_like import BertLike, BertLikeForClassification, GptLike, RobertaLikeForClassification

from lightning_speedups.modules.backbones import NoBackboneError, are_paths, find_layers, find_named_heads, has_head
from lightning_speedups.modules.layers import layers_by_child, split_layers


def kept(**parts):
    """A module with these attributes."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def linear(trains=True):
    return nn.Linear(2, 2).requires_grad_(trains)


def outside(module):
    """The children's names under which no parameter is in the backbone, without it."""
    _, layers = find_layers(module, None)
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name.rpartition(".")[0] for name, parameter in module.named_parameters() if id(parameter) not in own}


NETWORKS = {
    "resnet18": (lambda: models.resnet18(num_classes=4), {"fc"}, "conv1", "layer4"),
    "vit": (
        lambda: models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=4),
        {"heads.head"},
        "stem",
        "encoder.layers.encoder_layer_2",
    ),
    "swin_t": (lambda: models.swin_t(num_classes=4), {"head"}, "features.0", "features.7"),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=4), {"classifier.0", "classifier.3"}, "0", "12"),
    "efficientnet": (lambda: models.efficientnet_b0(num_classes=4), {"classifier.1"}, "0", "8"),
    "convnext": (lambda: models.convnext_tiny(num_classes=4), {"classifier.0", "classifier.2"}, "0", "7"),
    "fcn": (
        lambda: models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
        {f"{head}.{layer}" for head in ("classifier", "aux_classifier") for layer in (0, 1, 4)},
        "conv1",
        "layer4",
    ),
    "timm": (lambda: timm.create_model("resnet10t", num_classes=4), {"fc"}, "stem", "layer4"),
    "bert": (BertLikeForClassification, {"classifier"}, "embeddings", "pooler"),
    "roberta": (
        RobertaLikeForClassification,
        {"pre_classifier", "classifier.dense", "classifier.out_proj"},
        "embeddings",
        "pooler",
    ),
    "gpt": (GptLike, {"projection"}, "stem", "h.2"),
}


KEPT = [(name, "model") for name in NETWORKS] + [(name, at) for name in ("bert", "gpt") for at in ("", "net.inner")]


@pytest.mark.parametrize(("name", "place"), KEPT)
def test_everything_but_the_head_is_backbone_wherever_the_network_is_kept(name, place):
    make, head, first, last = NETWORKS[name]
    with torch.device("meta"):
        module = make()
    for step in reversed(place.split(".") if place else []):
        module = kept(**{step: module, **({"loss": nn.CrossEntropyLoss(torch.ones(4))} if step == "model" else {})})
    assert outside(module) == {f"{place}.{path}".lstrip(".") for path in head}
    layers = [layer.name for layer in find_layers(module, None)[1]]
    assert (layers[0], layers[-1]) == (first, last)
    assert has_head(module)


class Compiled(nn.Module):
    """As torch's OptimizedModule, without its seconds."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod = network

    def __getattr__(self, name):
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["_orig_mod"], name)


@pytest.mark.parametrize("make", [BertLikeForClassification, GptLike])
def test_a_compiled_network_has_one_head(make):
    assert has_head(kept(net=Compiled(make())))


def test_names_of_a_compiled_network_need_not_say_so():
    module = kept(net=Compiled(BertLikeForClassification()), bert=Compiled(BertLike()))
    ((root,), layers), names = find_layers(module, "bert"), ["encoder.layer.0.output", "bert.pooler.dense"]
    assert [layer.name for layer in split_layers(layers, names, root)][1:3] == ["encoder.layer.0", names[0]]
    del module.bert
    assert outside(module) == {"net._orig_mod.classifier"}
    assert find_layers(module, None)[1][1].root == "net.bert"


PLACES = {
    "a head beside the network": (lambda: kept(bert=BertLike(), classifier=linear()), {"classifier"}),
    "a network without classes": (
        lambda: kept(body=timm.create_model("test_resnet", num_classes=0), fc=linear()),
        {"fc"},
    ),
    "timm's comes first": (
        lambda: kept(body=timm.create_model("test_resnet", num_classes=2), fc=linear()),
        {"body.fc", "fc"},
    ),
    "a network that is called as a head": (
        lambda: kept(classifier=kept(conv=linear(), fc=linear())),
        {"classifier.fc"},
    ),
    "a teacher that does not train": (
        lambda: kept(student=kept(a=linear(), fc=linear()), teacher=kept(a=linear(False), fc=linear(False))),
        {"student.fc", "teacher.a", "teacher.fc"},
    ),
    "several parts before the head": (
        lambda: kept(a=linear(), b=linear(), heads=nn.ModuleList([linear()])),
        {"heads.0"},
    ),
    "a language model's": (lambda: kept(a=linear(), lm_head=linear()), {"lm_head"}),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_taken_for_the_head(case):
    make, head = PLACES[case]
    assert outside(make()) == head


def test_the_names_lead_from_the_one_part_that_is_not_the_head():
    module = kept(bert=BertLike(), classifier=linear(), loss=nn.CrossEntropyLoss(torch.ones(2)))
    (root,), layers = find_layers(module, None)
    assert root is module.bert
    assert [layer.name for layer in layers] == ["embeddings", *(f"encoder.layer.{i}" for i in range(3)), "pooler"]
    assert {layer.root for layer in layers} == {"bert"}
    module.scale = nn.Parameter(torch.ones(1))  # which would be in no layer then
    (root,), layers = find_layers(module, None)
    assert root is module
    assert [layer.name for layer in layers][::4] == ["stem", "bert.pooler"]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (kept(net=kept(a=linear(), b=linear())), r"found none, .* called fc, .*\. It has \['net', 'net.a', 'net.b'\]"),
        (kept(head=linear()), "found none"),
        (kept(net=kept(a=linear(), fc=linear(False))), r"found none, .*It has \['net', 'net.a'\]"),
        (kept(net=kept(a=linear(), fc=linear(), head=linear())), r"found the heads \['net.fc', 'net.head'\]"),
        (
            kept(one=kept(a=linear(), fc=linear()), two=BertLikeForClassification()),
            r"found the heads \['one.fc', 'two.classifier'\]",
        ),
        (kept(net=kept(a=linear(), fc=linear()), head=linear()), r"found the heads \['head', 'net.fc'\]"),
    ],
)
def test_no_head_or_several_are_refused_with_the_names(module, told):
    with pytest.raises(NoBackboneError, match=told):
        find_layers(module, None)
    assert not has_head(module)


def test_heads_of_one_network():
    assert find_named_heads(BertLike()) == []
    assert find_named_heads(RobertaLikeForClassification()) == [["classifier", "pre_classifier"]]
    assert find_named_heads(kept(a=linear(), fc=linear(), head=linear())) == [["fc"], ["head"]]


# ---- several paths


def test_layers_of_several_encoders_come_in_turn_counted_from_their_ends():
    module = kept(image=models.resnet18(), text=BertLike(2), head=linear())
    roots, layers = find_layers(module, ["image", "text"])
    assert roots == [module.image, module.text]
    assert [(layer.name, layer.root) for layer in layers] == [
        (f"{root}.{name}", root)
        for root, name in [
            ("image", "conv1"), ("image", "layer1"), ("image", "layer2"), ("text", "embeddings"), ("image", "layer3"),
            ("text", "encoder.layer.0"), ("image", "layer4"), ("text", "encoder.layer.1"), ("image", "fc"),
            ("text", "pooler"),
        ]
    ]  # fmt: skip
    assert find_layers(module, ["text"])[1] == find_layers(module, "text")[1]


def test_what_two_paths_share_is_of_the_first():
    module = kept(net=kept(a=linear(), b=linear()))
    _, layers = find_layers(module, ["net.b", "net"])
    assert [(layer.name, layer.modules) for layer in layers] == [
        ("net.b.stem", (module.net.b,)),
        ("net.a", (module.net.a,)),
    ]


@pytest.mark.parametrize(
    "wrong", ["", [], [""], ["a", "a"], ["a", 3], 3, {"a": 1}, [["a"]]], ids=str
)  # fmt: skip
def test_what_are_no_paths(wrong):
    assert not are_paths(wrong)
    assert are_paths("a.b")
    assert are_paths(("a", "b"))


def test_a_path_in_a_list_that_leads_nowhere():
    with pytest.raises(NoBackboneError, match=r"names nothing: Module has no such submodule. It has \['a'\]"):
        find_layers(kept(a=linear()), ["a", "b"])


# ---- checkpoints of before


def test_layers_that_a_checkpoint_names_as_children_are_found_so_again():
    bert = BertLike()
    older = [layer.name for layer in layers_by_child(bert)]
    assert older == ["embeddings", "encoder", "pooler"]
    assert [layer.name for layer in find_layers(kept(bert=bert), "bert", older)[1]] == older
    newer = [layer.name for layer in find_layers(kept(bert=bert), "bert")[1]]
    assert [layer.name for layer in find_layers(kept(bert=bert), "bert", newer)[1]] == newer
    others = [*newer, "encoder.layer.1.output"]
    assert [layer.name for layer in find_layers(kept(bert=bert), "bert", others)[1]] == newer
