"""Each start against numpy, torch's own, a closed form or the scaled logits that it stands for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import convnext_tiny, mobilenet_v2, resnet18, resnet50

from lightning_speedups.measure.networks import Transformer
from lightning_speedups.modules.initialization import (
    find_stem,
    fingerprint,
    identity_convolutions,
    patch_moments,
    plain_convolutions,
    scale_logits,
    set_momentum,
    start_as_identity,
    statistics_moved,
    weights_of_one,
    whiten,
    whitening_filters,
    zero_residual_branches,
)


def photos(count=48, channels=3, side=16, seed=0):
    """Smooth coloured noise: neighbours and channels are correlated, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    images = F.avg_pool2d(torch.randn(count, channels, side + 2, side + 2, generator=generator), 3, 1)
    mixing = torch.eye(channels) + 0.5
    return 4 * torch.einsum("dc,nchw->ndhw", mixing, images) + 1


def patches_by_hand(images, conv):
    """All patches of images that a convolution sees without padding, one by one."""
    (kh, kw), (sy, sx), (dy, dx) = conv.kernel_size, conv.stride, conv.dilation
    array, found = images.double().numpy(), []
    for image in array:
        for y in range(0, image.shape[1] - dy * (kh - 1), sy):
            for x in range(0, image.shape[2] - dx * (kw - 1), sx):
                patch = image[:, y : y + dy * (kh - 1) + 1 : dy, x : x + dx * (kw - 1) + 1 : dx]
                found.append(patch.ravel())
    return np.stack(found)


STEMS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "2x2": {"kernel_size": 2},
    "strided 5x5": {"kernel_size": 5, "stride": 2, "padding": 2},
    "patches": {"kernel_size": 4, "stride": 4},
    "dilated": {"kernel_size": (3, 2), "dilation": 2},
}


@pytest.mark.parametrize("name", STEMS)
def test_moments_are_numpys_of_patches_cut_one_by_one(name):
    conv, images = nn.Conv2d(3, 64, **STEMS[name]), photos()
    patches = patches_by_hand(images, conv)
    mean, covariance = patch_moments(images, conv)
    np.testing.assert_allclose(mean.numpy(), patches.mean(0), rtol=1e-6)
    np.testing.assert_allclose(covariance.numpy(), np.cov(patches.T, bias=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", STEMS)
def test_outputs_on_the_sample_have_mean_0_and_the_identity_for_covariance(name, form):
    images = photos()
    conv = nn.Conv2d(3, 24, **STEMS[name]).to(memory_format=form)
    assert whiten(conv, *patch_moments(images, conv), eps=1e-9) == 24
    assert conv.weight.is_contiguous(memory_format=form)
    conv.padding = (0, 0)
    outputs = conv(images).detach().double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(np.cov(outputs[:12], bias=True), np.eye(12), atol=1e-3)
    np.testing.assert_allclose(outputs.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(outputs[12:], -outputs[:12], atol=1e-4)


def test_the_strongest_directions_come_first_and_what_is_beyond_all_of_them_keeps_its_values():
    images, conv = photos(), nn.Conv2d(3, 30, 2)
    before = copy.deepcopy(conv)
    mean, covariance = patch_moments(images, conv)
    values, vectors = np.linalg.eigh(covariance.numpy())
    assert whiten(conv, mean, covariance, eps=0.1) == 24
    for i in range(12):
        filter_, value = conv.weight[i].detach().flatten().double().numpy(), values[-1 - i]
        expected = vectors[:, -1 - i] / np.sqrt(value + 0.1 * values.mean())
        np.testing.assert_allclose(filter_ * np.sign(filter_ @ expected), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(conv.weight[24:], before.weight[24:])
    assert torch.equal(conv.bias[24:], before.bias[24:])


def test_images_of_another_scale_give_filters_of_the_inverse_scale():
    conv, images = nn.Conv2d(3, 8, 3), photos()
    one, other = (whitening_filters(patch_moments(scale * images, conv)[1]) for scale in (1, 256))
    torch.testing.assert_close(one.abs(), 256 * other.abs(), rtol=1e-3, atol=1e-4)


def test_three_equal_channels_give_finite_filters():
    conv, images = nn.Conv2d(3, 54, 3), photos(channels=1).expand(-1, 3, -1, -1)
    whiten(conv, *patch_moments(images, conv))
    assert conv.weight.isfinite().all()
    assert conv(images).abs().max() < 20


def test_of_many_patches_some_are_taken_from_all_images(monkeypatch):
    monkeypatch.setattr("lightning_speedups.modules.initialization.NUMBERS", 27 * 1000)
    conv, images = nn.Conv2d(3, 8, 3), photos(96)
    mean, _ = patch_moments(images, conv)
    patches = patches_by_hand(images, conv)
    every = -(-len(patches) // 1000)
    chunks = [patches[i : i + 32 * 14 * 14][::every] for i in range(0, len(patches), 32 * 14 * 14)]
    np.testing.assert_allclose(mean.numpy(), np.concatenate(chunks).mean(0), rtol=1e-6)


@pytest.mark.parametrize(("images", "kernel"), [((1, 3, 7, 7), 3), ((64, 3, 2, 2), 3), ((8, 3, 64, 64), 64)])
def test_too_few_patches_are_refused(images, kernel):
    with pytest.raises(ValueError, match=r"Expected `images` to hold more patches than there are numbers in one"):
        patch_moments(torch.randn(images), nn.Conv2d(3, 8, kernel))


def test_half_precision_images_are_measured_in_full():
    conv, images = nn.Conv2d(3, 8, 3), photos().bfloat16()
    for half, full in zip(patch_moments(images, conv), patch_moments(images.float(), conv), strict=True):
        assert half.dtype == torch.float64
        assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (resnet18, "conv1"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "patch_embed.proj"),
        (lambda: timm.create_model("convnext_atto"), "stem.0"),
        (lambda: timm.create_model("mobilenetv3_small_050"), "conv_stem"),
    ],
)
def test_the_stem_of_a_network_is_found(make, name):
    network = make()
    found = find_stem(network)
    assert found == (name, network.get_submodule(name))


def test_what_cannot_be_written_into_is_no_stem_and_no_plain_convolution():
    assert find_stem(nn.Sequential(nn.Linear(2, 2))) is None
    assert find_stem(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3))) is None
    assert find_stem(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))) is None
    assert find_stem(timm.create_model("resnetv2_50x1_bit")) is None  # standardises its weights
    assert not plain_convolutions(resnet18().requires_grad_(False))


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 9, 1), (9, 4, 1), (6, 6, 2)])
def test_identity_filters_are_torchs_and_what_is_beyond_keeps_its_init(inputs, outputs, stride):
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    before, expected, images = (
        conv.weight.clone(),
        nn.init.dirac_(torch.empty(min(9, outputs), inputs, 3, 3)),
        photos(2, inputs),
    )
    assert start_as_identity([conv]) == 1
    same = min(inputs, outputs)
    assert torch.equal(conv.weight[:same], expected[:same])
    assert torch.equal(conv.weight[same:], before[same:])
    assert torch.equal(conv(images)[:, :same], images[:, :same, ::stride, ::stride])


