"""The roles of all parameters of plain, torchvision's and timm's networks."""

from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_speedups.modules.parameter_roles import (
    Role,
    check_groups,
    looks_trained,
    parameter_roles,
)


def counts(module, **options):
    return {role.name: count for role, count in Counter(parameter_roles(module, **options).values()).items()}


NETWORKS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=7),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=7),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=7),
    "tv_resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "tv_vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7),
    "tv_convnext": lambda: torchvision.models.convnext_tiny(num_classes=7),
    "tv_mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_head_and_matrices_that_are_what_is_left(name):
    with torch.device("meta"):
        net = NETWORKS[name]()
    roles = parameter_roles(net)
    assert set(roles) == {name for name, _ in net.named_parameters()}
    by = {role: [name for name, one in roles.items() if one is role] for role in Role}
    assert len(by[Role.HEAD]) == len(by[Role.HEAD_BIAS]) == 1
    assert net.get_parameter(by[Role.HEAD][0]).shape[0] == 7
    for path in by[Role.MATRIX]:
        owner = net.get_submodule(path.rpartition(".")[0])
        assert isinstance(owner, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        assert getattr(owner, "groups", 1) < max(2, getattr(owner, "in_channels", 2))
    expected = sum(
        isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups < part.in_channels)
        for part in net.modules()
    )
    attention = sum(isinstance(part, nn.MultiheadAttention) for part in net.modules())
    assert len(by[Role.MATRIX]) == expected - 1 + attention
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    assert len(by[Role.NORM]) == len(by[Role.NORM_BIAS]) == sum(isinstance(part, norms) for part in net.modules())


def test_what_stands_for_places_and_what_only_stretches_is_no_matrix():
    with torch.device("meta"):
        vit = parameter_roles(timm.create_model("vit_tiny_patch16_224"))
        swin = parameter_roles(timm.create_model("swin_tiny_patch4_window7_224"))
        convnext = parameter_roles(torchvision.models.convnext_tiny())
    assert vit["pos_embed"] == vit["cls_token"] == Role.EMBEDDING
    assert vit["patch_embed.proj.weight"] == Role.MATRIX
    assert swin["layers.0.blocks.0.attn.relative_position_bias_table"] == Role.EMBEDDING
    assert convnext["features.1.0.layer_scale"] == Role.GAIN
    assert convnext["features.1.0.block.0.weight"] == Role.DEPTHWISE


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8)
        self.out = nn.Linear(4, 11, bias=False)
        if tied:
            self.out.weight = self.tokens.weight


def test_an_embedding_that_is_tied_to_the_head_is_one_embedding():
    assert counts(Language(False))["HEAD"] == counts(Language(False))["EMBEDDING"] == 1
    assert parameter_roles(Language(True))["tokens.weight"] == Role.EMBEDDING
    assert counts(Language(True)) == {"EMBEDDING": 1, "MATRIX": 4, "BIAS": 4, "NORM": 2, "NORM_BIAS": 2}


def test_a_matrix_that_two_layers_share_is_one():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    assert counts(net) == {"MATRIX": 1, "BIAS": 2, "HEAD": 1, "HEAD_BIAS": 1}


def test_the_head_is_the_users_own_behind_a_network_without_classes_or_where_they_say():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("test_resnet", num_classes=0)
            self.mine = nn.Linear(self.backbone.num_features, 3)

    assert parameter_roles(Net())["mine.weight"] == Role.HEAD
    net = nn.ModuleDict({"top": nn.Linear(4, 2), "body": nn.Linear(4, 4)})
    assert parameter_roles(net)["body.weight"] == Role.HEAD
    assert parameter_roles(net, "top") == {
        "top.weight": Role.HEAD,
        "top.bias": Role.HEAD_BIAS,
        "body.weight": Role.MATRIX,
        "body.bias": Role.BIAS,
    }
    with pytest.raises(ValueError, match="Expected `head` to be the path of a submodule"):
        parameter_roles(net, "nowhere")


def test_groups_that_lack_a_parameter_or_have_it_twice_are_refused_by_its_name():
    net = nn.Linear(2, 2)
    check_groups(net, [{"params": [net.weight]}, {"params": [net.bias]}])
    with pytest.raises(ValueError, match="but got 'weight' in several"):
        check_groups(net, [{"params": [net.weight, net.bias]}, {"params": [net.weight]}])
    with pytest.raises(ValueError, match="but got 'bias' in none"):
        check_groups(net, [{"params": [net.weight]}])
    net.bias.requires_grad_(False)
    check_groups(net, [{"params": [net.weight]}])


def test_parameters_without_a_shape_or_complex_ones_are_refused_by_their_names():
    with pytest.raises(ValueError, match="but got 'weight', one without a shape yet"):
        parameter_roles(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"but got 'weight', one of torch\.complex64"):
        parameter_roles(nn.Linear(2, 2, dtype=torch.complex64))
    frozen = nn.Linear(2, 2)
    frozen.table = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert parameter_roles(nn.Sequential(frozen, nn.Linear(2, 2)))["0.table"] == Role.EMBEDDING


def test_norms_show_whether_a_network_was_trained():
    for name in ("resnet18", "convnext", "tv_vit"):
        net = NETWORKS[name]()
        assert not looks_trained(net)
    with torch.no_grad():
        next(part for part in net.modules() if isinstance(part, nn.LayerNorm)).weight[0] += 0.1
    assert looks_trained(net)
    statistics = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    nn.init.normal_(statistics[1].weight, 1, 0.02)  # as generators of images begin
    assert not looks_trained(statistics)
    statistics(torch.randn(2, 2, 5, 5))
    assert looks_trained(statistics)
