"""Batches of like length against random ones, each padded to its own longest text, at the same tokens a step.

The texts are the functions of Python's own standard library, which every installation has: bytes, cut at 1,024, of about log-normal length. A
small causal transformer predicts the next byte, so that padding at the end needs no mask; its loss is a mean over bytes. ``max_tokens`` is the
one with which an epoch has as many steps, so that a step has as many bytes on average, and both arms see the same functions equally often in as
many steps. Both start from the same weights; arms are interleaved, in a shuffled order, after a round that only warms up. Seconds are those of
the training steps with their loading; the pass that measures the lengths is told apart. Functions held out give the loss. Run nothing beside it.

    python benchmarks/length_batches.py [--seeds 5] [--epochs 2] [--functions 800]
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import random
import statistics
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.progress import track
from scipy.stats import ttest_1samp
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_speedups import LengthBatches
from lightning_speedups.core.length_batches import into_buckets
from lightning_speedups.measure.machine import machine_facts, versions


def functions(longest: int) -> list[bytes]:
    """The functions of the standard library's modules, in the order of their files."""
    found, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if path.parent.name in ("site-packages", "test", "tests", "idlelib", "lib2to3"):
            continue
        try:
            text = path.read_text(encoding="utf8")
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        found += [(ast.get_source_segment(text, node) or "").encode()[:longest] for node in nodes]
    return [text for text in found if len(text) > 1]


class Bytes(Dataset):
    """Texts as numbers, 1 for a byte of 0."""

    def __init__(self, texts):
        self.texts = [torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 1 for text in texts]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]


def collate(samples):
    return pad_sequence(samples, batch_first=True)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(x)


class ByteModel(LightningModule):
    """A causal transformer over bytes; counts what it is given."""

    def __init__(self, longest, width, layers, lr):
        super().__init__()
        self.lr, self.tokens, self.padded = lr, 0, 0
        self.embed, self.places = nn.Embedding(257, width, padding_idx=0), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 257))

    def losses(self, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        hidden = self.blocks(self.embed(inputs) + self.places.weight[: inputs.shape[1]])
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")

    def training_step(self, batch, batch_idx):
        tokens = int((batch[:, 1:] > 0).sum())
        self.tokens, self.padded = self.tokens + tokens, self.padded + batch[:, 1:].numel()
        return self.losses(batch) / tokens

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def loss_on(self, dataset):
        """The mean loss of a byte."""
        order = sorted(range(len(dataset)), key=lambda number: len(dataset[number]))
        with torch.inference_mode():
            batches = [collate([dataset[n] for n in order[begin : begin + 16]]) for begin in range(0, len(order), 16)]
            return sum(float(self.losses(batch)) for batch in batches) / sum(len(text) - 1 for text in dataset.texts)


class Clock(Callback):
    """Seconds from the first step's loading on, and of what came before."""

    def __init__(self):
        self.setup_seconds = self.seconds = 0.0

    def setup(self, trainer, pl_module, stage):
        self.setup_seconds = -time.perf_counter()

    def on_train_start(self, trainer, pl_module):
        self.setup_seconds += time.perf_counter()
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.seconds += time.perf_counter()


def budget_for(lengths, batch_size):
    """The smallest budget whose epochs have no more steps than those of random batches."""
    numbers, steps = torch.tensor(lengths, dtype=torch.float64), math.ceil(len(lengths) / batch_size)
    budget = max(max(lengths), sum(lengths) // steps)
    while into_buckets(numbers, max_tokens=budget).steps > steps:
        budget += max(1, budget // 200)
    return budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--functions", type=int, default=800)
    parser.add_argument("--longest", type=int, default=1024, help="bytes of a text")
    parser.add_argument("--batch-size", type=int, default=16, help="of the random batches")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "length_batches.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    texts = functions(args.longest)
    random.Random(0).shuffle(texts)
    held_out, kept = Bytes(texts[:300]), texts[300 : 300 + args.functions]
    budget = budget_for([len(text) for text in kept], args.batch_size)
    arms = {"random": lambda: [], "like length": lambda: [LengthBatches(max_tokens=budget)]}
    rows = []

    def fit(arm, seed, texts, epochs):
        seed_everything(seed, verbose=False)
        module, clock, callbacks = ByteModel(args.longest, args.width, args.layers, args.lr), Clock(), arms[arm]()
        trainer = Trainer(
            callbacks=[*callbacks, clock], max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Bytes(texts), args.batch_size, shuffle=True, collate_fn=collate))
        return {
            "arm": arm, "seed": seed, "seconds": round(clock.seconds, 3), "setup_seconds": round(clock.setup_seconds, 3),
            "steps": trainer.global_step, "tokens": module.tokens, "tokens_per_second": round(module.tokens / clock.seconds),
            "padding": round(1 - module.tokens / module.padded, 4), "val_loss": round(module.loss_on(held_out), 5),
        }  # fmt: skip

    for seed in track(range(-1, args.seeds), "seeds"):
        for arm in random.Random(seed).sample([*arms], len(arms)):
            if seed < 0:  # only warms up
                fit(arm, 0, kept[:200], 1)
            else:
                rows.append(fit(arm, seed, kept, args.epochs))
    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {"out": args.out.name, "max_tokens": str(budget)}
    args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    by_arm = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in arms}
    for arm, runs in by_arm.items():
        middle = {
            key: statistics.median(row[key] for row in runs.values())
            for key in next(iter(runs.values()))
            if key != "arm"
        }
        print(
            f"{arm:12s} {middle['tokens_per_second']:8,.0f} non-padding tokens/s, padding {middle['padding']:.0%}, {middle['seconds']:.1f} s, "
            f"{middle['steps']:.0f} steps, validation loss {middle['val_loss']:.3f}, before the first step {middle['setup_seconds']:.2f} s"
        )
    pairs = [(by_arm["random"][seed], by_arm["like length"][seed]) for seed in range(args.seeds)]
    ratios = [other["tokens_per_second"] / plain["tokens_per_second"] for plain, other in pairs]
    worse = [other["val_loss"] - plain["val_loss"] for plain, other in pairs]
    low, high = map(float, ttest_1samp(worse, 0).confidence_interval(0.95))
    print(
        f"like length: {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) the tokens/s of random batches"
    )
    print(f"validation loss {statistics.mean(worse):+.3f} (95 %: {low:+.3f} to {high:+.3f}) against random batches")


if __name__ == "__main__":
    main()
