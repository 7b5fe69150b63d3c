"""What a Lightning user writes to train a language model, and the loaders that go with it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups.measure.text import TextData
from lightning_speedups.measure.training import loader_pair, on_one_cycle

EVALUATION_BATCH = 100


class LanguageModel(LightningModule):
    """A language model of bytes, trained by AdamW; nothing in here knows of any trick.

    Args:
        model: The network: logits, (N, T, tokens), of tokens, (N, T).
        lr: Learning rate; constant, or the highest of a cycle.
        criterion: Training loss of (logits, targets), one row a token.
        one_cycle: Whether the rate follows torch's ``OneCycleLR``.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, criterion: nn.Module | None = None, one_cycle: bool = False
    ) -> None:
        super().__init__()
        self.model, self.lr, self.one_cycle = model, lr, one_cycle
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each token's next."""
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of (tokens, each one's next)."""
        tokens, targets = batch
        loss: Tensor = self.criterion(self(tokens).flatten(0, 1), targets.flatten())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Share of the tokens told rightly, and cross-entropy; the same loss whatever the arm trains with."""
        tokens, targets = batch
        logits = self(tokens).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        right = (logits.argmax(2) == targets).float().mean()
        self.log_dict({"test_accuracy": right, "test_loss": loss}, batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        """AdamW."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        return on_one_cycle(self, optimizer) if self.one_cycle else optimizer


def text_loaders(data: TextData, batch_size: int, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test loader; the order of the training batches depends on the seed alone.

    Args:
        data: The text.
        batch_size: Windows in a training batch; a last, smaller batch is dropped.
        seed: Seed of the loader's own generator.

    Returns:
        (training loader, test loader), of pairs of int64 tokens.
    """
    train_set, test_set = TensorDataset(data.x_train, data.y_train), TensorDataset(data.x_test, data.y_test)
    return loader_pair(train_set, test_set, batch_size, seed, evaluation_batch=EVALUATION_BATCH)
