"""The arms of a comparison: a table with one row a trick. A new arm is one function and one row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups.attach.packages import Callback
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.recipes import recipe
from lightning_speedups.tricks.batches.mixup_callback import MixupCallback
from lightning_speedups.tricks.batches.progressive_resizing.progressive_resizing import ProgressiveResizing
from lightning_speedups.tricks.batches.subset_training import SubsetTraining
from lightning_speedups.tricks.hardware.trainer_defaults import trainer_defaults
from lightning_speedups.tricks.labels.label_smoothing_loss import LabelSmoothingLoss
from lightning_speedups.tricks.optimizers.muon.muon_callback import MuonCallback
from lightning_speedups.tricks.rates.cyclic_momentum import CyclicMomentum
from lightning_speedups.tricks.rates.lr_curve import LRCurve
from lightning_speedups.tricks.rates.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.tricks.rates.warmup_lr_scaler import WarmupLRScaler
from lightning_speedups.tricks.transfer.freeze_backbone_finetune import FreezeBackboneFinetune
from lightning_speedups.tricks.transfer.freeze_progressively import FreezeProgressively


@dataclass(frozen=True)
class Situation:
    """What a row of the table may build on; the same for every arm of a seed.

    Attributes:
        epochs: Length of the run; of one on text it may be a part of one.
        lr: The plain arm's constant learning rate.
        accelerator: The Trainer's accelerator.
        backbone: Attribute path of the backbone in the LightningModule; ``None`` for a timm model.
        seed: Seed of the run.
        data: The images, the text or its lines.
    """

    epochs: Any
    lr: float
    accelerator: str
    backbone: str | None
    seed: int
    data: Any


@dataclass(frozen=True)
class Ingredients:
    """What an arm adds to the plain run.

    Attributes:
        callbacks: For the Trainer.
        trainer: Further arguments of the Trainer.
        criterion: Training loss.
        one_cycle: Highest rate of torch's ``OneCycleLR``; ``None``: the plain rate, constant.
        loader: Another training loader than plain's.
    """

    callbacks: Sequence[Callback] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    one_cycle: float | None = None
    loader: DataLoader[Any] | None = None


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: How the command line and the table call it.
        description: One line for the help and the report.
        build: Makes fresh ingredients for a run.
        baseline: Name of the arm that it is measured against; ``None`` for a baseline.
        pretrained: Whether it starts from the seed's pretrained backbone.
        length: Share of the epochs that it trains for, in (0, 1]: a schedule that ends sooner is a trick, too.
        on_request: Whether it runs only when it is named.
        single: Whether it shows a single trick: one seed is enough, unless arms are named, and it is drawn pale.
    """

    name: str
    description: str
    build: Callable[[Situation], Ingredients]
    baseline: str | None = "plain"
    pretrained: bool = False
    length: float = 1.0
    on_request: bool = False
    single: bool = False

    def epochs(self, epochs: int) -> int:
        """Epochs of a run of this arm, when a full run has so many."""
        return max(1, round(self.length * epochs))


def plain(at: Situation) -> Ingredients:
    """Nothing at all."""
    return Ingredients()


def _warmup(at: Situation) -> Ingredients:
    return Ingredients([WarmupLRScaler(scale=2.0, warmup_epochs=0.25 * at.epochs)])


def _one_cycle(at: Situation) -> Ingredients:
    return Ingredients([OneCycleMomentum(max_lr=3 * at.lr)])


def _found(at: Situation) -> Ingredients:
    return Ingredients([OneCycleMomentum(max_lr="auto")])


def _curve(at: Situation) -> Ingredients:
    return Ingredients([LRCurve("trapezoid", cooldown=0.4)])


def _cyclic(at: Situation) -> Ingredients:
    return Ingredients([CyclicMomentum(base_lr=0.2 * at.lr, max_lr=3 * at.lr)])


def _mixup(at: Situation) -> Ingredients:
    return Ingredients([MixupCallback(alpha=0.2, seed=at.seed)])


def _resizing(at: Situation) -> Ingredients:
    return Ingredients([ProgressiveResizing()])


def _subset(at: Situation) -> Ingredients:
    return Ingredients([SubsetTraining(seed=at.seed)])


def _freezing(at: Situation) -> Ingredients:
    return Ingredients([FreezeProgressively(backbone=at.backbone)])


def _smoothing(at: Situation) -> Ingredients:
    return Ingredients(criterion=LabelSmoothingLoss(0.1))


def precision(at: Situation) -> Ingredients:
    """The precision that the hardware is fast at."""
    return Ingredients(trainer=trainer_defaults(precision="auto", accelerator=at.accelerator, devices=1))


def _tuned(at: Situation) -> Ingredients:
    half = {"precision": precision(at).trainer["precision"]}
    return Ingredients(trainer=half, criterion=nn.CrossEntropyLoss(label_smoothing=0.1), one_cycle=5 * at.lr)


