"""Which reading of a range test's sweep makes a safe peak of one cycle: eight small networks under SGD and AdamW.

For each network, optimizer and seed: one run at the module's own constant rate, three sweeps, and one cycle to each rate that a rule picks.
What counts is the training loss at the end (mean of the last tenth of the steps), as a share of that at the constant rate, both averaged over
the seeds. A rule is safe if no share is above 1.1; the best of the safe ones has the lowest mean. Seconds play no part, so other work beside
it does no harm.

    python benchmarks/peak_rules.py [--seeds 3] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise, product, takewhile
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import OneCycleMomentum
from lightning_speedups.attach.range_test import run_range_test
from lightning_speedups.core.range_test import Sweep, falls, safe_peak, smooth, steepest, sweep_rate, valley
from lightning_speedups.measure.digits import digit_collages, digit_sources
from lightning_speedups.measure.machine import machine_facts, versions

OWN = {"SGD": 0.05, "AdamW": 0.001}  # what one writes who does not tune
SWEEPS = 3
LOST = 1e6  # the loss of a run that ends in NaN
RUINED = 100.0  # the highest share that counts
QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    "accelerator": "cpu", "devices": 1,
}  # fmt: skip


class Vit(nn.Module):
    """Patches of 2 × 2, two layers, the mean of all tokens."""

    def __init__(self):
        super().__init__()
        self.patches, self.place = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.place).mean(1))


class Characters(nn.Module):
    """A causal transformer; no norm after the last layer."""

    def __init__(self, letters, length=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(letters, 32), nn.Parameter(torch.zeros(length, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x):
        return self.head(self.layers(self.embed(x) + self.place, mask=self.mask, is_causal=True)).mT


class Reader(nn.Module):
    """A GRU over the characters."""

    def __init__(self, letters):
        super().__init__()
        self.embed, self.gru, self.head = (
            nn.Embedding(letters, 24),
            nn.GRU(24, 48, batch_first=True),
            nn.Linear(48, letters),
        )

    def forward(self, x):
        return self.head(self.gru(self.embed(x))[0]).mT


def block(channels, wider):
    return nn.Sequential(nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU())


def conv_net():
    return nn.Sequential(
        block(1, 16), block(16, 32), block(32, 64), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def le_net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(144, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def perceptron(*widths):
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def texts():
    from sklearn import datasets

    names = ("digits", "wine", "breast_cancer", "diabetes", "iris", "linnerud")
    text = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(letter) for letter in text])
    places = torch.randint(0, len(codes) - 33, (1024,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([codes[place : place + 33] for place in places])
    return len(letters), TensorDataset(windows[:, :-1], windows[:, 1:])


@cache
def networks():
    """Name -> (network, loss, data, batch size, epochs)."""
    from sklearn.datasets import load_diabetes

    collages = digit_collages(1500, 10)
    images = TensorDataset(collages.x_train / 255, collages.y_train)
    (digits, classes), _ = digit_sources()
    letters, text = texts()
    x, y = (torch.from_numpy(part).float() for part in load_diabetes(return_X_y=True))
    table = TensorDataset((x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None])
    entropy, square = F.cross_entropy, F.mse_loss
    return {
        "conv net": (conv_net, entropy, images, 50, 5),
        "LeNet": (le_net, entropy, images, 50, 8),
        "MLP": (lambda: perceptron(64, 64, 64, 10), entropy, TensorDataset(digits, classes), 32, 6),
        "autoencoder": (lambda: perceptron(64, 64, 3, 64, 64), square, TensorDataset(digits, digits.flatten(1)), 32, 6),
        "ViT": (Vit, entropy, TensorDataset(digits[:, None], classes), 32, 6),
        "transformer": (lambda: Characters(letters), entropy, text, 32, 4),
        "GRU": (lambda: Reader(letters), entropy, text, 32, 4),
        "regression": (lambda: perceptron(10, 32, 32, 1), square, table, 16, 8),
    }


class Module(LightningModule):
    def __init__(self, network, loss, optimizer):
        super().__init__()
        self.net, self.loss, self.kind, self.losses = network(), loss, optimizer, []

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        if self.kind == "SGD":
            return torch.optim.SGD(self.parameters(), OWN["SGD"], momentum=0.9)
        return torch.optim.AdamW(self.parameters(), OWN["AdamW"])


def lowest(losses, beta=0.98):
    """The rate of the lowest smoothed loss, as a place among the rates."""
    smoothed = smooth(losses, beta)
    kept = range(len(smoothed) // 10, len(smoothed) - 5)
    return min(kept, key=smoothed.__getitem__)


def lowest_without_lag(losses, reach=5):
    """The same of a mean over both sides, which does not lag behind the loss."""

    def mean(place):
        near = range(max(place - reach, 0), min(place + reach + 1, len(losses)))
        weights = [reach + 1 - abs(place - other) for other in near]
        return sum(weight * losses[other] for weight, other in zip(weights, near, strict=True)) / sum(weights)

    return min(range(len(losses) // 10, len(losses) - 5), key=mean)


def field(rates, losses, pick):
    smoothed = smooth(losses)
    kept = slice(len(smoothed) // 10, len(smoothed) - 5)
    return pick(rates[kept], smoothed[kept])


def bounded(pick, own):
    return min(max(pick, own), 10 * own)


# each takes the rates, the losses of three sweeps, and the module's own rate
RULES = {
    "lowest (the rule until now)": lambda r, s, own: r[lowest(s[0])],
    "valley": lambda r, s, own: field(r, s[0], valley),
    "steepest": lambda r, s, own: field(r, s[0], steepest),
    "lowest / 5": lambda r, s, own: r[lowest(s[0])] / 5,
    "lowest / 10": lambda r, s, own: r[lowest(s[0])] / 10,
    "lowest / 5, beta 0.9": lambda r, s, own: r[lowest(s[0], 0.9)] / 5,
    "lowest / 5, median of three sweeps": lambda r, s, own: statistics.median(r[lowest(one)] for one in s) / 5,
    "lowest without lag / 2": lambda r, s, own: r[lowest_without_lag(s[0])] / 2,
    "steepest, at most lowest / 5": lambda r, s, own: min(field(r, s[0], steepest), r[lowest(s[0])] / 5),
    "3 × own": lambda r, s, own: 3 * own,
    "lowest, 1 to 10 × own": lambda r, s, own: bounded(r[lowest(s[0])], own),
    "steepest, 1 to 10 × own": lambda r, s, own: bounded(field(r, s[0], steepest), own),
    "lowest / 10, 1 to 10 × own": lambda r, s, own: bounded(r[lowest(s[0])] / 10, own),
    "lowest without lag / 2, 1 to 10 × own": lambda r, s, own: bounded(r[lowest_without_lag(s[0])] / 2, own),
    "lowest / 5, 1 to 10 × own": lambda r, s, own: bounded(r[lowest(s[0])] / 5, own),
    "lowest / 5, 2 to 10 × own (the rule)": lambda r, s, own: safe_peak(r[lowest(s[0])], [own]),
}


def measure(seed, name, optimizer, rules):
    """Sweep with one network under one optimizer from one seed, and train it to each pick."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    network, loss, data, batch, epochs = networks()[name]

    def prepare(order=0):
        seed_everything(seed, verbose=False)
        module = Module(network, loss, optimizer)
        generator = torch.Generator().manual_seed(seed + 1000 * order)
        return module, DataLoader(data, batch, shuffle=True, drop_last=True, generator=generator)

    def end(callbacks):
        module, loader = prepare()
        Trainer(callbacks=callbacks, max_epochs=epochs, **QUIET).fit(module, loader)
        last = torch.stack(module.losses[-max(len(module.losses) // 10, 1) :]).mean().item()
        return last if last < LOST else LOST  # NaN is not below

    sweeps = []
    for order in range(SWEEPS):
        module, loader = prepare(order)
        sweeps.append(list(takewhile(math.isfinite, run_range_test(Trainer(**QUIET), module, Sweep(), loader)[1])))
    rates = [sweep_rate(step, 100, Sweep().min_lr, Sweep().max_lr) for step in range(100)]
    found, ends = {}, {}
    for rule in rules:
        pick = RULES[rule]
        rate = min(rates, key=lambda rate: abs(math.log(rate / pick(rates, sweeps, OWN[optimizer]))))
        if rate not in ends:
            ends[rate] = end([OneCycleMomentum(rate)])
        found[rule] = {"rate": rate, "end": ends[rate]}
    return {
        "network": name, "optimizer": optimizer, "seed": seed, "own_end": end([]), "falls": [falls(sweep) for sweep in sweeps],
        "picks": found, "sweeps": [[float(f"{value:.5g}") for value in sweep] for sweep in sweeps],
    }  # fmt: skip


def shares(cells, rule):
    """(Network, optimizer) -> loss at the end, as a share of that at the module's own constant rate."""
    found = {}
    for key in {(cell["network"], cell["optimizer"]) for cell in cells}:
        these = [cell for cell in cells if (cell["network"], cell["optimizer"]) == key]
        share = sum(cell["picks"][rule]["end"] for cell in these) / sum(cell["own_end"] for cell in these)
        found[key] = min(share, RUINED)
    return found


def summary(cells):
    rows = []
    for rule in cells[0]["picks"]:
        of = shares(cells, rule)
        worst = max(of, key=of.__getitem__)
        rows.append({
            "rule": rule, "mean": round(statistics.geometric_mean(of.values()), 3), "worst": round(of[worst], 3), "where": " ".join(worst),
            "too high": sum(share > 1.1 for share in of.values()), "of": len(of),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--rules", help="numbers of the rules in the order of RULES, from 0 on, with commas; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peak_rules.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(RULES)
    rules = names if args.rules is None else [names[int(number)] for number in args.rules.split(",")]
    facts = {"machine": machine_facts(), "versions": versions(), "own_rates": OWN}
    cells = []
    jobs = zip(*product(range(args.seeds), networks(), OWN, [rules]), strict=True)
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for cell in pool.map(measure, *jobs):
            cells.append(cell)
            sound = [cell for cell in cells if cell["falls"][0]]  # the range test refuses the others
            found = {"all sweeps": summary(cells), "without flat sweeps": summary(sound or cells)}
            lines = ",\n  ".join(json.dumps(cell) for cell in cells)
            args.out.write_text(
                f'{json.dumps({**facts, "rules": found}, indent=1)[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'
            )
            print(*(cell[key] for key in ("network", "optimizer", "seed", "own_end", "falls")), flush=True)
    for name, rows in found.items():
        print(f"\n{name}")
        for row in rows:
            print(*row.values(), sep=", ")
    print("flat:", [(cell["network"], cell["optimizer"], cell["seed"]) for cell in cells if cell not in sound])


if __name__ == "__main__":
    main()
