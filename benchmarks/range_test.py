"""Which pick of the range test makes a good peak of one cycle: the test's suggestions and a grid of rates, each trained.

For each optimizer and seed: one sweep, what can be read off it ("minimum" is the rate of the lowest smoothed loss itself, of which the test
suggests a fifth, within bounds: see peak_rules.py), and one run of OneCycleMomentum to each of these and to each rate of a grid. The images
are digit collages, the network is a small convolutional one. Seconds play no part, so other work beside it does no harm.

    python benchmarks/range_test.py [--seeds 3] [--epochs 8]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import LRRangeTest, OneCycleMomentum
from lightning_speedups.core.range_test import suggest
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.machine import machine_facts, versions

GRIDS = {"SGD": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "AdamW": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)}
QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}  # fmt: skip


def block(channels, wider):
    return nn.Sequential(nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU())


class Classifier(LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(
            block(1, 24), block(24, 48), block(48, 96), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(96, 10)
        )
        self.kind = optimizer

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.kind == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return torch.optim.AdamW(self.parameters(), lr=0.001, weight_decay=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "range_test.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = digit_collages(2000, 1000)
    images = TensorDataset(data.x_train / 255, data.y_train)

    def prepare(kind, seed):
        seed_everything(seed, verbose=False)
        return Classifier(kind), DataLoader(images, batch_size=64, shuffle=True, drop_last=True)

    def accuracy(kind, seed, peak):
        module, loader = prepare(kind, seed)
        Trainer(callbacks=[OneCycleMomentum(peak)], max_epochs=args.epochs, **QUIET).fit(module, loader)
        with torch.no_grad():
            right = module.eval().net(data.x_test / 255).argmax(1) == data.y_test
        return round(right.float().mean().item(), 4)

    rows = []
    for kind, seed in track([(kind, seed) for kind in GRIDS for seed in range(args.seeds)], "optimizers and seeds"):
        module, loader = prepare(kind, seed)
        result = LRRangeTest().run(Trainer(**QUIET), module, loader)
        smoothed, kept = result.smoothed, range(len(result.smoothed) // 10, len(result.smoothed) - 5)
        picks = {"minimum": result.rates[min(kept, key=smoothed.__getitem__)]}
        picks |= {method: suggest(result.rates, smoothed, method) for method in ("valley", "steepest")}
        peaks = {**picks, **{f"{rate:g}": rate for rate in GRIDS[kind]}}
        rows += [
            {"optimizer": kind, "seed": seed, "peak": name, "rate": rate, "accuracy": accuracy(kind, seed, rate)}
            for name, rate in peaks.items()
        ]
    for kind in GRIDS:
        for name in dict.fromkeys(row["peak"] for row in rows if row["optimizer"] == kind):
            these = [row for row in rows if (row["optimizer"], row["peak"]) == (kind, name)]
            rates, found = [row["rate"] for row in these], [100 * row["accuracy"] for row in these]
            print(
                f"{kind:6s} {name:9s} rate {min(rates):.2g} to {max(rates):.2g}: {statistics.mean(found):5.1f} % ({min(found):.1f} to {max(found):.1f})"
            )
    facts = {"machine": machine_facts(), "versions": versions(), "epochs": args.epochs}
    args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
