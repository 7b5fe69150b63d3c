"""What each part of FastStart brings to a short training: accuracy after the same epochs, and seconds.

One recipe for all arms (SGD with one cycle, label smoothing, batched crops and, for photos, flips), which differ by the start alone. The arms
are interleaved seed by seed, and differences are paired. Seconds are those of training. Run nothing beside it.

    python benchmarks/starts.py [cifar10.npz] [--samples 10000] [--seeds 5] [--epochs 4] [--arms plain,frozen,...] [--validation 4000]
    python benchmarks/starts.py cifar10.npz --samples 5000 --model resnet18 --arms plain,residual,all --out benchmarks/results/starts_residual.json

Without a file the images are digit collages. `--validation N` holds N training images out and tests on those: for choosing settings, which
the test images must not.
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
from rich.progress import track
from scipy.stats import ttest_1samp
from torch import nn

from lightning_speedups import BatchAugmentation, FastStart, InMemoryLoader, LabelSmoothingLoss, OneCycleMomentum
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.loading import load_npz
from lightning_speedups.measure.machine import machine_facts, versions

ARMS = {
    "plain": None,
    "frozen": {},
    "trained": {"whiten": "trained"},
    "dirac": {"whiten": None, "dirac": True},
    "logits": {"whiten": None, "logit_scale": 1 / 9},
    "momentum": {"whiten": None, "batch_norm_momentum": 0.4},
    "weights": {"whiten": None, "fixed_norm_weights": True},
    "residual": {"whiten": None, "zero_residual": True},
    "frozen and dirac": {"dirac": True},
    "all": {"dirac": True, "logit_scale": 1 / 9, "batch_norm_momentum": 0.4},
}


def network(model, width, channels, classes):
    if model == "resnet18":
        from torchvision.models import resnet18

        net = resnet18(num_classes=classes)
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False), nn.Identity()
        return net
    return convnet(width // 2, channels, classes)


class Net(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net.to(memory_format=torch.channels_last), LabelSmoothingLoss(0.1)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def read(args):
    data = load_npz(args.data) if args.data else digit_collages(args.samples + args.validation, 2000)
    mean, std = ((getattr(data.x_train.float(), kind)((0, 2, 3))).view(1, -1, 1, 1) for kind in ("mean", "std"))
    train, test = (
        (((x.float() - mean) / std).contiguous(memory_format=torch.channels_last), y)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    )
    if n := args.validation:
        train, test = tuple(part[:-n] for part in train), tuple(part[-n:] for part in train)
    return tuple(part[: args.samples] for part in train), test, data.num_classes


def summary(rows, arms):
    """The difference of each arm from the first, paired by seed, with its interval."""
    found, base = {}, {row["seed"]: row for row in rows if row["arm"] == arms[0]}
    for arm in arms:
        these = [row for row in rows if row["arm"] == arm and row["seed"] in base]
        points = [100 * (row["points"][-1][1] - base[row["seed"]]["points"][-1][1]) for row in these]
        ratios = [row["points"][-1][0] / base[row["seed"]]["points"][-1][0] for row in these]
        interval = ttest_1samp(points, 0).confidence_interval(0.95) if len(points) > 1 and arm != arms[0] else (0, 0)
        found[arm] = {
            "accuracy": round(100 * statistics.mean(row["points"][-1][1] for row in these), 2),
            "seconds": round(statistics.median(row["points"][-1][0] for row in these), 2),
            "difference": round(statistics.mean(points), 2), "confidence_95": [round(float(end), 2) for end in interval],
            "time_ratio": [round(some(ratios), 3) for some in (statistics.median, min, max)],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--model", choices=("convnet", "resnet18"), default="convnet")
    parser.add_argument("--width", type=int, default=32, help="of the convnet's first stage")
    for name, default in {"samples": 10_000, "seeds": 5, "epochs": 4, "batch-size": 250, "validation": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-lr", type=float, default=0.4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--arms", default="plain,frozen,trained,dirac,logits,momentum,weights,frozen and dirac,all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "starts.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    train, test, classes = read(args)

    def fit(arm, seed, **limits):
        seed_everything(seed, verbose=False)
        module, clock = Net(network(args.model, args.width, train[0].shape[1], classes)), Clock()
        tricks = [OneCycleMomentum(args.max_lr, pct_start=0.25)]
        tricks += [BatchAugmentation(crop=2, flip="alternating" if args.data else None)]
        tricks += [] if ARMS[arm] is None else [FastStart(**ARMS[arm])]
        loaders = (
            InMemoryLoader(train, batch_size=args.batch_size, shuffle=True, drop_last=True, seed=seed),
            InMemoryLoader(test, batch_size=1000),
        )
        Trainer(
            callbacks=[*tricks, clock], max_epochs=args.epochs, accelerator="cpu", precision=args.precision, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **limits,
        ).fit(module, *loaders)  # fmt: skip
        return {"arm": arm, "seed": seed, "points": clock.points}

    arms, rows = args.arms.split(","), []
    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {"data": args.data.name if args.data else "digit collages", "out": args.out.name}
    for arm in arms:  # what torch prepares once is prepared
        fit(arm, 0, limit_train_batches=3, limit_val_batches=1)
    for seed in track(range(args.seeds), "seeds"):
        rows += [fit(arm, seed) for arm in random.Random(seed).sample(arms, len(arms))]
        found = summary(rows, arms)
        args.out.write_text(json.dumps({"found": found, **facts, "runs": rows}, indent=1) + "\n")
    for arm, one in found.items():
        low, high = one["confidence_95"]
        print(
            f"{arm:16s} {one['accuracy']:.2f} %, {one['difference']:+.2f} points (95 %: {low:+.2f} to {high:+.2f}), "
            f"{one['seconds']:.1f} s, {one['time_ratio'][0]:.3f} of {arms[0]}'s ({one['time_ratio'][1]:.3f} to {one['time_ratio'][2]:.3f})"
        )


if __name__ == "__main__":
    main()
