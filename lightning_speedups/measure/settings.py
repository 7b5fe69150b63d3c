"""What can be asked of a comparison: every number checked before anything is loaded or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.networks import DEFAULT_MODEL

__all__ = ["ACCELERATORS", "Settings"]

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass(frozen=True)
class Settings:
    """Size and choices of a comparison; ``None`` leaves a number to the workload.

    Attributes:
        model: ``"convnet"`` or a timm name.
        weights: What finetune and freeze start from: a weight file, or ``"pretrained"`` for timm's own; ``None``: a
            network trained on quarter turns of the images.
        seeds: Runs of each arm, 1..100; the seeds are 0, 1, ...; 3, or 1 for a quick comparison.
        epochs: Epochs of each run, 1..1000; 8, or 7 for a quick comparison.
        batch_size: Training batch size, 2..65536.
        lr: Constant learning rate of the plain arm, in (0, 10].
        samples: Training images, 10..10 million; 2000 collages (1600 quick), or all of the caller's.
        test_samples: Test images, 10..10 million; 1000 collages (500 quick), or up to 2000 of the caller's.
        width: Channels of the convnet's stem, 4..1024.
        image_size: Side in pixels to which a folder's images are resized, 8..512.
        target: Accuracy to reach as a fraction, in (0, 1].
        pretrain_epochs: Epochs on quarter turns before finetune and freeze, 1..1000; half of ``epochs``.
        accelerator: The Trainer's accelerator.
        threads: Torch's threads, 1..1024; torch's own choice when ``None``.
        quick: Whether to use the smaller defaults.

    Raises:
        CompareError: If a value is out of its range, or two do not go together.
    """

    model: str = DEFAULT_MODEL
    weights: str | None = None
    seeds: int | None = None
    epochs: int | None = None
    batch_size: int = 64
    lr: float = 0.02
    samples: int | None = None
    test_samples: int | None = None
    width: int | None = None
    image_size: int | None = None
    target: float | None = None
    pretrain_epochs: int | None = None
    accelerator: str = "auto"
    threads: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        _whole("seeds", self.seeds, 1, 100)
        _whole("epochs", self.epochs, 1, 1000)
        _whole("batch-size", self.batch_size, 2, 65536)
        _whole("samples", self.samples, 10, 10_000_000)
        _whole("test-samples", self.test_samples, 10, 10_000_000)
        _whole("width", self.width, 4, 1024)
        _whole("image-size", self.image_size, 8, 512)
        _whole("pretrain-epochs", self.pretrain_epochs, 1, 1000)
        _whole("threads", self.threads, 1, 1024)
        if self.weights == "pretrained" and self.model == DEFAULT_MODEL:
            raise CompareError(f"--weights pretrained needs a timm --model; {DEFAULT_MODEL} takes the path of a file")
        if self.weights is not None and self.pretrain_epochs is not None:
            raise CompareError("--weights and --pretrain-epochs are two sources of one backbone: choose one of them")
        if not 0 < self.lr <= 10:
            raise CompareError(f"--lr must be above 0 and at most 10, got {self.lr}")
        if self.target is not None and not 0 < self.target <= 1:
            hint = f" (write {self.target / 100:g})" if 1 < self.target <= 100 else ""
            raise CompareError(f"--target must be a fraction above 0 and at most 1, got {self.target:g}{hint}")
        if self.accelerator not in ACCELERATORS:
            raise CompareError(f"--accelerator must be one of {', '.join(ACCELERATORS)}, got {self.accelerator!r}")

    @property
    def run_seeds(self) -> range:
        """The seeds themselves."""
        return range(self.seeds or (1 if self.quick else 3))

    @property
    def run_epochs(self) -> int:
        """Epochs of each run."""
        return self.epochs or (7 if self.quick else 8)

    @property
    def run_pretrain_epochs(self) -> int:
        """Epochs of each pretraining."""
        return self.pretrain_epochs or max(1, self.run_epochs // 2)

    @property
    def collages(self) -> tuple[int, int]:
        """Training and test images to make when the caller brings none."""
        train, test = (1600, 500) if self.quick else (2000, 1000)
        return self.samples or train, self.test_samples or test


def _whole(option: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or math.isnan(value):
        raise CompareError(f"--{option} must be a whole number from {low} to {high}, got {value}")
