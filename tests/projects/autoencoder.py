"""A convolutional autoencoder as tutorials write it: encoder and decoder, a DataModule, a scheduler that follows the validation loss."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_speedups import AveragedWeights, BatchAugmentation, ChannelsLast, ExactResume, WarmupLRScaler

LOSS = "train_loss"


def project(L):
    class Pictures(L.LightningDataModule):
        def __init__(self, batch_size=8):
            super().__init__()
            self.save_hyperparameters()

        def setup(self, stage):
            generator = torch.Generator().manual_seed(42)
            rough = torch.rand(40, 3, 2, 2, generator=generator)
            images = F.interpolate(rough, 16, mode="bilinear")
            pictures = TensorDataset(images, torch.zeros(40))
            self.train, self.val = random_split(pictures, [32, 8], generator=generator)

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)

        def val_dataloader(self):
            return DataLoader(self.val, batch_size=self.hparams.batch_size)

    class Autoencoder(L.LightningModule):
        def __init__(self, channels=8, latent_dim=16, learning_rate=5e-3):
            super().__init__()
            self.save_hyperparameters()
            self.encoder = nn.Sequential(
                *(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.GELU()),
                *(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GELU()),
                *(nn.Flatten(), nn.Linear(2 * channels * 16, latent_dim)),
            )
            self.decoder_input = nn.Linear(latent_dim, 2 * channels * 16)
            self.decoder = nn.Sequential(
                *(nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1), nn.GELU()),
                *(nn.ConvTranspose2d(channels, 3, 4, stride=2, padding=1), nn.Sigmoid()),
            )
            self.example_input_array = torch.zeros(2, 3, 16, 16)

        def forward(self, x):
            z = self.decoder_input(self.encoder(x))
            return self.decoder(z.view(len(z), -1, 4, 4))

        def _reconstruction_loss(self, batch):
            x, _ = batch
            return F.mse_loss(self(x), x, reduction="none").sum(dim=[1, 2, 3]).mean(dim=[0])

        def training_step(self, batch, batch_idx):
            loss = self._reconstruction_loss(batch)
            self.log("train_loss", loss, on_epoch=True, on_step=False)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self._reconstruction_loss(batch))

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}

    tricks = [
        WarmupLRScaler(scale=4.0, warmup_epochs=1),
        BatchAugmentation(crop=1),
        AveragedWeights(horizon=4, every=1),
        ChannelsLast(),
        ExactResume(),
    ]
    return Autoencoder(), Pictures(), tricks, {"max_epochs": 3}
