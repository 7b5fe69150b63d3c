"""Tricks that make a PyTorch Lightning training run faster, each one a line in the user's own Trainer."""

from lightning_speedups.callbacks.cyclic_momentum import CyclicMomentum
from lightning_speedups.callbacks.freeze_backbone_finetune import FreezeBackboneFinetune
from lightning_speedups.callbacks.lr_curve import LRCurve
from lightning_speedups.callbacks.mixup_callback import MixupCallback
from lightning_speedups.callbacks.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.callbacks.stop_at_target import StopAtTarget
from lightning_speedups.callbacks.warmup_lr_scaler import WarmupLRScaler
from lightning_speedups.defaults import trainer_defaults
from lightning_speedups.losses.label_smoothing_loss import LabelSmoothingLoss
from lightning_speedups.measure.lr_range_test import LRRangeTest
from lightning_speedups.measure.schedule_plot import plot_schedule

__version__ = "0.1.0"

__all__ = [
    "CyclicMomentum",
    "FreezeBackboneFinetune",
    "LRCurve",
    "LRRangeTest",
    "LabelSmoothingLoss",
    "MixupCallback",
    "OneCycleMomentum",
    "StopAtTarget",
    "WarmupLRScaler",
    "plot_schedule",
    "trainer_defaults",
]
