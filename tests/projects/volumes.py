"""Segmentation of volumes as projects on scans write it: dicts of (C, D, H, W), cross-entropy and Dice, few samples in a batch."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import AutoMicroBatch, ChannelsLast, ExactResume, FusedOptimizer, LRCurve

LOSS = "train_loss"


class Scans(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        rough = F.interpolate(torch.randn(count, 1, 2, 2, 2, generator=generator), 8, mode="trilinear")
        self.data = [{"image": scan, "label": (scan > 0.3).long(), "name": f"scan{i}"} for i, scan in enumerate(rough)]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class DiceCELoss(nn.Module):
    def forward(self, logits, label):
        hot = F.one_hot(label.squeeze(1), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        axes = tuple(range(2, logits.ndim))
        probs = logits.softmax(dim=1)
        dice = 1 - (2 * (probs * hot).sum(axes) + 1e-5) / ((probs + hot).sum(axes) + 1e-5)
        return dice.mean() + F.cross_entropy(logits, label.squeeze(1))


def project(L):
    class Net(L.LightningModule):
        def __init__(self, channels=6, lr=0.02):
            super().__init__()
            self.save_hyperparameters()
            self._model = nn.Sequential(
                *(nn.Conv3d(1, channels, 3, padding=1), nn.InstanceNorm3d(channels, affine=True), nn.PReLU()),
                *(nn.Conv3d(channels, channels, 3, padding=1), nn.PReLU(), nn.Conv3d(channels, 2, 1)),
            )
            self.loss_function = DiceCELoss()
            self.best_val_dice = 0
            self.validation_step_outputs = []

        def forward(self, x):
            return self._model(x)

        def training_step(self, batch, batch_idx):
            images, labels = batch["image"], batch["label"]
            loss = self.loss_function(self.forward(images), labels)
            self.log("train_loss", loss.item(), on_step=False, on_epoch=True, batch_size=len(images))
            return {"loss": loss, "log": {"train_loss": loss.item()}}

        def validation_step(self, batch, batch_idx):
            outputs = self.forward(batch["image"])
            overlap = (outputs.argmax(1) * batch["label"][:, 0]).sum()
            both = outputs.argmax(1).sum() + batch["label"].sum()
            self.validation_step_outputs.append({"dice": 2 * overlap / both.clamp(min=1), "names": batch["name"]})

        def on_validation_epoch_end(self):
            dice = torch.stack([output["dice"] for output in self.validation_step_outputs]).mean().item()
            self.best_val_dice = max(self.best_val_dice, dice)
            self.validation_step_outputs.clear()
            self.log("val_dice", dice, sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, nesterov=True)

    class DataModule(L.LightningDataModule):
        def prepare_data(self):
            self.made = True

        def setup(self, stage):
            self.train_ds, self.val_ds = Scans(16, seed=0), Scans(4, seed=1)

        def train_dataloader(self):
            return DataLoader(self.train_ds, batch_size=4, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.val_ds, batch_size=1)

    tricks = [
        LRCurve(lambda x: (1 - x) ** 0.9, warmup="10%"),
        AutoMicroBatch(start=2),
        FusedOptimizer(),
        ChannelsLast(),
        ExactResume(),
    ]
    own = [L.callbacks.ModelCheckpoint("checkpoints", monitor="val_dice", mode="max", save_last=True)]
    arguments = {"max_epochs": 3, "precision": "bf16-mixed", "callbacks": own, "enable_checkpointing": True}
    return Net(), DataModule(), tricks, arguments