def looks(batches: int) -> int:
    """Return after how many batches to evaluate, so that an epoch is looked at three to ten times, and at its end.

    Args:
        batches: Batches of an epoch.

    Example:
        >>> [looks(batches) for batches in (50, 51, 53)]
        [10, 17, 53]
    """
    return next((every for every in range(batches // 3, batches // 10, -1) if batches % every == 0), batches)


def _fast(at: Situation) -> Ingredients:
    is_photos = at.data.x_train.shape[1] == 3
    flip = "alternating" if is_photos else None  # digits have no mirror image
    # in so few epochs growing images save less time than accuracy
    stack = recipe(
        "vision-fast", (at.data.x_train, at.data.y_train), epochs=at.epochs, flip=flip, start=1.0, seed=at.seed
    )
    trainer = {**precision(at).trainer, "val_check_interval": looks(len(stack.loader))}
    return Ingredients(stack.trainer["callbacks"], trainer, stack.loss, loader=stack.loader)


def _muon(at: Situation) -> Ingredients:
    return Ingredients([MuonCallback(lr=10 * at.lr, rest_lr=at.lr, momentum=0.6, steps=3, normalized=True)])


def _everything(at: Situation) -> Ingredients:
    return Ingredients(
        [OneCycleMomentum(max_lr=3 * at.lr), MixupCallback(alpha=0.1, stop_after=0.3, seed=at.seed)],
        precision(at).trainer,
        LabelSmoothingLoss(0.1),
    )


def _freeze(at: Situation) -> Ingredients:
    return Ingredients([FreezeBackboneFinetune(backbone=at.backbone, unfreeze_at_epoch=1, backbone_lr_ratio=1.0)])


def _gradual(at: Situation) -> Ingredients:
    return Ingredients([FreezeBackboneFinetune(backbone=at.backbone, gradual=True, lr_decay=0.8)])


# Choices, the same for every arm unless its trick defines the value: SGD with Nesterov momentum 0.9 and weight decay
# 5e-4, constant learning rate, no augmentation. The learning rate is plain's best of 0.005, 0.01, 0.02 and 0.04, and
# the others' values were picked the same way, on digits held out of the training part.
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("plain", "SGD at a constant learning rate, float32", plain, baseline=None),
        Arm(
            "tuned",
            "by hand: torch's one-cycle and label smoothing, bfloat16, in half of the epochs",
            _tuned,
            length=0.5,
        ),
        Arm("fast", "the recipe vision-fast, in a quarter of the epochs", _fast, length=0.25),
        Arm(
            "onecycle",
            "OneCycleMomentum: up to three times the rate and down to almost nothing, in half of the epochs",
            _one_cycle,
            length=0.5,
            single=True,
        ),
        Arm(
            "precision",
            "trainer_defaults(precision='auto'): what the hardware is fast at",
            precision,
            on_request=True,
        ),
        Arm("muon", "MuonCallback in the place of SGD, at ten times its rate", _muon, on_request=True),
        Arm(
            "warmup",
            "WarmupLRScaler: twice the rate, reached over the first quarter of the run",
            _warmup,
            on_request=True,
        ),
        Arm("mixup", "MixupCallback: alpha 0.2 in every batch; meant for long runs", _mixup, on_request=True),
        Arm("smoothing", "LabelSmoothingLoss: smoothing 0.1", _smoothing, on_request=True),
        Arm("all", "onecycle, smoothing, precision; mixup 0.1 in the first 30 %", _everything, on_request=True),
        Arm("short", "all, in three quarters of the epochs", _everything, length=0.75, on_request=True),
        Arm("auto", "OneCycleMomentum up to the rate that its range test finds", _found, on_request=True),
        Arm("curve", "LRCurve: the same rate, in the last 40 % of the run down to 0", _curve, on_request=True),
        Arm("cyclic", "CyclicMomentum: four cycles, up to three times the rate", _cyclic, on_request=True),
        Arm("resizing", "ProgressiveResizing: from half the side to the full one", _resizing, on_request=True),
        Arm(
            "subset",
            "SubsetTraining: 70 % of the samples in all but the first and the last epochs",
            _subset,
            on_request=True,
        ),
        Arm(
            "freezing",
            "FreezeProgressively: in the second half layer after layer stops, the rate of each down to 0",
            _freezing,
            on_request=True,
        ),
        Arm(
            "finetune",
            "plain, from a pretrained backbone: --weights, or quarter turns",
            plain,
            None,
            True,
            on_request=True,
        ),
        Arm(
            "freeze",
            "FreezeBackboneFinetune from that backbone: frozen for one epoch, then at the same rate",
            _freeze,
            "finetune",
            True,
            on_request=True,
        ),
        Arm(
            "gradual",
            "FreezeBackboneFinetune from that backbone: a layer more each epoch, lower ones at lower rates",
            _gradual,
            "finetune",
            True,
            on_request=True,
        ),
    )
}


def choose_arms(names: Sequence[str] | None, arms: Mapping[str, Arm] = ARMS) -> tuple[Arm, ...]:
    """The arms of those names, each after the baseline that its ratio needs.

    Args:
        names: Names from the table; ``None`` for all that need not be named. A missing baseline is added.
        arms: The table.

    Returns:
        The arms, in the order of the table.

    Raises:
        CompareError: If a name is unknown or none is given.

    Example:
        >>> [arm.name for arm in choose_arms(["freeze"])]
        ['finetune', 'freeze']
    """
    if names is None:
        return tuple(arm for arm in arms.values() if not arm.on_request)
    for name in names:
        if name not in arms:
            near = difflib.get_close_matches(name, arms, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise CompareError(f"unknown arm {name!r}: {hint}the arms are {', '.join(arms)}")
    wanted = set(names) | {arms[name].baseline for name in names}
    chosen = tuple(arm for arm in arms.values() if arm.name in wanted)
    if not chosen:
        raise CompareError(f"no arm to train: the arms are {', '.join(arms)}")
    return chosen