def test_convolutions_that_may_be_identities_are_the_odd_ones_but_the_first():
    names = list(identity_convolutions(resnet50()))
    assert "conv1" not in names
    assert names == [f"layer{s}.{b}.conv2" for s, blocks in enumerate((3, 4, 6, 3), 1) for b in range(blocks)]
    assert not identity_convolutions(convnext_tiny())  # its 7×7 ones are depthwise


@pytest.mark.parametrize(
    "network",
    [
        resnet18(), resnet50(), timm.create_model("resnet18", zero_init_last=False),
        timm.create_model("resnet26", zero_init_last=False), timm.create_model("regnetx_002", zero_init_last=False),
        timm.create_model("resnetv2_18", zero_init_last=False),
    ],
    ids=["resnet18", "resnet50", "timm resnet18", "timm resnet26", "timm regnet", "timm preactivation"],
)  # fmt: skip
def test_residual_blocks_begin_as_their_shortcuts_and_their_branches_learn(network):
    names = zero_residual_branches(network)
    assert len(names) >= 8
    blocks = [network.get_submodule(name) for name in names]
    seen = {}
    for name, block in zip(names, blocks, strict=True):
        block.register_forward_hook(lambda _, i, o, name=name: seen.setdefault(name, (i[0], o)) and None)
    images = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        network.zero_grad()
        network(images).square().mean().backward()
        torch.optim.SGD(network.parameters(), 0.1).step()
    assert seen.keys() == set(names)
    for name, block in zip(names, blocks, strict=True):
        inputs, outputs = seen[name]
        if getattr(block, "downsample", None) is None:
            assert torch.equal(outputs, inputs if "v2" in str(type(block)) else inputs.relu())
        branch = {id(p) for n, p in block.named_parameters() if "downsample" not in n}
        assert all(p.grad.any() for p in block.parameters() if id(p) in branch and p.ndim > 1)


