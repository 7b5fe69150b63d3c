"""Segmentation as projects on medical and aerial images write it: dicts of image and mask, a Dice loss of one's own, counts over an epoch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import (
    BatchAugmentation,
    ExactResume,
    OneCycleMomentum,
    ProgressiveResizing,
    SubsetTraining,
    mean_over_samples,
)

LOSS = "valid_loss"


class DiceLoss(nn.Module):
    def __init__(self, smooth=1.0):
        super().__init__()
        self.smooth = smooth

    def forward(self, logits, mask):
        probs = logits.sigmoid()
        intersection = (probs * mask).sum(dim=(1, 2, 3))
        union = probs.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3))
        return mean_over_samples(1 - (2 * intersection + self.smooth) / (union + self.smooth))


class Disks(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        middles = torch.rand(count, 2, 1, 1, generator=generator) * 8 + 4
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        self.masks = (((y - middles[:, :1]) ** 2 + (x - middles[:, 1:]) ** 2) < 14).float()
        self.images = self.masks.expand(-1, 3, -1, -1) + 0.3 * torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "mask": self.masks[index]}


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down, self.pool, self.middle = block(3, width), nn.MaxPool2d(2), block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(block(2 * width, width), nn.Conv2d(width, 1, 1))

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.middle(self.pool(skip)))], dim=1))


def project(L):
    class SegmentationModel(L.LightningModule):
        def __init__(self, lr=2e-3):
            super().__init__()
            self.save_hyperparameters()
            self.model = UNet()
            self.register_buffer("std", torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1))
            self.register_buffer("mean", torch.tensor([0.2, 0.2, 0.2]).view(1, 3, 1, 1))
            self.loss_fn = DiceLoss()
            self.step_outputs = {"train": [], "valid": []}

        def forward(self, image):
            return self.model((image - self.mean) / self.std)

        def shared_step(self, batch, stage):
            image, mask = batch["image"], batch["mask"]
            assert image.ndim == 4
            h, w = image.shape[2:]
            assert h % 2 == 0
            assert w % 2 == 0
            logits_mask = self.forward(image)
            assert mask.max() <= 1.0
            assert mask.min() >= 0
            loss = self.loss_fn(logits_mask, mask)
            pred_mask = (logits_mask.sigmoid() > 0.5).long()
            tp = (pred_mask * mask.long()).sum(dim=(1, 2, 3))
            fp, fn = pred_mask.sum(dim=(1, 2, 3)) - tp, mask.long().sum(dim=(1, 2, 3)) - tp
            output = {"loss": loss, "tp": tp, "fp": fp, "fn": fn}
            self.step_outputs[stage].append({key: value.detach() for key, value in output.items()})
            return output

        def shared_epoch_end(self, stage):
            tp, fp, fn = (torch.cat([x[key] for x in self.step_outputs[stage]]) for key in ("tp", "fp", "fn"))
            self.log(f"{stage}_iou", (tp / (tp + fp + fn).clamp(min=1)).mean(), sync_dist=True)
            self.log(f"{stage}_loss", torch.stack([x["loss"] for x in self.step_outputs[stage]]).mean(), sync_dist=True)
            self.step_outputs[stage].clear()

        def training_step(self, batch, batch_idx):
            return self.shared_step(batch, "train")

        def on_train_epoch_end(self):
            self.shared_epoch_end("train")

        def validation_step(self, batch, batch_idx):
            return self.shared_step(batch, "valid")

        def on_validation_epoch_end(self):
            self.shared_epoch_end("valid")

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    class DataModule(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Disks(32, seed=0), batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(Disks(8, seed=1), batch_size=8, shuffle=False)

    tricks = [
        OneCycleMomentum(max_lr=0.1),
        ProgressiveResizing(start=0.5, inputs="image", maps="mask"),
        BatchAugmentation(crop=2, inputs="image", maps="mask"),
        SubsetTraining(keep=0.75, stop_at=1.0),
        ExactResume(),
    ]
    return SegmentationModel(), DataModule(), tricks, {"max_epochs": 4}
