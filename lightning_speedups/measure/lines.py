"""Lines of Python's standard library, of every length, to be told by their modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_speedups.measure.images import subset
from lightning_speedups.measure.language_model import LanguageModel
from lightning_speedups.measure.text import CONTEXT, coded, library_modules, library_name
from lightning_speedups.measure.training import loader_pair

SHORTEST = 8
"""Lines of fewer bytes, without what stands around them, say nothing."""
PADDING = 0
"""A byte that is in no line."""


@dataclass(frozen=True)
class LinesData:
    """Lines of modules.

    Attributes:
        name: Where they come from, for the report.
        x_train: Lines as int64 bytes, (T,), of lengths of their own.
        y_train: int64, (N,), the number of each line's module.
        x_test: Other lines of the same modules.
        y_test: int64, (M,).
        num_classes: How many modules there are.
        size: Bytes of the text that was read.
    """

    name: str
    x_train: Sequence[Tensor]
    y_train: Tensor
    x_test: Sequence[Tensor]
    y_test: Tensor
    num_classes: int
    size: int

    @property
    def chance(self) -> float:
        """Accuracy of always answering the module with the most of the test lines, a fraction."""
        return float(torch.bincount(self.y_test).max()) / len(self.y_test)


def library_lines(samples: int, test_samples: int) -> LinesData:
    """Make the embedded lines: those of the standard library, each once in a module, with its number as the label.

    Args:
        samples: Training lines to keep at most, a seeded choice.
        test_samples: Test lines to keep at most, of others.

    Example:
        >>> data = library_lines(100, 50)
        >>> len(data.x_train), len(data.x_test), min(map(len, data.x_train)) >= 8
        (100, 50, True)
    """
    modules = library_modules().values()
    found = [list(dict.fromkeys(line.strip()[:CONTEXT] for line in source.splitlines())) for source in modules]
    lines = [(line, label) for label, of_module in enumerate(found) for line in of_module if len(line) >= SHORTEST]
    order = subset(len(lines), samples + test_samples).tolist()
    codes, labels = [coded([lines[i][0]]) for i in order], torch.tensor([lines[i][1] for i in order])
    size, cut = sum(map(len, modules)), len(order) * samples // (samples + test_samples)
    parts = codes[:cut], labels[:cut], codes[cut:], labels[cut:]
    return LinesData(f"lines of {library_name(size)}", *parts, num_classes=len(found), size=size)


class LineReader(nn.Module):
    """Tells a line's module by the mean of a transformer's features; padding on the right changes nothing.

    Args:
        body: The transformer; its own head is replaced.
        num_classes: How many modules there are.
    """

    def __init__(self, body: Any, num_classes: int) -> None:
        super().__init__()
        self.body = body
        body.head, self.head = nn.Identity(), nn.Linear(body.norm.normalized_shape[0], num_classes)

    def forward(self, lines: Tensor) -> Tensor:
        """Logits, (N, num_classes), of lines, (N, T)."""
        real = (lines != PADDING).unsqueeze(2)
        mean = (self.body(lines) * real).sum(1) / real.sum(1)
        logits: Tensor = self.head(mean)
        return logits


class LineClassifier(LanguageModel):
    """What a Lightning user writes to classify lines, trained by AdamW; nothing in here knows of any trick."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of (lines, labels)."""
        loss: Tensor = self.criterion(self(batch[0]), batch[1])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and cross-entropy of one batch."""
        lines, labels = batch
        logits = self(lines).float()
        right, loss = (logits.argmax(1) == labels).float().mean(), nn.functional.cross_entropy(logits, labels)
        self.log_dict({"test_accuracy": right, "test_loss": loss}, batch_size=len(labels))


class _Lines(Dataset[tuple[Tensor, Tensor]]):
    """Lines and their labels; tells the lengths."""

    def __init__(self, lines: Sequence[Tensor], labels: Tensor) -> None:
        self.lines, self.labels = lines, labels
        self.lengths = [len(line) for line in lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.lines[index], self.labels[index]


def padded(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Make a batch of samples: lines padded to the longest of them, and labels.

    Args:
        samples: Pairs of a line and its label.

    Example:
        >>> padded([(torch.tensor([7, 8]), torch.tensor(0)), (torch.tensor([9]), torch.tensor(1))])
        (tensor([[7, 8],
                [9, 0]]), tensor([0, 1]))
    """
    lines, labels = zip(*samples, strict=True)
    return pad_sequence(list(lines), batch_first=True, padding_value=PADDING), torch.stack(labels)


def line_loaders(data: LinesData, batch_size: int, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test loader; the order of the training batches depends on the seed alone.

    Args:
        data: The lines.
        batch_size: Lines in a training batch; a last, smaller batch is dropped.
        seed: Seed of the loader's own generator.

    Returns:
        (training loader, test loader), of padded lines and labels.
    """
    train_set, test_set = _Lines(data.x_train, data.y_train), _Lines(data.x_test, data.y_test)
    return loader_pair(train_set, test_set, batch_size, seed, padded)
