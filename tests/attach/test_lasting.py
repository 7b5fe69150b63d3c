"""A change that stays is made once, in every stage, before weights are loaded, and said."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_speedups.attach.lasting import LastingTrick
from zoo import Classifier, loader, trainer, weights


class Narrow(LastingTrick):
    """Puts a head without a bias in the place of one that has it."""

    def change(self, pl_module):
        head = getattr(pl_module, "head", None)
        if head is None or head.bias is None:
            return {}
        pl_module.head = nn.Linear(head.in_features, head.out_features, bias=False)
        return {"head": "Linear → Linear without a bias"}

    def is_changed(self, pl_module):
        return hasattr(pl_module, "head")


def test_it_is_made_before_the_optimizer_and_said_once(caplog):
    module = Classifier()
    with caplog.at_level(logging.INFO):
        one = trainer(callbacks=[Narrow()], max_steps=2)
        one.fit(module, loader())
    assert any(parameter is module.head.weight for parameter in one.optimizers[0].param_groups[0]["params"])
    assert caplog.text.count("Narrow: 1 × Linear → Linear without a bias in Classifier (head, ...)") == 1
    head = module.head
    caplog.clear()
    for stage in ("fit", "validate"):
        getattr(trainer(callbacks=[Narrow()], max_steps=1), stage)(module, loader())
        assert module.head is head
    assert "Narrow" not in caplog.text


def test_a_checkpoint_of_the_changed_module_loads_into_one_that_is_still_to_be_changed():
    module, fresh = Classifier(), Classifier()
    one = trainer(callbacks=[Narrow()], max_steps=2)
    one.fit(module, loader())
    one.save_checkpoint("changed.ckpt")
    trainer(callbacks=[Narrow()]).validate(fresh, loader(), ckpt_path="changed.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(weights(module)[name], value) for name, value in weights(fresh).items())


class Empty(LightningModule):
    def validation_step(self, batch, batch_idx):
        pass


def test_a_module_in_which_it_finds_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="Narrow found nothing to change in Empty"):
        trainer(callbacks=[Narrow()]).validate(Empty(), loader(), verbose=False)
