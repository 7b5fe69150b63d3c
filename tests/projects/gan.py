"""A GAN as tutorials write it: two optimizers that a module steps by hand, one after the other."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import BatchAugmentation, ChannelsLast, CyclicMomentum, ExactResume, LRCurve

LOSS = "d_loss"
STRATEGY = {"find_unused_parameters": True}  # each of the two losses reaches one of the networks


def project(L):
    class Faces(L.LightningDataModule):
        def setup(self, stage):
            generator = torch.Generator().manual_seed(1)
            self.faces = TensorDataset(torch.rand(32, 1, 8, 8, generator=generator).mul(0.4).add(0.6), torch.zeros(32))

        def train_dataloader(self):
            return DataLoader(self.faces, batch_size=8, shuffle=True)

    class GAN(L.LightningModule):
        def __init__(self, latent_dim=6, lr=0.005, b1=0.5, b2=0.999):
            super().__init__()
            self.save_hyperparameters()
            self.automatic_optimization = False
            self.generator = nn.Sequential(
                *(nn.Linear(latent_dim, 4 * 16), nn.Unflatten(1, (4, 4, 4)), nn.BatchNorm2d(4), nn.ReLU()),
                *(nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1), nn.Tanh()),
            )
            self.discriminator = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.LeakyReLU(0.2)),
                *(nn.Flatten(), nn.Linear(8 * 16, 1)),
            )
            self.validation_z = torch.randn(4, latent_dim)

        def forward(self, z):
            return self.generator(z)

        def adversarial_loss(self, y_hat, y):
            return nn.functional.binary_cross_entropy_with_logits(y_hat, y)

        def training_step(self, batch):
            imgs, _ = batch
            optimizer_g, optimizer_d = self.optimizers()
            z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)
            valid, fake = imgs.new_ones(len(imgs), 1), imgs.new_zeros(len(imgs), 1)

            self.toggle_optimizer(optimizer_g)
            g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
            self.log("g_loss", g_loss, prog_bar=True)
            self.manual_backward(g_loss)
            optimizer_g.step()
            optimizer_g.zero_grad()
            self.untoggle_optimizer(optimizer_g)

            self.toggle_optimizer(optimizer_d)
            real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
            fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
            d_loss = (real_loss + fake_loss) / 2
            self.log("d_loss", d_loss, prog_bar=True)
            self.manual_backward(d_loss)
            optimizer_d.step()
            optimizer_d.zero_grad()
            self.untoggle_optimizer(optimizer_d)

        def configure_optimizers(self):
            betas = (self.hparams.b1, self.hparams.b2)
            opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=betas)
            opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=betas)
            return [opt_g, opt_d], []

        def on_train_epoch_end(self):
            sample_imgs = self(self.validation_z.type_as(self.generator[0].weight))
            assert sample_imgs.shape == (4, 1, 8, 8)

    tricks = [
        LRCurve("cosine", optimizer=0),
        CyclicMomentum(0.002, 0.008, step_size_up=3, cycle_momentum=False, optimizer=1),
        BatchAugmentation(crop=1),
        ChannelsLast(),
        ExactResume(),
    ]
    return GAN(), Faces(), tricks, {"max_epochs": 3}