class PreActivation(nn.Module):
    """Its norms stand before the convolutions, where one at 0 would be dead."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = (
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "make", [PreActivation, mobilenet_v2, convnext_tiny, lambda: nn.Sequential(nn.Conv2d(3, 3, 3))]
)
def test_blocks_of_another_build_stay_as_they_are(make):
    network = make()
    before = copy.deepcopy(network.state_dict())
    assert zero_residual_branches(network) == []
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


TRANSFORMERS = {
    "torch, pre-norm": (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True), [""]),
    "torch": (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), ["0"]),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16, norm_first=True, batch_first=True), [""]),
    "timm": (lambda: timm.create_model("test_vit", num_classes=3), ["blocks.0", "blocks.1"]),
    "ours": (lambda: Transformer(16, context=8, width=8, depth=2), ["blocks.0", "blocks.1"]),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_of_transformers_begin_as_their_shortcuts(name):
    make, blocks = TRANSFORMERS[name]
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = zero_residual_branches(network)
    assert found[: len(blocks)] == blocks
    ends = {
        key for key, value in network.state_dict().items() if not value.any() and not torch.equal(value, before[key])
    }
    assert {key.split(".")[-2] for key in ends} <= {"out_proj", "linear2", "proj", "fc2"}
    for key, value in network.state_dict().items():
        assert key in ends or torch.equal(value, before[key])
    for block in map(network.get_submodule, blocks):
        inputs = torch.randn(2, 5, block.norm1.normalized_shape[0] if hasattr(block, "norm1") else 8)
        outputs = block.eval()(inputs, inputs) if name == "decoder" else block.eval()(inputs)
        expected = block.norm2(block.norm1(inputs)) if name == "torch" else inputs
        assert torch.allclose(outputs, expected, atol=1e-6)


def test_layers_that_only_have_such_a_name_stay_as_they_are():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.norm = nn.Linear(48, 8), nn.LayerNorm(8)

    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.bn, self.fc2, self.fc3 = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)

    network = nn.Sequential(Plain(), Head(), Patches(), Perceptron())
    assert zero_residual_branches(network) == []
    frozen = nn.TransformerEncoderLayer(8, 2, 16).requires_grad_(False)
    assert zero_residual_branches(frozen) == []


def test_frozen_blocks_stay_as_they_are():
    assert zero_residual_branches(resnet18().requires_grad_(False)) == []


def test_the_zeroed_norms_of_resnet18_are_those_of_torchvisions_own_option():
    ours, theirs = resnet18(), resnet18(zero_init_residual=True)
    zero_residual_branches(ours)
    zeros = [
        [name for name, p in net.named_parameters() if "bn" in name and "weight" in name and not p.any()]
        for net in (ours, theirs)
    ]
    assert zeros[0] == zeros[1]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}])
def test_a_scaled_head_at_the_rate_times_the_square_trains_as_scaled_logits_do(options):
    torch.manual_seed(0)
    scale, lr, images, labels = 1 / 9, 0.5, torch.randn(32, 6).double(), torch.randint(4, (32,))
    wrapped = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    scaled = copy.deepcopy(wrapped)
    assert scale_logits([scaled[2]], scale) == 1
    head = {
        "params": scaled[2].parameters(),
        "lr": lr * scale**2,
        "weight_decay": options.get("weight_decay", 0) / scale**2,
    }
    optimizers = [
        torch.optim.SGD(wrapped.parameters(), lr, **options),
        torch.optim.SGD([{"params": scaled[0].parameters()}, head], lr, **options),
    ]
    for _ in range(20):
        losses = F.cross_entropy(scale * wrapped(images), labels), F.cross_entropy(scaled(images), labels)
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(scale * wrapped(images), scaled(images))
    assert losses[0] < F.cross_entropy(torch.zeros(32, 4), labels)


def test_heads_without_weights_are_not_counted():
    head = nn.Linear(3, 2)
    before = head.weight.clone()
    assert scale_logits([nn.Identity(), head], 0.25) == 1
    assert torch.equal(head.weight, 0.25 * before)


def test_norms_take_momentum_and_tell_what_they_had():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3), nn.BatchNorm2d(3, momentum=None))
    assert set_momentum(network, 0.4) == [(network[0], 0.1), (network[2], None)]
    assert [norm.momentum for norm in (network[0], network[2])] == [0.4] * 2


def test_weights_of_one_are_those_that_train_and_have_not_moved():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.LayerNorm(3))
    nn.init.zeros_(network[1].weight)
    network[2].weight.requires_grad_(False)
    (found,) = weights_of_one(network)
    assert found is network[0].weight


def test_a_step_shows_in_statistics_and_fingerprint():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprint(network)
    assert not statistics_moved(network)
    assert fingerprint(copy.deepcopy(network)) == before
    network(torch.randn(8, 3)).square().mean().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    assert statistics_moved(network)
    assert fingerprint(network) != before
