"""What StopAtTarget saves, and what its last decay brings: a whole run, one that ends at the target, one that anneals first.

A small convolutional network on digit collages at a constant rate, three arms interleaved seed by seed. The target is an accuracy on the
test images that the whole run reaches on its way. Run nothing beside it.

    python benchmarks/stop_at_target.py [--seeds 5] [--epochs 20] [--target 0.6]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_speedups import StopAtTarget
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.machine import machine_facts, versions


def block(channels, wider):
    return nn.Sequential(nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU())


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            block(1, 24), block(24, 48), block(48, 96), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(96, 10)
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stop_at_target.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = digit_collages(2000, 1000)
    train, test = (TensorDataset(x / 255, y) for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)))
    arms = {
        "whole run": lambda: [],
        "now": lambda: [StopAtTarget("accuracy", args.target, "max")],
        "anneal": lambda: [StopAtTarget("accuracy", args.target, "max", finish="anneal", anneal="1 epochs")],
    }

    def fit(arm, seed):
        seed_everything(seed, verbose=False)
        callbacks = arms[arm]()
        trainer = Trainer(
            callbacks=callbacks, max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 500))
        seconds = time.perf_counter() - started
        accuracy = round(float(trainer.callback_metrics["accuracy"]), 4)
        return {"arm": arm, "seed": seed, "seconds": seconds, "epochs": trainer.current_epoch, "accuracy": accuracy}

    rows = []
    for seed in track([args.seeds, *range(args.seeds)], "seeds"):
        found = [fit(arm, seed) for arm in random.Random(seed).sample(list(arms), len(arms))]
        rows += found if seed < args.seeds else []  # the first round only warms up
    for arm in arms:
        these = [row for row in rows if row["arm"] == arm]
        seconds, accuracy = ([row[key] for row in these] for key in ("seconds", "accuracy"))
        print(
            f"{arm:10s} {statistics.median(seconds):5.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"{100 * statistics.mean(accuracy):.1f} % ({100 * min(accuracy):.1f} to {100 * max(accuracy):.1f})"
        )
    facts = {"machine": machine_facts(), "versions": versions(), "epochs": args.epochs, "target": args.target}
    args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
