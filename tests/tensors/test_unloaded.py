"""A tensor without values behaves as a real one in all but its values, and never becomes a real one by accident."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_speedups.tensors.unloaded import Origin, Shortcuts, Unloaded

IMAGES = torch.randn(4, 3, 8, 8)
CODES = torch.randint(0, 5, (4, 7))
WORDS = torch.randn(4, 7, 16)


class Refused(Exception):
    pass


def without_values(tensor, origin=None):
    return Unloaded.of(tensor, origin or Origin(Refused))


def frozen(module):
    return module.requires_grad_(False).eval()


def test_values_that_can_be_had():
    own, origin = torch.arange(6.0).view(2, 3), Origin(Refused)
    one = Unloaded.of(own, origin, values=own.clone)
    assert (one[1:] + 1).mean().item() == 5
    assert np.array_equal(one.view(-1).numpy(), np.arange(6))
    assert one.tolist() == [row.tolist() for row in one] == own.tolist()
    assert torch.equal(torch.zeros(2, 3).copy_(one), own)
    assert one[one > 2].tolist() == [3, 4, 5]
    assert f"{one.mean():.1f}" == "2.5"
    assert torch.equal(one[:, 1].known(), own[:, 1])
    assert (one + torch.ones(3)).known() is None
    for needs in (
        lambda: (one + torch.ones(3)).sum().item(),
        lambda: F.linear(one, torch.ones(1, 3, requires_grad=True)),
        lambda: F.dropout(one),
        lambda: frozen(nn.Linear(3, 2))(one).tolist(),
    ):
        with pytest.raises(Refused):
            needs()
    twice = one * 2
    assert type(one.add_(1)) is Unloaded
    for changed in (one, twice):
        with pytest.raises(Refused):
            changed.tolist()


def assert_alike(one, real):
    assert type(one) is Unloaded
    assert one.shape == real.shape
    assert one.dtype == real.dtype
    assert one.device == real.device
    assert one.stride() == real.stride()
    assert one.requires_grad == real.requires_grad


@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        (IMAGES, lambda x: x * 2.5 + 1),
        (IMAGES, lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std()),
        (IMAGES, lambda x: (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 255),
        (IMAGES, lambda x: x[:, 0]),
        (IMAGES, lambda x: x[torch.tensor([0, 2])]),
        (IMAGES, lambda x: x[:, :, ::2].flatten(1)),
        (IMAGES, lambda x: x.permute(0, 2, 3, 1)),
        (IMAGES, lambda x: x.to(torch.bfloat16)),
        (IMAGES, lambda x: x.to(memory_format=torch.channels_last)),
        (IMAGES, lambda x: x > 0),
        (IMAGES, lambda x: torch.zeros_like(x)),
        (IMAGES, lambda x: x.new_full((2, 3), 7.0)),
        (IMAGES, lambda x: torch.cat([x, torch.zeros(4, 2, 8, 8)], 1)),
        (IMAGES, lambda x: torch.where(x > 0, x, torch.zeros(()))),
        (IMAGES, lambda x: x.relu_().add_(1)),
        (IMAGES, lambda x: x.topk(2, dim=1)[1]),
        (IMAGES, lambda x: F.interpolate(x, size=(5, 7), mode="bilinear")),
        (IMAGES, lambda x: F.pad(x, (1, 2, 3, 4))),
        (IMAGES, lambda x: F.dropout(x, 0.5, training=False)),
        (IMAGES, lambda x: F.dropout(x, 0.0)),
        (IMAGES, lambda x: F.rrelu(x)),
        (IMAGES, frozen(nn.Conv2d(3, 5, 3, stride=2))),
        (IMAGES, frozen(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2)))),
        (IMAGES, frozen(nn.InstanceNorm2d(3))),
        (CODES, lambda x: x * 2.5),
        (CODES, lambda x: x / 2),
        (CODES, lambda x: F.one_hot(x, 5)),
        (CODES, frozen(nn.Embedding(5, 6))),
        (WORDS, lambda x: frozen(nn.LSTM(16, 5, batch_first=True))(x)[0]),
        (WORDS, lambda x: frozen(nn.MultiheadAttention(16, 2, batch_first=True))(x, x, x)[0]),
        (WORDS, frozen(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))),
        (WORDS, lambda x: F.scaled_dot_product_attention(x, x, x)),
        (WORDS, lambda x: torch.einsum("nlc,nmc->nlm", x, x)),
        (WORDS, lambda x: x.detach().clone().contiguous().unsqueeze(1).expand(4, 2, 7, 16)),
    ],
)  # fmt: skip
def test_what_comes_out_looks_like_what_comes_out_of_a_real_tensor(inputs, change):
    with torch.no_grad():
        assert_alike(change(without_values(inputs)), change(inputs.clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer = frozen(nn.Linear(16, 3))
    with torch.autocast("cpu", dtype=dtype):
        assert_alike(layer(without_values(WORDS)), layer(WORDS))


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda x: x.mean().item(), "_local_scalar_dense"),
        (lambda x: float(x.mean()), "_local_scalar_dense"),
        (lambda x: bool(x.mean() > 0), "is_nonzero|_local_scalar_dense"),
        (lambda x: x.new_zeros(()).item(), "_local_scalar_dense"),
        (lambda x: torch.zeros_like(x) * torch.ones(1, requires_grad=True), "mixes them with what trains"),
        (lambda x: x.numpy(), "`numpy` needs them"),
        (lambda x: np.asarray(x), "`numpy` needs them"),
        (lambda x: x.tolist(), "`tolist` needs them"),
        (lambda x: pickle.dumps(x), "`pickle` needs them"),
        (lambda x: f"{x.mean():.2f}", "`format` needs them"),
        (lambda x: x[x > 0], "index.Tensor` needs them"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: torch.equal(x, IMAGES), "equal"),
        (lambda x: nn.Conv2d(3, 4, 1)(x), "convolution.default` mixes them with what trains"),
        (lambda x: x + torch.ones(1, requires_grad=True) * 2, "mixes them with what trains"),
        (lambda x: F.dropout(x, 0.5), "draws random numbers"),
        (lambda x: torch.randn_like(x), "randn_like.default` draws random numbers"),
        (lambda x: F.rrelu(x, training=True), "draws random numbers"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "draws random numbers"),
        (lambda x: torch.zeros(4, 3, 8, 8).add_(x), "add_.Tensor` writes them into another tensor"),
        (lambda x: torch.add(x, 1, out=torch.zeros(4, 3, 8, 8)), "writes them into another tensor"),
        (lambda x: nn.BatchNorm2d(3).requires_grad_(False)(x), "takes the statistics of the batch"),
        (lambda x: x.unsqueeze_(0), "changes their shape in place"),
    ],
)
def test_what_needs_values_is_refused_by_name(use, what):
    with pytest.raises(Refused, match=what):
        use(without_values(IMAGES))


def test_it_can_be_shown_and_copied():
    one = without_values(IMAGES)
    shown = "Unloaded(shape=(4, 3, 8, 8), dtype=torch.float32, device=cpu)"
    assert [repr(one), str(one), f"{one}"] == [shown] * 3
    assert copy.deepcopy([one])[0] is one


@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last])
def test_it_is_as_good_as_real_once_it_has_values(strides):
    one, weight = without_values(IMAGES.contiguous(memory_format=strides)), torch.ones(1, requires_grad=True)
    loaded = one.load(IMAGES)
    assert torch.equal(loaded, IMAGES)
    assert loaded.stride() == one.stride()
    (one * weight + one).sum().backward()
    assert weight.grad.item() == pytest.approx(float(IMAGES.sum()), abs=1e-3)
    assert torch.equal(one.relu(), IMAGES.relu())
    assert np.array_equal(one.numpy(), IMAGES.numpy())
    assert one.tolist() == IMAGES.tolist()
    assert torch.equal(pickle.loads(pickle.dumps(one)), IMAGES)


def test_a_view_of_what_has_its_values_may_be_read_but_not_written_to():
    origin = Origin(Refused)
    one = without_values(IMAGES, origin)
    view = one.flatten(1)
    other = without_values(IMAGES, origin).flatten(1)
    one.load(IMAGES)
    assert (view + 1).shape == (4, 192)
    other.add_(1)
    with pytest.raises(Refused, match="writes into what a trainable module has already seen"):
        view.add_(1)


def count_calls(module):
    calls, own = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    return calls


def test_a_shortcut_is_taken_for_the_same_arguments_only():
    layer = frozen(nn.Bilinear(3, 3, 2))
    calls = count_calls(layer)
    shortcuts, own = Shortcuts([layer]), layer.forward
    with shortcuts.taken():
        for rows in (4, 4, 5, 4):
            made = layer(without_values(torch.zeros(rows, 3)), without_values(torch.zeros(rows, 3)))
            assert_alike(made, torch.zeros(rows, 2))
    assert len(calls) == 2
    assert shortcuts.count == 2
    assert layer.forward is own
    layer(torch.zeros(4, 3), torch.zeros(4, 3))
    assert len(calls) == 3


class Odd(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.ones(1)), change

    def forward(self, *args, **kwargs):
        return self.change(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "shorter"),
    [
        (lambda x: {"a": x * 1, "b": [x + 1, None, 3]}, True),
        (lambda x: (x * 2).mean((2, 3)).view(12), True),
        (lambda x: x, False),
        (lambda x: x.relu_(), False),
        (lambda x: x.flatten(1), False),
        (lambda x: [y := x + 1, y], False),
        (lambda x: [x + 1, torch.zeros(3)], False),
        (lambda x: [x + 1, object()], False),
    ],
)
def test_shortcuts_return_nothing_that_hangs_together_with_something_else(change, shorter):
    module = Odd(change).requires_grad_(False)
    calls, shortcuts = count_calls(module), Shortcuts([module])
    with shortcuts.taken():
        for _ in range(3):
            module(without_values(IMAGES))
    assert len(calls) == (1 if shorter else 3)


@pytest.mark.parametrize("left", [lambda x: x + 1, lambda x: [x * 2], lambda x: {"a": x.mean()}])
def test_modules_that_leave_something_elsewhere_are_called(left):
    def change(x):
        module.left = left(x)
        return x + 2

    module = Odd(change).requires_grad_(False)
    calls, shortcuts, kept = count_calls(module), Shortcuts([module]), []
    with shortcuts.taken():
        for _ in range(3):
            kept.append(inputs := without_values(IMAGES))
            kept.append(module(inputs))
    assert len(calls) == 3


def test_shortcuts_differ_by_settings_mode_and_cast():
    module = Odd(lambda x, more=1: F.linear(x, torch.ones(2, 16)) * more).requires_grad_(False)
    calls = count_calls(module)
    with Shortcuts([module]).taken():
        for _ in range(2):
            module(without_values(WORDS))
            module(without_values(WORDS), 2)
            module(without_values(WORDS), more=2)
            module.eval()(without_values(WORDS))
            module.train()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert module(without_values(WORDS)).dtype == torch.bfloat16
            module(WORDS)
            module(without_values(WORDS), torch.ones(1))
    assert len(calls) == 6 + 2  # the real ones


def test_real_tensors_beside_them_may_differ_in_values():
    module = Odd(lambda x, mask: x * mask).requires_grad_(False)
    calls, shortcuts = count_calls(module), Shortcuts([module])
    with shortcuts.taken():
        for mask in (torch.ones(7, 1), torch.zeros(7, 1), torch.ones(4, 1, 16), torch.ones(7, 1).double()):
            assert_alike(module(without_values(WORDS), mask=mask), WORDS * mask)
    assert len(calls) == 3
    with shortcuts.taken(), pytest.raises(Refused, match="mixes them with what trains"):
        module(without_values(WORDS), mask=torch.ones(7, 1, requires_grad=True))


def add_to(x, count):
    count.add_(1)
    return x + 1


@pytest.mark.parametrize(
    ("change", "shorter"),
    [(add_to, False), (lambda x, count: [x + 1, int(count) + 1], False), (lambda x, count: [x + count, None], True)],
)
def test_a_module_that_writes_or_reads_a_real_tensor_is_called(change, shorter):
    module, count = Odd(change).requires_grad_(False), torch.zeros(1)
    calls = count_calls(module)
    with Shortcuts([module]).taken():
        for _ in range(3):
            module(without_values(WORDS), count)
    assert len(calls) == (1 if shorter else 3)


def test_shortcuts_go_on_over_the_same_modules_in_the_same_modes():
    module = frozen(nn.Sequential(nn.Linear(16, 2), nn.Dropout()).eval())
    calls, last = count_calls(module), None
    for in_training, others in [(False, []), (False, []), (True, []), (False, []), (False, []), (False, [nn.ReLU()])]:
        module[1].training = in_training
        last = Shortcuts([module, *others], last)
        with last.taken(), pytest.raises(Refused, match="random") if in_training else nullcontext():
            module(without_values(WORDS))
    assert len(calls) == 4


def test_modules_in_which_somebody_listens_are_called():
    module = frozen(nn.Sequential(nn.Linear(16, 2)))
    heard = []
    module[0].register_forward_hook(lambda *_: heard.append(1))
    with Shortcuts([module]).taken():
        for _ in range(3):
            module(without_values(WORDS))
    assert len(heard) == 3


def test_shortcuts_are_put_back_after_an_exception():
    module = frozen(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), Shortcuts([module]).taken():
        _ = 1 / 0
    assert "forward" not in vars(module)
