"""Tricks that make a PyTorch Lightning training run faster, each one a line in the user's own Trainer."""

from lightning_speedups.callbacks.batch_augmentation import BatchAugmentation
from lightning_speedups.callbacks.cyclic_momentum import CyclicMomentum
from lightning_speedups.callbacks.feature_cache import FeatureCache
from lightning_speedups.callbacks.freeze_backbone_finetune import FreezeBackboneFinetune
from lightning_speedups.callbacks.freeze_progressively import FreezeProgressively
from lightning_speedups.callbacks.lr_curve import LRCurve
from lightning_speedups.callbacks.mixup_callback import MixupCallback
from lightning_speedups.callbacks.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.callbacks.progressive_resizing import ProgressiveResizing
from lightning_speedups.callbacks.smoothing_schedule import SmoothingSchedule
from lightning_speedups.callbacks.stop_at_target import StopAtTarget
from lightning_speedups.callbacks.subset_training import SubsetTraining
from lightning_speedups.callbacks.warmup_lr_scaler import WarmupLRScaler
from lightning_speedups.core.sample_losses import mean_over_samples
from lightning_speedups.data.in_memory_loader import InMemoryLoader
from lightning_speedups.defaults import trainer_defaults
from lightning_speedups.losses.binary_label_smoothing import BinaryLabelSmoothing
from lightning_speedups.losses.label_smoothing_loss import LabelSmoothingLoss
from lightning_speedups.measure.batch_picture import plot_batch
from lightning_speedups.measure.lr_range_test import LRRangeTest
from lightning_speedups.measure.schedule_plot import plot_schedule
from lightning_speedups.models.transfer_classifier import TransferClassifier
from lightning_speedups.models.weight_files import load_weights

__version__ = "0.1.0"

__all__ = [
    "BatchAugmentation",
    "BinaryLabelSmoothing",
    "CyclicMomentum",
    "FeatureCache",
    "FreezeBackboneFinetune",
    "FreezeProgressively",
    "InMemoryLoader",
    "LRCurve",
    "LRRangeTest",
    "LabelSmoothingLoss",
    "MixupCallback",
    "OneCycleMomentum",
    "ProgressiveResizing",
    "SmoothingSchedule",
    "StopAtTarget",
    "SubsetTraining",
    "TransferClassifier",
    "WarmupLRScaler",
    "load_weights",
    "mean_over_samples",
    "plot_batch",
    "plot_schedule",
    "trainer_defaults",
]
