"""A classifier as the hydra templates write it: optimizer and scheduler handed in as partials, metrics, a compiled network."""

from functools import partial

import torch
import torch._dynamo  # once, and not in each process that forks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy

from lightning_speedups import ChannelsLast, ExactResume, FusedOptimizer, MixupCallback, WarmupLRScaler

LOSS = "train/loss"


def project(L):
    class DataModule(L.LightningDataModule):
        def __init__(self, train_val_split=(32, 8), batch_size=8, num_workers=0, pin_memory=False):
            super().__init__()
            self.save_hyperparameters(logger=False)
            self.data_train = self.data_val = None
            self.batch_size_per_device = batch_size

        def setup(self, stage=None):
            if self.trainer is not None:
                self.batch_size_per_device = self.hparams.batch_size // self.trainer.world_size
            if not self.data_train:
                generator = torch.Generator().manual_seed(42)
                labels = torch.arange(sum(self.hparams.train_val_split)) % 4
                images = torch.randn(len(labels), 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
                dataset = TensorDataset(images, labels)
                self.data_train, self.data_val = random_split(dataset, self.hparams.train_val_split, generator)

        def _loader(self, dataset, shuffle):
            options = {"num_workers": self.hparams.num_workers, "pin_memory": self.hparams.pin_memory}
            return DataLoader(dataset, batch_size=self.batch_size_per_device, shuffle=shuffle, **options)

        def train_dataloader(self):
            return self._loader(self.data_train, True)

        def val_dataloader(self):
            return self._loader(self.data_val, False)

    class LitModule(L.LightningModule):
        def __init__(self, net, optimizer, scheduler, compile, num_classes=4):
            super().__init__()
            self.save_hyperparameters(ignore=["net"], logger=False)
            self.net = net
            self.criterion = nn.CrossEntropyLoss()
            self.train_acc = Accuracy(task="multiclass", num_classes=num_classes)
            self.val_acc = Accuracy(task="multiclass", num_classes=num_classes)
            self.train_loss, self.val_loss, self.val_acc_best = MeanMetric(), MeanMetric(), MaxMetric()

        def forward(self, x):
            return self.net(x)

        def on_train_start(self):
            self.val_loss.reset()
            self.val_acc.reset()
            self.val_acc_best.reset()

        def model_step(self, batch):
            x, y = batch
            logits = self.forward(x)
            return self.criterion(logits, y), torch.argmax(logits, dim=1), y

        def training_step(self, batch, batch_idx):
            loss, preds, targets = self.model_step(batch)
            self.train_loss(loss)
            self.train_acc(preds, targets)
            self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
            self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            loss, preds, targets = self.model_step(batch)
            self.val_loss(loss)
            self.val_acc(preds, targets)
            self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
            self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

        def on_validation_epoch_end(self):
            self.val_acc_best(self.val_acc.compute())
            self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

        def setup(self, stage):
            if self.hparams.compile and stage == "fit":
                self.net = torch.compile(self.net, backend="eager")  # where nobody waits for a C++ compiler

        def configure_optimizers(self):
            optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
            if self.hparams.scheduler is not None:
                scheduler = self.hparams.scheduler(optimizer=optimizer)
                plan = {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1}
                return {"optimizer": optimizer, "lr_scheduler": plan}
            return {"optimizer": optimizer}

    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01)
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10)
    tricks = [
        MixupCallback(alpha=0.2, stop_after=0.7),
        WarmupLRScaler(base_batch_size=4, warmup_epochs=1),
        FusedOptimizer(),
        ChannelsLast(),
        ExactResume(),
    ]
    return LitModule(net, optimizer, scheduler, compile=True), DataModule(), tricks, {"max_epochs": 3}
