"""Tricks that make a PyTorch Lightning training run faster, each one a line in the user's own Trainer."""

from lightning_speedups.attach import packages as _packages  # noqa: F401  # first: it sees which was imported before us
from lightning_speedups.core.packing import block_mask, pack
from lightning_speedups.core.plateau import Plateau
from lightning_speedups.measure.batch_picture import plot_batch
from lightning_speedups.measure.lr_range_test import LRRangeTest
from lightning_speedups.measure.schedule_plot import plot_schedule
from lightning_speedups.models.transfer_classifier import TransferClassifier
from lightning_speedups.models.weight_files import load_weights
from lightning_speedups.recipes import recipe
from lightning_speedups.tensors.sample_losses import mean_over_samples
from lightning_speedups.tricks.batches.batch_augmentation import BatchAugmentation
from lightning_speedups.tricks.batches.in_memory.in_memory import InMemory
from lightning_speedups.tricks.batches.in_memory.in_memory_loader import InMemoryLoader
from lightning_speedups.tricks.batches.mixup_callback import MixupCallback
from lightning_speedups.tricks.batches.progressive_resizing.progressive_resizing import ProgressiveResizing
from lightning_speedups.tricks.batches.random_resized_crops import RandomResizedCrops
from lightning_speedups.tricks.batches.subset_training import SubsetTraining
from lightning_speedups.tricks.hardware.allocator_tuning import AllocatorTuning
from lightning_speedups.tricks.hardware.autocast_cache import AutocastCache
from lightning_speedups.tricks.hardware.channels_last import ChannelsLast
from lightning_speedups.tricks.hardware.compiled_modules import CompiledModules
from lightning_speedups.tricks.hardware.fused_optimizer import FusedOptimizer
from lightning_speedups.tricks.hardware.trainer_defaults import trainer_defaults
from lightning_speedups.tricks.labels.binary_label_smoothing import BinaryLabelSmoothing
from lightning_speedups.tricks.labels.label_smoothing_loss import LabelSmoothingLoss
from lightning_speedups.tricks.labels.smoothing_schedule import SmoothingSchedule
from lightning_speedups.tricks.optimizers.averaged_weights import AveragedWeights
from lightning_speedups.tricks.optimizers.fast_start import FastStart
from lightning_speedups.tricks.optimizers.muon.muon import Muon, MuonMixin
from lightning_speedups.tricks.optimizers.muon.muon_callback import MuonCallback
from lightning_speedups.tricks.rates.cyclic_momentum import CyclicMomentum
from lightning_speedups.tricks.rates.lr_curve import LRCurve
from lightning_speedups.tricks.rates.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.tricks.rates.stop_at_target import StopAtTarget
from lightning_speedups.tricks.rates.warmup_lr_scaler import WarmupLRScaler
from lightning_speedups.tricks.sequences.length_batches import LengthBatches
from lightning_speedups.tricks.sequences.packing_check import PackingCheck
from lightning_speedups.tricks.sequences.sequence_length_warmup import SequenceLengthWarmup
from lightning_speedups.tricks.steps.auto_micro_batch import AutoMicroBatch
from lightning_speedups.tricks.steps.effective_batch_size import EffectiveBatchSize
from lightning_speedups.tricks.steps.exact_resume import ExactResume
from lightning_speedups.tricks.steps.image_store import ImageStore
from lightning_speedups.tricks.steps.loader_tuning import LoaderTuning
from lightning_speedups.tricks.steps.prefetch_to_device import PrefetchToDevice
from lightning_speedups.tricks.transfer.feature_cache.feature_cache import FeatureCache
from lightning_speedups.tricks.transfer.freeze_backbone_finetune import FreezeBackboneFinetune
from lightning_speedups.tricks.transfer.freeze_progressively import FreezeProgressively
from lightning_speedups_command import VERSION

__version__ = VERSION

__all__ = [
    "AllocatorTuning",
    "AutoMicroBatch",
    "AutocastCache",
    "AveragedWeights",
    "BatchAugmentation",
    "BinaryLabelSmoothing",
    "ChannelsLast",
    "CompiledModules",
    "CyclicMomentum",
    "EffectiveBatchSize",
    "ExactResume",
    "FastStart",
    "FeatureCache",
    "FreezeBackboneFinetune",
    "FreezeProgressively",
    "FusedOptimizer",
    "ImageStore",
    "InMemory",
    "InMemoryLoader",
    "LRCurve",
    "LRRangeTest",
    "LabelSmoothingLoss",
    "LengthBatches",
    "LoaderTuning",
    "MixupCallback",
    "Muon",
    "MuonCallback",
    "MuonMixin",
    "OneCycleMomentum",
    "PackingCheck",
    "Plateau",
    "PrefetchToDevice",
    "ProgressiveResizing",
    "RandomResizedCrops",
    "SequenceLengthWarmup",
    "SmoothingSchedule",
    "StopAtTarget",
    "SubsetTraining",
    "TransferClassifier",
    "WarmupLRScaler",
    "block_mask",
    "load_weights",
    "mean_over_samples",
    "pack",
    "plot_batch",
    "plot_schedule",
    "recipe",
    "trainer_defaults",
]
