"""DDP knows the trainable parameters at every moment: ranks stay equal, and what is frozen is not sent."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch.nn.parallel import DistributedDataParallel
from two_processes import CountsTraffic, Notes, Regressor, farthest, forked, size, two

from lightning_speedups import FreezeBackboneFinetune
from lightning_speedups.attach.wrapping import require_rewrapping, rewrapped, trainable
from zoo import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified"),
]


SETTINGS = {
    "plain": ({}, 1),
    "accumulating": ({}, 2),
    "looking for unused parameters": ({"find_unused_parameters": True}, 1),
    "static graph": ({"static_graph": True}, 1),
    "gradients as bucket views, accumulating": ({"gradient_as_bucket_view": True}, 2),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_stay_equal_and_equal_to_one_process_and_frozen_parameters_send_nothing(setting):
    options, accumulate = SETTINGS[setting]
    common = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    notes = Notes()
    two([FreezeBackboneFinetune(unfreeze_at_epoch=1), notes, CountsTraffic()], options, **common).fit(Regressor())
    first, second = notes.read()
    assert len(first["weights"]) == 3
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert farthest(one, other) == 0.0

    alone, own = Regressor(), Notes("alone")
    start = {name: p.detach().clone() for name, p in alone.named_parameters()}
    trainer(callbacks=[FreezeBackboneFinetune(unfreeze_at_epoch=1), own], **common).fit(alone)
    for together, single in zip(first["weights"], own.weights, strict=True):
        assert farthest(together, single) < 1e-5
    frozen = {name: p for name, p in first["weights"][0].items() if name.startswith("backbone")}
    assert all(torch.equal(p, start[name]) for name, p in frozen.items())
    assert farthest(first["weights"][0], first["weights"][-1]) > 1e-2
    assert any(not torch.equal(first["weights"][-1][name], p) for name, p in frozen.items())

    syncs = 4 // accumulate
    for rank in (0, 1):
        wrappers, sent = CountsTraffic.read(rank)
        # Wrapper 0 was there before the freeze: it must not reduce any more; each later one only in its own time.
        assert wrappers == 3
        assert sent == {
            (1, 0): syncs * size(alone.head),
            (2, 1): syncs * (size(alone.head) + size(alone.backbone)),
            (2, 2): syncs * (size(alone.head) + size(alone.backbone)),
        }


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=["plain", "find_unused"])
def test_lightnings_own_finetuning_lets_the_ranks_part(options):
    notes = Notes()
    two([BackboneFinetuning(unfreeze_backbone_at_epoch=1), notes], options, max_epochs=3).fit(Regressor())
    first, second = notes.read()
    assert farthest(first["weights"][0], second["weights"][0]) == 0.0
    assert farthest(first["weights"][2], second["weights"][2]) > 1e-6


class Rewraps(Callback):
    """Freezes the backbone (or nothing) at the start of each epoch, in turn, and notes the wrappers."""

    def __init__(self, part="backbone"):
        self.part, self.wrappers = part, []

    def on_train_epoch_start(self, trainer, pl_module):
        with rewrapped(trainer, pl_module):
            if self.part:
                getattr(pl_module, self.part).requires_grad_(trainer.current_epoch % 2 == 1)
        self.wrappers.append(trainer.strategy.model)

    def on_train_end(self, trainer, pl_module):
        assert all(isinstance(wrapper, DistributedDataParallel) for wrapper in self.wrappers)
        assert all(wrapper.module is pl_module for wrapper in self.wrappers)
        torch.save(len({id(wrapper) for wrapper in self.wrappers}), f"wrappers{trainer.global_rank}.pt")


@pytest.mark.parametrize(("part", "expected"), [("backbone", 4), (None, 1)])
def test_the_module_is_wrapped_anew_at_each_change_and_only_then(part, expected):
    notes = Notes()
    two([Rewraps(part), notes], max_epochs=4).fit(Regressor())
    assert [torch.load(f"wrappers{rank}.pt", weights_only=True) for rank in (0, 1)] == [expected] * 2
    first, second = notes.read()
    assert [farthest(one, other) for one, other in zip(first["weights"], second["weights"], strict=True)] == [0.0] * 4


class FreezesInvisibly(Callback):
    """As `Rewraps`, without `rewrapped`."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.backbone.requires_grad_(False)
        trainer.strategy.model = trainer.strategy.lightning_module
        trainer.strategy.configure_ddp()

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.backbone.requires_grad_(trainer.current_epoch >= 1)


def test_without_rewrapping_the_ranks_part():
    notes = Notes()
    two([FreezesInvisibly(), notes], max_epochs=2).fit(Regressor())
    first, second = notes.read()
    assert farthest(first["weights"][1], second["weights"][1]) > 1e-6


def test_on_a_single_device_nothing_is_wrapped():
    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            before = trainer.strategy.model
            with rewrapped(trainer, pl_module):
                pl_module.backbone.requires_grad_(False)
            assert trainer.strategy.model is before is pl_module

    one, module = trainer(max_epochs=1, callbacks=[Looks()]), Regressor()
    one.fit(module)
    assert trainable(module) == {"head.weight", "head.bias"}
    assert patched(one) == set()


def test_a_body_that_fails_passes_its_error_on():
    one, module = trainer(max_epochs=1), Regressor()
    with pytest.raises(ZeroDivisionError), rewrapped(one, module):
        raise ZeroDivisionError


class FreezesAll(FreezeBackboneFinetune):
    def __init__(self):
        super().__init__(backbone=lambda module: [module.backbone, module.head], unfreeze_at_epoch=None)


def test_freezing_everything_is_refused_in_words_under_ddp_as_well():
    for make in (lambda callbacks: two(callbacks, max_epochs=1), lambda callbacks: trainer(callbacks=callbacks)):
        with pytest.raises(Exception, match="nothing is left to train"):
            make([FreezesAll()]).fit(Regressor())


# Not built: that needs GPUs or a package that is not here.
@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_are_refused_by_name(kind):
    one = SimpleNamespace(strategy=object.__new__(kind))
    with pytest.raises(MisconfigurationException, match=rf"(?s)SomeTrick.*{kind.__name__}.*ddp"):
        require_rewrapping(one, "SomeTrick")


@pytest.mark.parametrize("strategy", [DDPStrategy(), forked(), SingleDeviceStrategy("cpu")])
def test_ddp_and_single_devices_are_accepted(strategy):
    require_rewrapping(SimpleNamespace(strategy=strategy), "SomeTrick")
