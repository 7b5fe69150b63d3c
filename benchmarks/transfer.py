"""What a pretrained network saves on new images: seconds until it is as accurate as training from scratch gets.

First a network of timm's learns CIFAR-10 (once; the weight file is used again). Then, for each seed, the same network is trained on the new
images from random weights, with one cycle, flips and small crops, and from those weights: the head alone on cached features; the head and the upper layers,
which begin at cached features too; head first, then everything; and everything at once. All arms run in turn, interleaved seed by seed, with the same order of samples. Seconds
are those of training, with the making of features, without evaluation and without pretraining, which is done once for any number of tasks. The target is the best
accuracy that the seed's run from scratch had in any epoch. The settings were chosen on training images held out (`--validation 400`). Run nothing beside it.

    python benchmarks/transfer.py cifar10.npz trashnet/
    python benchmarks/transfer.py cifar10.npz fashion_mnist.npz --share 0.1
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
import torch.nn.functional as F
from clock import Clock
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_speedups import (
    BatchAugmentation,
    FeatureCache,
    FreezeBackboneFinetune,
    InMemoryLoader,
    OneCycleMomentum,
    ProgressiveResizing,
    TransferClassifier,
)
from lightning_speedups.core.throughput import time_to_target
from lightning_speedups.measure.loading import load_data
from lightning_speedups.measure.machine import machine_facts, versions

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def crops(side):
    return BatchAugmentation(crop=side // 16, flip="random")


def upper(args):
    return FreezeBackboneFinetune(None, schedule={0: ["head", *args.upper.split(",")]})


# The options of the module, the tricks, and the option that says how many epochs.
ARMS = {
    "scratch": ({"weights": None}, lambda a: [OneCycleMomentum(a.lr), crops(a.side)], "epochs"),
    "head": ({}, lambda a: [FreezeBackboneFinetune(None, None), FeatureCache(), OneCycleMomentum(a.head_lr)], "epochs"),
    "upper": ({}, lambda a: [upper(a), FeatureCache(), OneCycleMomentum(a.upper_lr)], "upper_epochs"),
    "stages": (
        {},
        lambda a: [FreezeBackboneFinetune(None, 1, 1.0), OneCycleMomentum(a.lr), crops(a.side)],
        "finetuning_epochs",
    ),
    "everything": ({}, lambda a: [OneCycleMomentum(a.lr), crops(a.side)], "finetuning_epochs"),
}


def prepare(images, side):
    """Normalise to three channels of the side."""
    images = F.interpolate(images.float() / 255, size=(side, side), mode="bilinear", antialias=True)
    return ((images.expand(-1, 3, -1, -1) - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def fit(module, loader, test, args, callbacks, epochs, bar=False):
    clock = Clock("val_accuracy")
    Trainer(
        callbacks=[*callbacks, clock], max_epochs=epochs, accelerator=args.accelerator, devices=1, precision=args.precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=bar, enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(module, loader, DataLoader(TensorDataset(*test), 250))  # fmt: skip
    return clock


class Views(Dataset):
    """A random part of a random image's scale, which makes features that carry over."""

    def __init__(self, images, labels, side):
        self.images, self.labels = images, labels
        self.view = v2.Compose([
            v2.RandomResizedCrop(side, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()),
        ])  # fmt: skip

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.view(self.images[i]), self.labels[i]


def pretrain(args):
    data = load_data(args.source)
    seed_everything(0, verbose=False)
    train = DataLoader(Views(data.x_train, data.y_train, args.pretrain_side), 128, shuffle=True, drop_last=True)
    test = (prepare(data.x_test[::5], args.pretrain_side), data.y_test[::5])
    module = TransferClassifier(args.model, data.num_classes, weights=None, optimizer="sgd")
    tricks = [OneCycleMomentum(0.2), ProgressiveResizing(grow_from=0.1, full_from=0.7, multiple=16)]
    clock = fit(module.to(memory_format=torch.channels_last), train, test, args, tricks, args.pretrain_epochs, bar=True)
    torch.save(module.model.state_dict(), args.weights)
    facts = {"accuracy": clock.points[-1][1], "seconds": clock.points[-1][0]}
    facts |= {"epochs": args.pretrain_epochs, "side": args.pretrain_side}
    args.weights.with_suffix(".json").write_text(json.dumps(facts))


