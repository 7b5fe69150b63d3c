"""Quantile regression on a table as forecasting projects write it: a dict of columns and a target, a loss of many quantiles, early stopping."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import (
    AveragedWeights,
    CyclicMomentum,
    ExactResume,
    StopAtTarget,
    SubsetTraining,
    mean_over_samples,
)

LOSS = "val_loss"


class QuantileLoss(nn.Module):
    def __init__(self, quantiles):
        super().__init__()
        self.quantiles = quantiles

    def forward(self, y_pred, target):
        losses = []
        for i, q in enumerate(self.quantiles):
            errors = target - y_pred[..., i]
            losses.append(torch.max((q - 1) * errors, q * errors).unsqueeze(-1))
        return 2 * mean_over_samples(torch.cat(losses, dim=-1))


class Table(Dataset):
    def __init__(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        self.numbers = torch.randn(rows, 5, generator=generator)
        self.kinds = torch.randint(0, 4, (rows, 2), generator=generator)
        noise = torch.randn(rows, generator=generator)
        self.target = 3 * self.numbers[:, 0] + self.kinds[:, 1] + 0.3 * noise

    def __len__(self):
        return len(self.target)

    def __getitem__(self, row):
        return {"x_cat": self.kinds[row], "x_cont": self.numbers[row]}, self.target[row]


def project(L):
    class Tables(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.train, self.val = Table(128, seed=0), Table(32, seed=1)

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=16, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.val, batch_size=16)

    class QuantileRegressor(L.LightningModule):
        def __init__(self, cardinalities=(4, 4), hidden_size=16, quantiles=(0.1, 0.5, 0.9), learning_rate=0.01):
            super().__init__()
            self.loss = QuantileLoss(quantiles)
            self.save_hyperparameters()
            self.embeddings = nn.ModuleDict({f"cat_{i}": nn.Embedding(n, 3) for i, n in enumerate(cardinalities)})
            self.layers = nn.Sequential(
                *(nn.Linear(5 + 3 * len(cardinalities), hidden_size), nn.BatchNorm1d(hidden_size), nn.SELU()),
                *(nn.Dropout(0.1), nn.Linear(hidden_size, len(quantiles))),
            )

        def forward(self, x):
            embedded = [embed(x["x_cat"][:, i]) for i, embed in enumerate(self.embeddings.values())]
            return self.layers(torch.cat([x["x_cont"], *embedded], dim=-1))

        def _step(self, batch, tag):
            x, y = batch
            loss = self.loss(self(x), y)
            self.log(f"{tag}_loss", loss, on_step=tag == "train", on_epoch=True, prog_bar=True, sync_dist=True)
            return {"loss": loss, "n_samples": len(y)}

        def training_step(self, batch, batch_idx):
            return self._step(batch, "train")

        def validation_step(self, batch, batch_idx):
            return self._step(batch, "val")

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)

    tricks = [
        CyclicMomentum(0.002, 0.02, step_size_up=3),
        AveragedWeights(horizon=4, every=1),
        StopAtTarget("val_loss", target=0.01, mode="min"),
        SubsetTraining(method="loss", stop_at=1.0),
        ExactResume(),
    ]
    own = [L.callbacks.EarlyStopping(monitor="val_loss", patience=3)]
    return QuantileRegressor(), Tables(), tricks, {"max_epochs": 3, "gradient_clip_val": 0.1, "callbacks": own}
