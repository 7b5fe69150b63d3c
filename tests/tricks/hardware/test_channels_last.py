"""Convolutions see channels last, in training and evaluation; the results are plain training's, and all comes back."""

from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from two_processes import Notes, farthest, two

from lightning_speedups import BatchAugmentation, ChannelsLast, MixupCallback, ProgressiveResizing
from lightning_speedups.tricks.hardware.channels_last import with_channels_last
from zoo import (
    Classifier,
    Interrupted,
    ReplayLoader,
    fit_interrupted,
    images,
    loader,
    resume,
    trainer,
    weights,
)

LAST = {4: torch.channels_last}


def EXAMPLE():
    return {"callbacks": [ChannelsLast()]}


def is_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class Net(Classifier):
    """Two convolutions; notes how its inputs, weights, gradients and what the convolutions make lie."""

    def __init__(self, fused=None):
        torch.manual_seed(2)
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip
        self.fused = fused
        self.lay = {"training": [], "validation": [], "gradients": []}
        for number in (0, 3):
            self.backbone[number].register_forward_hook(self._look)

    def _look(self, module, inputs, output):
        self.lay["training" if self.training else "validation"].append(is_last(module.weight) and is_last(output))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=self.fused)

    def on_before_optimizer_step(self, optimizer):
        self.lay["gradients"].append(is_last(self.backbone[3].weight.grad))


def test_a_fit_sees_channels_last_and_ends_where_plain_training_does():
    plain, module = Net(), Net()
    trainer(precision="64-true").fit(plain, ReplayLoader(), loader())
    trainer(precision="64-true", callbacks=[ChannelsLast()]).fit(module, ReplayLoader(), loader())
    assert all(is_last(inputs) for inputs, _ in module.seen)
    assert not any(is_last(inputs) for inputs, _ in plain.seen)
    assert {key: set(seen) for key, seen in module.lay.items()} == {key: {True} for key in module.lay}
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(module)[key], value, rtol=1e-9, atol=1e-12)


def test_images_are_laid_behind_what_changes_them():
    tricks = [MixupCallback(alpha=0.4), ChannelsLast(), ProgressiveResizing(start=0.5), BatchAugmentation(crop=1)]
    module = Net()
    trainer(callbacks=tricks).fit(module, ReplayLoader())
    assert {inputs.shape[-1] for inputs, _ in module.seen} >= {4, 8}
    assert all(is_last(inputs) for inputs, _ in module.seen)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_weights_gradients_and_state_lie_as_before_after_two_of_them(failing, first):
    tricks = [ChannelsLast(), ChannelsLast()]
    module, run = Net(), trainer(callbacks=tricks[::-1] if first else tricks)
    if failing:
        module.on_train_batch_end = lambda outputs, batch, batch_idx: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run.fit(module, ReplayLoader())
    else:
        run.fit(module, ReplayLoader())
    state = [one for kept in run.optimizers[0].state.values() for one in kept.values() if one is not None]
    assert len(state) == len([*module.parameters()])
    for tensor in [*module.parameters(), *(p.grad for p in module.parameters()), *state]:
        assert tensor.is_contiguous()


def test_what_the_user_has_laid_stays():
    module = Net().to(memory_format=torch.channels_last)
    trainer(callbacks=[ChannelsLast()], max_steps=1).fit(module, loader())
    assert is_last(module.backbone[3].weight)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_from_a_checkpoint_of_the_other_layout(fused, first):
    whole, parted, rest = Net(fused), Net(fused), Net(fused)
    trainer().fit(whole, ReplayLoader())
    fit_interrupted(parted, ReplayLoader(), 6, [ChannelsLast()] if first else [])
    resume(rest, ReplayLoader(), [] if first else [ChannelsLast()])
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(rest)[key], value, rtol=1e-4, atol=1e-5)


def test_a_module_that_is_made_in_configure_model_is_laid():
    class Late(Net):
        def configure_model(self):
            self.backbone[3] = nn.Conv2d(6, 6, 3)
            self.backbone[3].register_forward_hook(self._look)

    module = Late()
    trainer(callbacks=[ChannelsLast()], max_steps=2).fit(module, loader())
    assert module.lay["training"] == [True] * 4


class Volumes(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv3d(2, 6, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())

    def training_step(self, batch, batch_idx):
        assert self.backbone[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
        return super().training_step(batch, batch_idx)


def test_volumes_are_laid_in_their_own_way():
    inputs, labels = images(8)
    module = Volumes()
    data = DataLoader([*zip(inputs.unsqueeze(2).repeat(1, 1, 4, 1, 1), labels, strict=True)], batch_size=4)
    trainer(callbacks=[ChannelsLast()], max_epochs=1).fit(module, data)
    assert len(module.seen) == 2
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) and x.shape[2] == 4 for x, _ in module.seen)


class Flat(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(128, 6))


def test_a_module_without_convolutions_is_warned_of_and_gets_its_batches_as_they_are():
    module = Flat()
    with pytest.warns(UserWarning, match="ChannelsLast finds no convolution in Flat, and does nothing"):
        trainer(callbacks=[ChannelsLast()], max_steps=1).fit(module, loader())
    assert module.seen[0][0].is_contiguous()


@dataclass
class Pair:
    image: torch.Tensor
    label: torch.Tensor


def test_images_in_any_container_are_laid_and_nothing_is_written_into():
    image, label = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.long)
    for batch in (Pair(image, label), {"image": image, "label": label}, [{"views": (image, label)}]):
        laid = with_channels_last(batch, LAST)
        assert type(laid) is type(batch)
        found = (
            laid.image if isinstance(laid, Pair) else laid["image"] if isinstance(laid, dict) else laid[0]["views"][0]
        )
        assert is_last(found)
        assert torch.equal(found, image)
        assert image.is_contiguous()
    assert is_last(with_channels_last(image, LAST))
    assert with_channels_last({"label": label}, LAST)["label"] is label
    sparse = image.to_sparse()
    assert with_channels_last([sparse], LAST)[0] is sparse
    fixed = MappingProxyType({"image": image})
    assert with_channels_last(fixed, LAST)["image"] is image


def test_strategies_that_split_weights_are_refused():
    run = trainer()
    run.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match=r"ChannelsLast needs whole weights.*Use `strategy='ddp'`"):
        ChannelsLast().setup(run, Net(), "fit")


class Shared(Net):
    """Each process trains on every second sample."""

    def train_dataloader(self):
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        inputs, labels = images()
        own = [*zip(inputs[rank::processes], labels[rank::processes], strict=True)]
        return DataLoader(own, batch_size=8 // processes)

    def training_step(self, batch, batch_idx):
        self.backbone[1].eval()  # batch statistics are each process's own
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


def test_two_processes_agree_without_copies_of_gradients_and_end_where_one_does():
    two([ChannelsLast(), Notes()], max_epochs=2).fit(Shared())
    one, other = (notes["weights"][-1] for notes in Notes().read())
    assert farthest(one, other) == 0
    alone = Shared()
    trainer(max_epochs=2).fit(alone)
    assert farthest(one, {name: p.detach() for name, p in alone.named_parameters()}) < 1e-5


def test_an_exception_in_validation_leaves_nothing_laid():
    module = Net()

    def fail(*_):
        raise Interrupted

    module.validation_step = fail
    with pytest.raises(Interrupted):
        trainer(callbacks=[ChannelsLast()]).fit(module, ReplayLoader(), loader())
    assert all(p.is_contiguous() for p in module.parameters())
