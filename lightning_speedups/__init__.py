"""Tricks that make a PyTorch Lightning training run faster, each one a line in the user's own Trainer."""

from lightning_speedups.callbacks.freeze_backbone_finetune import FreezeBackboneFinetune
from lightning_speedups.callbacks.mixup_callback import MixupCallback
from lightning_speedups.callbacks.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.callbacks.warmup_lr_scaler import WarmupLRScaler
from lightning_speedups.defaults import trainer_defaults
from lightning_speedups.losses.label_smoothing_loss import LabelSmoothingLoss

__version__ = "0.1.0"

__all__ = [
    "FreezeBackboneFinetune",
    "LabelSmoothingLoss",
    "MixupCallback",
    "OneCycleMomentum",
    "WarmupLRScaler",
    "trainer_defaults",
]
