"""Both names of Lightning are told apart, also for classes made of theirs."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_speedups.attach.packages import class_of, is_a, is_overridden, package_of

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])


@BOTH
def test_a_class_made_of_theirs_belongs_to_their_package(package):
    class Net(package.LightningModule):
        def training_step(self, batch):
            pass

    class Deeper(Net):
        pass

    trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for thing in (Net(), Deeper(), trainer, trainer.strategy, package.Callback()):
        assert package_of(thing) == package.__name__
    assert is_a(trainer, "Trainer")
    assert is_a(Deeper(), "LightningModule")
    assert is_overridden("training_step", Deeper())
    assert not is_overridden("validation_step", Deeper())
    assert class_of(trainer, "LightningModule") is package.LightningModule
    assert class_of(trainer, "strategies.DDPStrategy") is package.strategies.DDPStrategy


def test_what_is_of_neither_is_of_neither():
    class DDPStrategy:
        pass

    assert package_of(torch.nn.Linear(1, 1)) is None
    assert not is_a(DDPStrategy(), "DDPStrategy")


def test_a_strategy_is_also_what_it_derives_from():
    class Own(DDPStrategy):
        pass

    assert is_a(Own(), "DDPStrategy")
    assert not is_a(SingleDeviceStrategy(), "DDPStrategy", "DeepSpeedStrategy")
