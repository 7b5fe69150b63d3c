"""One measured training run: an unmodified LightningModule through a real Trainer, with a stopwatch beside it."""

from __future__ import annotations

import contextlib
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_speedups.attach.packages import ROOTS, Callback
from lightning_speedups.measure.images import ImageData
from lightning_speedups.measure.stopwatch import Point, Stopwatch

EVALUATION_BATCH = 500


class Classifier(LightningModule):
    """What a Lightning user writes: nothing in here knows of any trick.

    Args:
        model: The network.
        data: The images, for their statistics and number of classes.
        lr: Learning rate of SGD; constant, or the highest of a cycle.
        criterion: Training loss of (logits, targets).
        one_cycle: Whether the rate follows torch's ``OneCycleLR``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        *,
        lr: float,
        criterion: nn.Module | None = None,
        one_cycle: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.lr, self.one_cycle = model, lr, one_cycle
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.accuracy = MulticlassAccuracy(data.num_classes, average="micro")
        mean, std = data.statistics()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, normalised ones or uint8."""
        if images.dtype == torch.uint8:
            images = (images - self.mean) / self.std
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of (images, labels)."""
        images, labels = batch
        loss: Tensor = self.criterion(self(images), labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and cross-entropy of one batch; the same loss whatever the arm trains with."""
        images, labels = batch
        logits = self(images).float()
        self.accuracy(logits, labels)
        self.log("test_accuracy", self.accuracy)
        self.log("test_loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """SGD with Nesterov momentum."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return on_one_cycle(self, optimizer) if self.one_cycle else optimizer


def on_one_cycle(module: LightningModule, optimizer: Optimizer) -> Any:
    """What ``configure_optimizers`` returns for torch's ``OneCycleLR`` over the run, up to the optimizer's rate."""
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images in whole batches: a small network would spend its time on collating single ones."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows)
        return (self.images[index].float() - self.mean) / self.std, self.labels[index]


def loaders(data: ImageData, batch_size: int, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test loader; the order of the training batches depends on the seed alone.

    Args:
        data: The images.
        batch_size: Training batch size; a last, smaller batch is dropped.
        seed: Seed of the loader's own generator.

    Returns:
        (training loader, test loader), with normalised float32 images and int64 labels.
    """
    train_set = _Images(data.x_train, data.y_train, *data.statistics())
    test_set = _Images(data.x_test, data.y_test, *data.statistics())
    return loader_pair(train_set, test_set, batch_size, seed, collate_fn=tuple)  # a batch is a tuple already


def loader_pair(
    train_set: Dataset[Any],
    test_set: Dataset[Any],
    batch_size: int,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    evaluation_batch: int = EVALUATION_BATCH,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test loader of two data sets; the order of the training batches depends on the seed alone.

    Args:
        train_set: Training samples.
        test_set: Test samples.
        batch_size: Training batch size; a last, smaller batch is dropped.
        seed: Seed of the loader's own generator.
        collate_fn: What makes a batch of samples; torch's, if none is given.
        evaluation_batch: Samples in a test batch.
    """
    order = torch.Generator().manual_seed(seed)
    train_loader = DataLoader(
        train_set, batch_size, shuffle=True, drop_last=True, generator=order, collate_fn=collate_fn
    )
    return train_loader, DataLoader(test_set, evaluation_batch, collate_fn=collate_fn)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a while; afterwards they are as they were.

    Args:
        seed: The seed.
    """
    # one device is trained on; forking the generators of many would warn
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's chatter for a while; the tricks' own warnings still come through."""
    with warnings.catch_warnings(), contextlib.ExitStack() as put_back:
        for logger in map(logging.getLogger, (*ROOTS, "lightning.fabric", "lightning_fabric", "lightning_speedups")):
            put_back.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        # few workers for the loaders, fewer batches than the logging interval, an unused GPU
        warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)")
        yield


def train(
    module: LightningModule,
    data: Any,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    callbacks: Sequence[Callback] = (),
    trainer: Mapping[str, Any] | None = None,
    loader: DataLoader[Any] | None = None,
    watch: Stopwatch | None = None,
    make_loaders: Callable[[Any, int, int], tuple[DataLoader[Any], DataLoader[Any]]] = loaders,
) -> list[Point]:
    """Train once through a real Trainer and measure it.

    Args:
        module: The LightningModule to train, in place.
        data: The images, or what else ``make_loaders`` takes.
        batch_size: Training batch size.
        epochs: Number of epochs.
        seed: Seed of the batches' order and of torch's global generators during the run.
        callbacks: The tricks' callbacks.
        trainer: Further arguments of the Trainer.
        loader: Another training loader than that of ``make_loaders``.
        watch: The stopwatch to use; holds the points also when the run is interrupted.
        make_loaders: Makes training and test loader of data, batch size and seed.

    Returns:
        One point a validation.

    Raises:
        KeyboardInterrupt: If the run was interrupted; Lightning would end the program instead.
    """
    watch = watch or Stopwatch()
    arguments: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": epochs,
        **(trainer or {}),
    }
    handler = signal.getsignal(signal.SIGINT)
    with quiet(), seeded(seed), contextlib.ExitStack() as put_back:
        # a Trainer that is asked for cuDNN's autotuning switches it on for good
        put_back.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = False
        train_loader, test_loader = make_loaders(data, batch_size, seed)
        try:
            Trainer(callbacks=[watch, *callbacks], **arguments).fit(module, loader or train_loader, test_loader)
        except SystemExit as exit_:
            # what the Trainer makes of a Ctrl-C, after it has switched Ctrl-C off for good
            if not isinstance(exit_.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
    return watch.points
