"""A copy of a module is all its own, but for what it stands in; what cannot be copied is said."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from lightning_speedups.attach.copies import NoCopyError, copy_module, may_split_model, require_copyable
from zoo import Classifier, loader, trainer


class Copies(Callback):
    """Copies the module in the middle of a fit."""

    def __init__(self, shared=()):
        self.shared = shared

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.last_loss = pl_module.head(pl_module.backbone(batch[0])).sum()  # with its graph
        self.twin = copy_module(trainer, pl_module, self.shared)


def test_a_copy_has_parameters_of_its_own_and_shares_data_and_graphs():
    module, copies = Classifier(), Copies()
    module.data = loader()
    trainer(callbacks=[copies], max_steps=2).fit(module, module.data)
    twin = copies.twin
    assert all(a is not b and torch.equal(a, b) for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    assert twin.data is module.data
    assert twin.last_loss is module.last_loss


def test_what_is_to_be_shared_is():
    module = Classifier()
    copies = Copies(shared=[module.head])
    trainer(callbacks=[copies], max_steps=1).fit(module, loader())
    assert copies.twin.head is module.head
    assert copies.twin.backbone is not module.backbone


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of torch 2.11's compiler
def test_a_compiled_module_is_copied_uncompiled():
    module = Classifier()
    compiled = torch.compile(module.head)
    module.head.compile()
    copies = Copies()
    module.backbone.register_forward_pre_hook(lambda *_: None)
    one = trainer(callbacks=[copies])
    twin = copy_module(one, module)
    assert vars(twin).get("_compiled_call_impl") is None
    assert compiled is not twin.head


class CannotCopy:
    def __deepcopy__(self, memo):
        raise TypeError("not this")


def test_what_cannot_be_copied_is_named():
    module = Classifier()
    module.thing = CannotCopy()
    with pytest.raises(NoCopyError, match=r"Classifier cannot be copied \(not this\)"):
        copy_module(trainer(), module)


def test_manual_optimization_and_split_models_are_refused():
    module, one = Classifier(), trainer()
    module.automatic_optimization = False
    with pytest.raises(NoCopyError, match="Classifier optimizes manually"):
        require_copyable(one, module)
    module.automatic_optimization = True
    require_copyable(one, module)
    assert not may_split_model(one)
    for kind in (DeepSpeedStrategy, Strategy):
        one.strategy.__class__ = kind
        assert may_split_model(one)
        with pytest.raises(NoCopyError, match=f"{kind.__name__} may split the model"):
            copy_module(one, module)
