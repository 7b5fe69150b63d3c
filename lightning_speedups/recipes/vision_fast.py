"""The speedrun's way to train an image classifier (Jordan, arXiv:2404.00498), from parts that any module takes."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_speedups.core.arguments import check_number
from lightning_speedups.recipes.stack import Stack, pair_of_tensors
from lightning_speedups.tricks.batches.batch_augmentation import BatchAugmentation
from lightning_speedups.tricks.batches.in_memory.in_memory_loader import InMemoryLoader
from lightning_speedups.tricks.batches.progressive_resizing.progressive_resizing import ProgressiveResizing
from lightning_speedups.tricks.batches.subset_training import SubsetTraining
from lightning_speedups.tricks.hardware.allocator_tuning import AllocatorTuning
from lightning_speedups.tricks.hardware.channels_last import ChannelsLast
from lightning_speedups.tricks.hardware.trainer_defaults import trainer_defaults
from lightning_speedups.tricks.labels.label_smoothing_loss import LabelSmoothingLoss
from lightning_speedups.tricks.optimizers.fast_start import FastStart
from lightning_speedups.tricks.optimizers.muon.muon_callback import MuonCallback
from lightning_speedups.tricks.rates.lr_curve import LRCurve


def batch_size_for(samples: int) -> int:
    """Return a batch size with which an epoch has some fifty steps, between 32 and 1000 (all samples if fewer).

    Args:
        samples: Training samples.

    Example:
        >>> [batch_size_for(samples) for samples in (20, 100, 8_000, 50_000, 1_000_000)]
        [20, 32, 160, 1000, 1000]
    """
    return min(samples, max(32, min(1000, samples // 50)))


def images_and_labels(data: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a data set, or refuse what is none.

    Args:
        data: A pair of tensors, or a ``TensorDataset`` of them.

    Raises:
        ValueError: If it is neither, or one has other dimensions, or they are of different lengths.
    """
    parts = pair_of_tensors(data)
    if parts is None or (parts[0].ndim, parts[1].ndim) != (4, 1) or not 0 < len(parts[0]) == len(parts[1]):
        shapes = f" of shapes {[tuple(one.shape) for one in parts]}" if parts else ""
        raise ValueError(
            "Expected `data` to be images (N, C, H, W) and labels (N,), as a pair of tensors or a TensorDataset of "
            f"them, but got {type(data).__name__}{shapes}."
        )
    return parts


def vision_fast(
    data: Any,
    *,
    epochs: int = 6,
    batch_size: int | None = None,
    crop: int = 2,
    flip: Literal["random", "alternating"] | None = "alternating",
    start: float = 0.625,
    keep: float = 0.5,
    seed: int | None = None,
) -> Stack:
    """Return what trains a convolutional network with BatchNorm on images, from scratch, in a few epochs.

    Muon with a linear decay; the first convolution whitened and frozen, the others begun as the identity; images that
    grow; hard samples rather than easy ones after the first epoch; crops and flips of whole batches from memory; half
    precision where the hardware has it; channels last. The module stays as it is: for the run its optimizer and its
    schedulers of the rate are replaced, and a normalisation of its own is kept.

    When not to use it: from pretrained weights; networks without convolutions or BatchNorm; data that does not fit in
    memory; wrong labels, which hard samples are full of; long runs, which end better with weaker tricks.

    Args:
        data: Images ``(N, C, H, W)``, uint8 or floating point, and labels ``(N,)``: a pair of tensors, or a
            ``TensorDataset`` of them.
        epochs: Length of the run, 1 or more; six for 50,000 images. Up to two have all samples.
        batch_size: Samples in a batch, from 1 to all; None: for some fifty steps in an epoch, 1000 at most.
        crop: How far an image may move, in pixels, 0 or more.
        flip: How images are mirrored, as in `BatchAugmentation`; None for digits and text.
        start: Side of the images at the start as a share of the full one, in (0, 1]; 1: no growth.
        keep: Share of the samples in the epochs after the first, in (0, 1].
        seed: Seed of orders and draws. None: that of torch's generator.

    Returns:
        Trainer arguments with all callbacks, a loader, and the loss that goes best with them.

    Raises:
        ValueError: If an argument is out of range, or the data are no such images and labels.

    Source:
        Jordan, arXiv:2404.00498 (airbench) and https://kellerjordan.github.io/posts/muon.

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
        >>> stack = vision_fast((images, labels), epochs=1, start=1.0)
        >>> [type(callback).__name__ for callback in stack.trainer["callbacks"]]
        ['MuonCallback', 'LRCurve', 'FastStart', 'BatchAugmentation', 'ChannelsLast', 'AllocatorTuning']
    """
    epochs = check_number("epochs", epochs, 1, whole=True)
    start = check_number("start", start, 0, 1, above=True)
    keep = check_number("keep", keep, 0, 1, above=True)
    images, labels = images_and_labels(data)
    samples = len(images)
    batch_size = check_number("batch_size", batch_size, 1, samples, whole=True, optional=True)
    loader = InMemoryLoader(
        [images, labels], batch_size or batch_size_for(samples), shuffle=True, drop_last=True, seed=seed
    )
    callbacks = [
        MuonCallback(
            lr=0.24,
            rest_lr=0.0087,
            head_lr=0.0068,
            norm_bias_factor=64,
            momentum=0.6,
            weight_decay=0.0,
            steps=3,
            normalized=True,
            rest="sgd",
        ),
        LRCurve("linear", replace=True),
        FastStart(dirac=True, logit_scale=1 / 9, batch_norm_momentum=0.4, fixed_norm_weights=True),
        BatchAugmentation(crop, flip=flip, seed=seed),
        *([ProgressiveResizing(start, 0.3, 0.8, in_loader=False)] if start < 1 else []),
        *([SubsetTraining(keep, method="loss", stop_at=1.0, seed=seed)] if keep < 1 and epochs > 2 else []),
        ChannelsLast(),
        AllocatorTuning(),
    ]
    return Stack(
        trainer_defaults(precision="auto", max_epochs=epochs, callbacks=callbacks), loader, LabelSmoothingLoss(0.2)
    )
