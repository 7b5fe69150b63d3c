"""Settings that ask for nothing are taken, as a search over settings gives them, and change not one bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_speedups import (
    BinaryLabelSmoothing,
    CyclicMomentum,
    FastStart,
    FeatureCache,
    FreezeBackboneFinetune,
    FreezeProgressively,
    LabelSmoothingLoss,
    LRCurve,
    MixupCallback,
    OneCycleMomentum,
    SmoothingSchedule,
    StopAtTarget,
    SubsetTraining,
    WarmupLRScaler,
)
from zoo import Classifier, assert_same_weights, loader, trainer, weights

LR = 0.05  # Classifier's own
NEUTRAL = {
    "no scaling": lambda: WarmupLRScaler(scale=1.0),
    "no scaling, no warm-up": lambda: WarmupLRScaler(scale=1.0, start_factor=1.0, warmup_epochs=0),
    "a base batch as large as the batch": lambda: WarmupLRScaler(base_batch_size=8, warmup_steps=0),
    "a flat line": lambda: LRCurve("linear", end_factor=1.0, warmup=0, cooldown=0.0),
    "no step": lambda: LRCurve("step", options={"milestones": [], "gamma": 1.0}),
    "a step of 1": lambda: LRCurve("step", options={"gamma": 1.0}),
    "a trapezoid without slopes": lambda: LRCurve("trapezoid", warmup=0, cooldown=0),
    "a cycle between equal rates": lambda: CyclicMomentum(LR, LR, cycle_momentum=False),
    "a cycle of nothing": lambda: OneCycleMomentum(LR, div_factor=1, final_div_factor=1, cycle_momentum=False),
    "thawed from the start": lambda: FreezeBackboneFinetune(unfreeze_at_epoch=0, backbone_lr_ratio=1.0),
    "no decay over the layers": lambda: FreezeBackboneFinetune(unfreeze_at_epoch=0, lr_decay=1.0),
    "all from the start": lambda: FreezeBackboneFinetune(schedule={0: "all"}, backbone_lr_ratio=(1.0, 1.0)),
    "no layer to freeze": lambda: FreezeProgressively(share=0),
    "no mixing": lambda: MixupCallback(alpha=0, cutmix_alpha=0),
    "never mixing": lambda: MixupCallback(prob=0),
    "mixing until the start": lambda: MixupCallback(stop_after=0),
    "all samples": lambda: SubsetTraining(keep=1.0),
    "all samples, by loss": lambda: SubsetTraining(keep=1, method="loss", log=True),
    "all samples from the start": lambda: SubsetTraining(stop_at=0),
    "a flat schedule": lambda: SmoothingSchedule(end_factor=1.0),
    "a schedule behind the end": lambda: SmoothingSchedule(start=1.0),
    "no other start": lambda: FastStart(whiten=None),
    "a target out of reach": lambda: StopAtTarget("train_loss", -math.inf, "min"),
}


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_run_with_it_ends_as_one_without(name, smoothing):
    modules = [Classifier(LabelSmoothingLoss(smoothing)) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, callbacks in zip(modules, ([], [NEUTRAL[name]()]), strict=True):
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader())
    assert_same_weights(*map(weights, modules))
    assert modules[0].losses == modules[1].losses


def test_an_end_at_once_is_an_anneal_of_nothing():
    runs = []
    for options in ({"finish": "now"}, {"finish": "anneal", "anneal": 0}, {"finish": "anneal", "anneal": 0.0}):
        run = trainer(callbacks=[StopAtTarget("train_loss", math.inf, "min", **options)], max_epochs=3)
        run.fit(Classifier(), loader())
        runs.append((run.global_step, run.should_stop))
    assert len(set(runs)) == 1
    assert runs[0][0] < 12


def test_a_cache_without_room_says_so_and_the_run_goes_on():
    module, cache = Classifier(), FeatureCache(max_gib=0)
    module.backbone[1] = torch.nn.Identity()
    module.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"too much \(max_gib=0\)"):
        trainer(callbacks=[cache], max_epochs=2).fit(module, loader())
    assert cache.hits == 0


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(2, 8, 8), 1


class OwnLoss(Classifier):
    """Its loss shows no sample's own."""

    def training_step(self, batch, batch_idx):
        return (self.head(self.backbone(batch[0])) ** 2).mean()


def test_where_all_samples_are_kept_neither_loader_nor_loss_matters():
    trick = SubsetTraining(keep=1.0)
    run = trainer(callbacks=[trick], max_epochs=-1, max_steps=3)
    run.fit(OwnLoss(), DataLoader(Endless(), batch_size=4))
    assert (run.global_step, trick.kept, trick.mean_loss, trick.samples_saved) == (3, 1.0, None, 0)


def test_no_mixing_asks_nothing_of_the_batch():
    tokens, labels = torch.randint(5, (4, 3)), torch.tensor([True, False, True, True])
    batch, mixture = MixupCallback(alpha=0).mix((tokens, labels), torch.Generator())
    assert batch[0] is tokens
    assert batch[1] is labels
    assert mixture.method == "none"


def test_losses_without_smoothing_are_taken():
    assert [loss(0).highest for loss in (LabelSmoothingLoss, BinaryLabelSmoothing)] == [0, 0]


def test_a_ramp_that_does_not_rise_is_never_too_long(recwarn):
    trainer(callbacks=[WarmupLRScaler(scale=1.0, warmup_epochs=20)], max_epochs=1).fit(Classifier(), loader())
    assert not [one for one in recwarn if "ramp" in str(one.message)]
