"""A character GPT as the small reimplementations write it: blocks of text, decay for matrices alone, weights begun by `apply`."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import CompiledModules, ExactResume, LRCurve, MuonCallback, SequenceLengthWarmup

LOSS = "train_loss"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the slow red hen. " * 4


class CharDataset(Dataset):
    def __init__(self, data, block_size):
        chars = sorted(set(data))
        self.stoi = {ch: i for i, ch in enumerate(chars)}
        self.vocab_size, self.block_size, self.data = len(chars), block_size, data

    def __len__(self):
        return (len(self.data) - 1) // self.block_size

    def __getitem__(self, idx):
        start = idx * self.block_size
        dix = torch.tensor([self.stoi[s] for s in self.data[start : start + self.block_size + 1]])
        return dix[:-1], dix[1:]


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(n_embd),
            CausalSelfAttention(n_embd, n_head),
            nn.LayerNorm(n_embd),
        )
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(0.1)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def project(L, block_size=8):
    class GPT(L.LightningModule):
        def __init__(
            self, vocab_size, block_size, n_layer=2, n_head=2, n_embd=16, learning_rate=1e-2, weight_decay=0.1
        ):
            super().__init__()
            self.save_hyperparameters()
            self.tok_emb = nn.Embedding(vocab_size, n_embd)
            self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
            self.blocks = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
            self.ln_f, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
            self.apply(self._init_weights)
            for name, parameter in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))

        def _init_weights(self, module):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(mean=0.0, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.data.zero_()

        def configure_optimizers(self):
            decay, no_decay = set(), set()
            for mn, m in self.named_modules():
                for pn, _ in m.named_parameters(recurse=False):
                    whole = isinstance(m, nn.Linear) and pn == "weight"
                    (decay if whole else no_decay).add(f"{mn}.{pn}" if mn else pn)
            named = dict(self.named_parameters())
            assert not decay & no_decay
            assert not named.keys() - (decay | no_decay)
            groups = [
                {"params": [named[pn] for pn in sorted(decay)], "weight_decay": self.hparams.weight_decay},
                {"params": [named[pn] for pn in sorted(no_decay)], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, lr=self.hparams.learning_rate, betas=(0.9, 0.95))

        def forward(self, idx):
            t = idx.shape[1]
            assert t <= self.hparams.block_size, "Cannot forward, model block size is exhausted."
            x = self.tok_emb(idx) + self.pos_emb[:, :t, :]
            for block in self.blocks:
                x = block(x)
            return self.head(self.ln_f(x))

        def training_step(self, batch, batch_idx):
            idx, targets = batch
            logits = self(idx)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
            self.log("train_loss", loss, on_epoch=True, on_step=False)
            return loss

    text = CharDataset(TEXT, block_size)
    loader = DataLoader(text, batch_size=8, shuffle=True, num_workers=0, drop_last=True)
    tricks = [
        MuonCallback(),
        LRCurve("linear", warmup=2),
        CompiledModules(backend="eager"),
        SequenceLengthWarmup(start=4, multiple=4),
        ExactResume(),
    ]
    return (
        GPT(text.vocab_size, block_size),
        loader,
        tricks,
        {"max_epochs": 3, "gradient_clip_val": 1.0, "precision": "bf16-mixed"},
    )