def draw(rows, path):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(ARMS):
        color = f"C{number}"
        these = [row for row in rows if row["arm"] == arm]
        for i, row in enumerate(these):
            seconds, accuracy = zip(*row["points"], strict=True)
            axes.plot(
                seconds, [100 * a for a in accuracy], color=color, lw=1, marker=".", ms=3, label=None if i else arm
            )
    axes.set(xlabel="seconds of training", ylabel="accuracy, %", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="CIFAR-10 as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument(
        "target", type=Path, help="new images: an .npz, or a folder with train/CLASS/* and test/CLASS/*"
    )
    parser.add_argument("--weights", type=Path, default=Path("pretrained.pt"), help="made when it is not there")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=64, help="of the new images")
    parser.add_argument("--pretrain-side", type=int, default=64)
    parser.add_argument("--pretrain-epochs", type=int, default=25)
    parser.add_argument("--share", type=float, default=1.0, help="of the new training images that are used")
    parser.add_argument("--test-samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=15, help="from scratch, and of the head")
    parser.add_argument("--finetuning-epochs", type=int, default=6)
    parser.add_argument("--upper-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--upper", default="layer2,layer3,layer4", help="layers that train with the head in `upper`")
    parser.add_argument("--upper-lr", type=float, default=8e-3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--validation", type=int, default=0, help="training images to hold out and to test on, for settings"
    )
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    if not args.weights.exists():
        pretrain(args)
    data = load_data(args.target, image_size=args.side if args.target.is_dir() else None)
    kept = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(0))
    kept = kept[: round(args.share * len(kept))]
    train = (prepare(data.x_train[kept], args.side), data.y_train[kept])
    shown = torch.randperm(len(data.y_test), generator=torch.Generator().manual_seed(0))[: args.test_samples]
    test = (prepare(data.x_test[shown], args.side), data.y_test[shown])
    if args.validation:
        test, train = (tuple(x[part] for x in train) for part in (slice(args.validation), slice(args.validation, None)))

    def run(arm, seed):
        options, tricks, epochs = ARMS[arm]
        seed_everything(seed, verbose=False)
        options = {"weights": args.weights, "smoothing": args.smoothing, **options}
        module = TransferClassifier(args.model, data.num_classes, **options)
        module = module.to(memory_format=torch.channels_last)
        loader = InMemoryLoader(train, batch_size=args.batch_size, shuffle=True, drop_last=True, seed=seed)
        clock = fit(module, loader, test, args, tricks(args), getattr(args, epochs))
        return {"arm": arm, "seed": seed, "points": clock.points}

    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {key: getattr(args, key).name for key in ("source", "target", "weights", "out")}
    facts |= {"images": len(train[1]), "pretraining": json.loads(args.weights.with_suffix(".json").read_text())}
    rows, arms = [], args.arms.split(",")
    for seed in track(range(args.seeds), "seeds"):
        rows += [run(arm, seed) for arm in random.Random(seed).sample(arms, len(arms))]
        best = {row["seed"]: max(a for _, a in row["points"]) for row in rows if row["arm"] == arms[0]}
        for row in rows:
            reached = time_to_target(row["points"], best[row["seed"]])
            row |= {"target": best[row["seed"]], "seconds_to_target": reached if reached < float("inf") else None}
        args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    draw(rows, args.out.with_suffix(".png"))
    base = {row["seed"]: row["seconds_to_target"] for row in rows if row["arm"] == arms[0]}
    for arm in arms:
        these = [row for row in rows if row["arm"] == arm]
        ratios = [base[row["seed"]] / row["seconds_to_target"] if row["seconds_to_target"] else 0.0 for row in these]
        print(
            f"{arm:10s} whole run {statistics.median(row['points'][-1][0] for row in these):7.1f} s, to the target "
            f"{[row['seconds_to_target'] for row in these]} s, {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}); "
            f"accuracy {100 * statistics.mean(row['points'][-1][1] for row in these):.1f} %, best "
            f"{100 * statistics.mean(max(a for _, a in row['points']) for row in these):.1f} %"
        )


if __name__ == "__main__":
    main()
