"""SimCLR as tutorials write it: a dataset that draws two views of each image, a loss between all samples of a batch."""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import AveragedWeights, ChannelsLast, ExactResume, MuonCallback, WarmupLRScaler

LOSS = "train_loss"


class ContrastiveTransformations:
    def __init__(self, n_views=2):
        self.n_views = n_views

    def view(self, x):
        left, top = torch.randint(0, 4, (2,)).tolist()
        x = x[:, top : top + 12, left : left + 12] * (0.7 + 0.6 * torch.rand(3, 1, 1))
        return x.flip(-1) if torch.rand(()) < 0.5 else x

    def __call__(self, x):
        return [self.view(x) for _ in range(self.n_views)]


class Unlabeled(Dataset):
    def __init__(self, transform):
        generator = torch.Generator().manual_seed(42)
        self.images = F.interpolate(torch.randn(40, 3, 4, 4, generator=generator), 16, mode="bilinear")
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), 0


def project(L):
    class SimCLR(L.LightningModule):
        def __init__(self, hidden_dim, lr, temperature, weight_decay, max_epochs):
            super().__init__()
            self.save_hyperparameters()
            assert self.hparams.temperature > 0.0, "The temperature must be a positive float!"
            self.convnet = nn.Sequential(
                *(nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
                *(nn.Conv2d(12, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            )
            self.projection = nn.Sequential(
                nn.Linear(16, 4 * hidden_dim), nn.ReLU(), nn.Linear(4 * hidden_dim, hidden_dim)
            )

        def configure_optimizers(self):
            optimizer = optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
            lr_scheduler = optim.lr_scheduler.CosineAnnealingLR(
                optimizer, T_max=self.hparams.max_epochs, eta_min=self.hparams.lr / 50
            )
            return [optimizer], [lr_scheduler]

        def info_nce_loss(self, batch, mode="train"):
            imgs, _ = batch
            imgs = torch.cat(imgs, dim=0)
            feats = self.projection(self.convnet(imgs))
            cos_sim = F.cosine_similarity(feats[:, None, :], feats[None, :, :], dim=-1)
            self_mask = torch.eye(cos_sim.shape[0], dtype=torch.bool, device=cos_sim.device)
            cos_sim.masked_fill_(self_mask, -9e15)
            pos_mask = self_mask.roll(shifts=cos_sim.shape[0] // 2, dims=0)
            cos_sim = cos_sim / self.hparams.temperature
            nll = (-cos_sim[pos_mask] + torch.logsumexp(cos_sim, dim=-1)).mean()
            self.log(mode + "_loss", nll)
            ranks = cos_sim.masked_fill(pos_mask, -9e15).gt(cos_sim[pos_mask][:, None]).sum(dim=-1)
            self.log(mode + "_acc_top1", (ranks == 0).float().mean())
            return nll

        def training_step(self, batch, batch_idx):
            return self.info_nce_loss(batch, mode="train")

        def validation_step(self, batch, batch_idx):
            self.info_nce_loss(batch, mode="val")

    loader = DataLoader(Unlabeled(ContrastiveTransformations()), batch_size=10, shuffle=True, drop_last=True)
    module = SimCLR(hidden_dim=8, lr=5e-3, temperature=0.3, weight_decay=1e-4, max_epochs=3)
    tricks = [
        MuonCallback(),
        WarmupLRScaler(scale=2.0, warmup_epochs=1),
        AveragedWeights(horizon=4, every=1),
        ChannelsLast(),
        ExactResume(),
    ]
    return module, loader, tricks, {"max_epochs": 3}
