"""What a comparison can be about: images, a text and its lines, each with its data, its network and its arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups.measure.arms import ARMS, Arm
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData
from lightning_speedups.measure.language_model import LanguageModel, text_loaders
from lightning_speedups.measure.lines import LineClassifier, LineReader, LinesData, library_lines, line_loaders
from lightning_speedups.measure.loading import load_data
from lightning_speedups.measure.networks import Transformer, build_network
from lightning_speedups.measure.runs import ACCURACY, LOSS, Metric
from lightning_speedups.measure.settings import Settings
from lightning_speedups.measure.text import BYTES, CONTEXT, TextData, library_text
from lightning_speedups.measure.text_arms import LINE_ARMS, TEXT_ARMS
from lightning_speedups.measure.training import Classifier, loaders

TEST_LIMIT = 2000  # of the caller's own images, unless asked otherwise: they are looked at every epoch
HEADS = 4
OPTIMIZER = "AdamW, betas 0.9 and 0.999, weight decay 0.01"
LOOKS = 10  # at a run on text

Data = ImageData | TextData | LinesData


@dataclass(frozen=True)
class Task:
    """What is trained for.

    Attributes:
        arms: The ways to train, by name.
        metric: What they are compared by.
        sample: What one sample is called.
        optimizer: What plain trains with, for the report.
        load: Makes the data of what the caller gave and the settings.
        network: Makes a network for the settings, data and weights.
        module: Makes a LightningModule of a network, data, and keyword arguments ``lr``, ``criterion``, ``one_cycle``.
        loaders: Makes a training and a test loader of data, a batch size and a seed.
        facts: What else the report says of settings and data.
        in_part: Whether a run may end within an epoch.
    """

    arms: Mapping[str, Arm]
    metric: Metric
    sample: str
    optimizer: str
    load: Callable[[Any, Settings], Any]
    network: Callable[[Settings, Any, str | None], nn.Module]
    module: Callable[..., LightningModule]
    loaders: Callable[[Any, int, int], tuple[DataLoader[Any], DataLoader[Any]]]
    facts: Callable[[Settings, Any], dict[str, Any]]
    in_part: bool = False

    def epochs(self, arm: Arm, epochs: int) -> float:
        """Epochs of a run of an arm, when a full run has so many."""
        return arm.length * epochs if self.in_part else arm.epochs(epochs)

    def pace(self, epochs: float, batches: int) -> dict[str, Any]:
        """Arguments of the Trainer for a run's length, with a look at its end.

        Args:
            epochs: Length of the run.
            batches: Batches of an epoch.

        Example:
            >>> TASKS["text"].pace(0.3, 900)
            {'max_epochs': 1, 'max_steps': 270, 'val_check_interval': 27, 'check_val_every_n_epoch': None}
        """
        if not self.in_part:
            return {"max_epochs": epochs}
        steps = max(1, round(epochs * batches))
        every = max(1, min(steps, batches) // LOOKS)
        steps -= steps % every
        looks = {"val_check_interval": every, "check_val_every_n_epoch": None}  # counted over all epochs
        return {"max_epochs": math.ceil(steps / batches), "max_steps": steps, **looks}


def _images(given: ImageData | str | Path | None, settings: Settings) -> ImageData:
    if settings.image_size is not None and (given is None or isinstance(given, ImageData)):
        raise CompareError("`image_size` is for folders of images; it needs `data`, the path of a folder")
    if given is None:
        return digit_collages(*settings.embedded)
    if not isinstance(given, ImageData):
        given = load_data(given, image_size=settings.image_size, samples=settings.samples)
    return given.limited(settings.samples, settings.test_samples or TEST_LIMIT)


def _own(given: Any, settings: Settings) -> tuple[int, int]:
    if given is not None:
        raise CompareError(f"`data` is for images; the task {settings.task} has a text of its own")
    return settings.embedded


def _text(given: Any, settings: Settings) -> TextData:
    if isinstance(given, TextData):
        return given.limited(settings.samples, settings.test_samples)
    return library_text(*_own(given, settings))


def _lines(given: Any, settings: Settings) -> LinesData:
    return library_lines(*_own(given, settings))


def _image_network(settings: Settings, data: ImageData, weights: str | None) -> nn.Module:
    return build_network(settings.model, data, width=settings.width, weights=weights)


def _text_network(settings: Settings, data: TextData, weights: str | None) -> nn.Module:
    return Transformer(data.num_classes, context=data.x_train.shape[1], width=_width(settings, 128), heads=HEADS)


def _line_network(settings: Settings, data: LinesData, weights: str | None) -> nn.Module:
    body = Transformer(BYTES, context=CONTEXT, width=_width(settings, 64), depth=2, heads=HEADS)
    return LineReader(body, data.num_classes)


def _width(settings: Settings, usual: int) -> int:
    width = settings.width or usual
    if width % HEADS:
        raise CompareError(f"`width` of the transformer must be a multiple of its {HEADS} heads, got {width}")
    return width


def _language_model(network: nn.Module, data: TextData, **options: Any) -> LightningModule:
    return LanguageModel(network, **options)


def _line_classifier(network: nn.Module, data: LinesData, **options: Any) -> LightningModule:
    return LineClassifier(network, **options)


TASKS: Mapping[str, Task] = {
    "images": Task(
        ARMS,
        ACCURACY,
        "image",
        "SGD, Nesterov momentum 0.9, weight decay 5e-4",
        _images,
        _image_network,
        Classifier,
        loaders,
        lambda settings, data: {"image": list(data.x_train.shape[1:])},
    ),
    "text": Task(
        TEXT_ARMS,
        LOSS,
        "window",
        OPTIMIZER,
        _text,
        _text_network,
        _language_model,
        text_loaders,
        lambda settings, data: {"model": "transformer", "context": data.x_train.shape[1], "bytes": data.size},
        in_part=True,
    ),
    "lines": Task(
        LINE_ARMS,
        ACCURACY,
        "line",
        OPTIMIZER,
        _lines,
        _line_network,
        _line_classifier,
        line_loaders,
        lambda settings, data: {"model": "transformer", "bytes": data.size},
    ),
}
