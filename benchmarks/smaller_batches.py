"""What smaller images and fewer samples save: ProgressiveResizing and SubsetTraining on CIFAR-10, in the same number of epochs.

One recipe for all arms (a small convolutional network, SGD with one cycle, label smoothing, batched crops and flips), which differ by the
trick alone, and plain training in three quarters of the epochs, which is what a trick has to beat. The arms are interleaved seed by seed.
Seconds are those of training; evaluation is left out. Run nothing beside it.

    python benchmarks/smaller_batches.py cifar10.npz [--seeds 5] [--epochs 8] [--arms plain,resizing,...] [--validation 4000]

`--validation N` holds N training images out and tests on those: for choosing settings, which the test images must not.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import warnings
from pathlib import Path

import torch
from clock import Clock
from convnet import convnet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lightning_speedups import (
    AllocatorTuning,
    BatchAugmentation,
    LabelSmoothingLoss,
    OneCycleMomentum,
    ProgressiveResizing,
    SubsetTraining,
)
from lightning_speedups.measure.loading import load_npz
from lightning_speedups.measure.machine import machine_facts, versions

KEEP = 0.65


def crops():
    return BatchAugmentation(crop=2, flip="alternating")


ARMS = {  # tricks, and the share of the epochs
    "plain": (lambda: [crops()], 1),
    "short": (lambda: [crops()], 0.75),
    "as they are": (lambda: [], 1),
    "resizing": (lambda: [crops(), ProgressiveResizing()], 1),
    "longer": (lambda: [crops(), ProgressiveResizing()], 1.25),
    "early": (lambda: [crops(), ProgressiveResizing(grow_from=0.2, full_from=0.5)], 1),
    "later": (lambda: [crops(), ProgressiveResizing(full_from=0.6)], 1),
    "late": (lambda: [crops(), ProgressiveResizing(grow_from=0.3, full_from=0.8)], 1),
    "mild": (lambda: [crops(), ProgressiveResizing(start=0.75)], 1),
    "filled": (lambda: [crops(), ProgressiveResizing(fill_batch=True)], 1),
    "filled sqrt": (lambda: [crops(), ProgressiveResizing(fill_batch=True, rule="sqrt")], 1),
    "infobatch": (lambda: [crops(), SubsetTraining(KEEP)], 1),
    "random": (lambda: [crops(), SubsetTraining(KEEP, method="random")], 1),
    "loss": (lambda: [crops(), SubsetTraining(KEEP, method="loss")], 1),
    "both": (lambda: [crops(), ProgressiveResizing(), SubsetTraining(KEEP)], 1),
}


class Images(Dataset):
    """Whole batches by their indices."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        return self.images[indices], self.labels[indices]


def batches(images, labels, size, train):
    data = Images(images, labels)
    order = RandomSampler(data) if train else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(order, size, drop_last=train))


class Net(LightningModule):
    def __init__(self, width=64):
        super().__init__()
        self.layers = convnet(width // 2).to(memory_format=torch.channels_last)
        self.loss = LabelSmoothingLoss(0.1)

    def forward(self, images):
        return self.layers(images) / 9

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def draw(rows, path):
    """Draw accuracy over seconds, one cross for each arm; a trick earns something above the line of fewer epochs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, places = figure.add_subplot(), {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        these = [row for row in rows if row["arm"] == arm]
        seconds, accuracy = ([scale * row[key] for row in these] for key, scale in (("seconds", 1), ("accuracy", 100)))
        places[arm] = x, y = statistics.median(seconds), statistics.mean(accuracy)
        xerr = [[x - min(seconds)], [max(seconds) - x]]
        yerr = [[y - min(accuracy)], [max(accuracy) - y]]
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, marker="o", capsize=2, label=arm)
    if {"plain", "short"} <= set(places):
        axes.plot(*zip(places["short"], places["plain"], strict=True), color="grey", ls=":", label="fewer epochs")
    axes.set(xlabel="seconds of training (median, range)", ylabel="accuracy, % (mean, range)")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--max-lr", type=float, default=0.4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--arms", default="plain,short,resizing,mild,infobatch,random,loss")
    parser.add_argument("--samples", type=int, default=None, help="training images to use")
    parser.add_argument("--validation", type=int, default=0, help="training images to hold out and to test on")
    parser.add_argument(
        "--every-epoch", action="store_true", help="evaluate after each epoch, not after the last alone"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "smaller_batches.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = load_npz(args.data)
    mean = data.x_train.float().mean((0, 2, 3)).view(3, 1, 1)
    std = data.x_train.float().std((0, 2, 3)).view(3, 1, 1)
    x_train, x_test = (
        ((x.float() - mean) / std).contiguous(memory_format=torch.channels_last) for x in (data.x_train, data.x_test)
    )
    y_train, y_test = data.y_train, data.y_test
    if args.validation:
        x_test, y_test = x_train[-args.validation :], y_train[-args.validation :]
        x_train, y_train = x_train[: -args.validation], y_train[: -args.validation]
    x_train, y_train = x_train[: args.samples], y_train[: args.samples]

    def fit(arm, seed):
        seed_everything(seed, verbose=False)
        clock, (make, share) = Clock(), ARMS[arm]
        epochs = round(share * args.epochs)
        trainer = Trainer(
            callbacks=[OneCycleMomentum(args.max_lr, pct_start=0.25), AllocatorTuning(), *make(), clock], max_epochs=epochs, accelerator="cpu", precision="bf16-mixed",
            check_val_every_n_epoch=1 if args.every_epoch else epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        test = batches(x_test, y_test, 1000, train=False)
        trainer.fit(Net(args.width), batches(x_train, y_train, args.batch_size, train=True), test)
        return {
            "arm": arm, "seed": seed, "seconds": round(clock.seconds, 3), "steps": trainer.global_step,
            "samples": clock.samples, "accuracy": round(clock.points[-1][1], 4), "points": clock.points,
        }  # fmt: skip

    arms, rows = args.arms.split(","), []
    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {"data": args.data.name, "out": args.out.name}
    for seed in track(range(args.seeds), "seeds"):
        for arm in random.Random(seed).sample(arms, len(arms)):
            rows.append(fit(arm, seed))
            args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    draw(rows, args.out.with_suffix(".png"))
    base = {row["seed"]: row for row in rows if row["arm"] == arms[0]}
    for arm in arms:
        these = [row for row in rows if row["arm"] == arm]
        seconds = statistics.median(row["seconds"] for row in these)
        ratios = [base[row["seed"]]["seconds"] / row["seconds"] for row in these]
        gains = [100 * (row["accuracy"] - base[row["seed"]]["accuracy"]) for row in these]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        print(
            f"{arm:10s} {seconds:6.1f} s, {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{100 * statistics.mean(row['accuracy'] for row in these):.2f} %, {statistics.mean(gains):+.2f} ± {spread:.2f} points"
        )


if __name__ == "__main__":
    main()
