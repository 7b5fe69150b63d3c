"""Classification of graphs as projects on molecules write it: a batch object with `to`, graphs of all sizes in one, pooling by index."""

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups import AveragedWeights, EffectiveBatchSize, ExactResume, LRCurve, WarmupLRScaler

LOSS = "train_loss"


@dataclass
class GraphBatch:
    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor
    y: torch.Tensor

    @property
    def num_graphs(self):
        return len(self.y)

    def to(self, device, non_blocking=False):
        moved = {one.name: getattr(self, one.name).to(device, non_blocking=non_blocking) for one in fields(self)}
        return GraphBatch(**moved)


def collate(graphs):
    sizes = [len(x) for x, _, _ in graphs]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    return GraphBatch(
        torch.cat([x for x, _, _ in graphs]),
        torch.cat([edges + start for (_, edges, _), start in zip(graphs, starts, strict=False)], dim=1),
        torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(sizes)),
        torch.tensor([float(y) for _, _, y in graphs]),
    )


def molecules(count):
    """Rings and chains."""
    generator = torch.Generator().manual_seed(3)
    for index in range(count):
        atoms, ring = int(torch.randint(4, 9, (), generator=generator)), index % 2
        around = torch.arange(atoms if ring else atoms - 1)
        edges = torch.stack([around, (around + 1) % atoms])
        degrees = torch.bincount(edges.flatten(), minlength=atoms).float().unsqueeze(1)
        noise = torch.randn(atoms, 3, generator=generator)
        yield torch.cat([degrees - 1.5, noise], dim=1), torch.cat([edges, edges.flip(0)], dim=1), ring


class GraphConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin_rel, self.lin_root = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x, edge_index):
        gathered = torch.zeros_like(x).index_add_(0, edge_index[1], x[edge_index[0]])
        return self.lin_rel(gathered) + self.lin_root(x)


def global_mean_pool(x, batch, size):
    total = x.new_zeros(size, x.shape[1]).index_add_(0, batch, x)
    return total / torch.bincount(batch, minlength=size).unsqueeze(1)


def project(L):
    class GNN(L.LightningModule):
        def __init__(self, hidden_channels=16, lr=0.01):
            super().__init__()
            self.save_hyperparameters()
            self.convs = nn.ModuleList([GraphConv(4, hidden_channels), GraphConv(hidden_channels, hidden_channels)])
            self.norm, self.lin = nn.BatchNorm1d(hidden_channels), nn.Linear(hidden_channels, 1)
            self.loss_module = nn.BCEWithLogitsLoss()

        def forward(self, data):
            x = data.x
            for conv in self.convs:
                x = conv(x, data.edge_index).relu()
            x = global_mean_pool(self.norm(x), data.batch, data.num_graphs)
            return self.lin(nn.functional.dropout(x, 0.1, self.training)).squeeze(-1)

        def training_step(self, data, batch_idx):
            logits = self(data)
            loss = self.loss_module(logits, data.y)
            right = ((logits > 0) == data.y).float().mean()
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=data.num_graphs)
            self.log("train_acc", right, on_step=False, on_epoch=True, batch_size=data.num_graphs)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=1e-3)

        def train_dataloader(self):
            return DataLoader(list(molecules(40)), batch_size=8, shuffle=True, collate_fn=collate)

    tricks = [
        LRCurve("cosine"),
        WarmupLRScaler(scale=2.0, warmup_epochs=1),
        EffectiveBatchSize(16, count=lambda batch: batch.num_graphs),
        AveragedWeights(horizon=3, every=1),
        ExactResume(),
    ]
    return GNN(), None, tricks, {"max_epochs": 4}
