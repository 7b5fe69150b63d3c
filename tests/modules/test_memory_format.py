"""Only the layout of convolutions changes, and comes back; fused steps see one layout."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_speedups.modules.memory_format import format_of, make_channels_last, make_contiguous, match_state

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {}),
}


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(),
        nn.Linear(256, 2),
    )  # fmt: skip


def test_weights_have_the_strides_of_torchs_own_conversion_and_keep_values_and_identity():
    module = net()
    before = [(p, p.detach().clone(), p.stride()) for p in module.parameters()]
    module[0].weight.grad = torch.randn(8, 3, 3, 3)
    gradient = module[0].weight.grad.clone()
    changed = make_channels_last(module)
    assert [id(one) for one in changed] == [id(one.weight) for one in module[:4]]
    torchs = net().to(memory_format=torch.channels_last)
    assert [p.stride() for p in module.parameters()] == [p.stride() for p in torchs.parameters()]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in (*changed, module[0].weight.grad))
    assert torch.equal(module[0].weight.grad, gradient)
    assert make_channels_last(module) == []
    for parameter, (old, value, _) in zip(module.parameters(), before, strict=True):
        assert parameter is old
        assert torch.equal(parameter, value)
    make_contiguous(changed)
    assert [p.stride() for p in module.parameters()] == [stride for *_, stride in before]
    assert module[0].weight.grad.is_contiguous()


def test_volumes_have_a_layout_and_what_is_computed_lazy_or_flat_has_none():
    module = nn.ModuleList(
        [nn.Conv3d(2, 4, 3), nn.Conv1d(2, 4, 3), nn.LazyConv2d(4, 3), weight_norm(nn.Conv2d(2, 4, 3))]
    )
    (weight,) = make_channels_last(module)
    assert weight is module[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert [format_of(one) for one in module[:2]] == [torch.channels_last_3d, None]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_step_on_matched_state_is_the_plain_step(name):
    kind, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 5, 3, 3, generator=generator) for _ in range(3))

    def trained(fused):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, fused=fused, **options)
        weight.grad = gradients[0].clone()
        optimizer.step()
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        weight.grad = gradients[1].contiguous(memory_format=torch.channels_last)
        match_state(optimizer)
        optimizer.step()
        kept = [one for one in optimizer.state[weight].values() if one.ndim]
        assert kept
        assert all(one.stride() == weight.stride() for one in kept)
        return weight

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-5, atol=1e-6)
