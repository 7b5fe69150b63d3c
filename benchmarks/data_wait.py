"""What LoaderTuning and PrefetchToDevice save: how long training waits for data, and an epoch takes, before and after.

Three workloads, each in all arms, shuffled round by round: photos from a folder with random crops and flips, the same
photos without anything random, and MNIST-size tensors under the MLP of Lightning's tutorial.
Waits are Lightning's own (SimpleProfiler, around each request for a batch). The first epochs, in which workers start
and are tried, are left out. Run nothing beside it.

    python benchmarks/data_wait.py trashnet/ [--rounds 3] [--accelerator auto]

The photos are a folder with train/CLASS/*, here TrashNet's; without a folder only the tensors are measured.
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
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.profilers import SimpleProfiler
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from lightning_speedups import LoaderTuning, PrefetchToDevice, TransferClassifier
from lightning_speedups.measure.machine import machine_facts, versions

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARMS = {
    "plain": lambda: [],
    "cpus": lambda: [LoaderTuning()],
    "measure": lambda: [LoaderTuning("measure")],
    "measure and prefetch": lambda: [LoaderTuning("measure"), PrefetchToDevice()],
}


class MLP(LightningModule):
    """That of Lightning's tutorial on MNIST."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(28 * 28, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Epochs(Callback):
    """Times epochs, and notes the workers of each."""

    def __init__(self):
        self.seconds, self.batches, self.workers = [], [], []

    def on_train_epoch_start(self, trainer, *_):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer, *_):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.since)
        self.batches.append(trainer.num_training_batches)
        self.workers.append(trainer.train_dataloader.num_workers)


def workloads(args):
    """What each workload trains: functions that return a module and a loader."""

    def photos(*transforms):
        transform = Compose([*transforms, ToTensor(), Normalize(MEAN, STD)])
        dataset = ImageFolder(str(args.data / "train"), transform)
        module = TransferClassifier(args.model, len(dataset.classes), weights=None)
        return module, DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)

    def tensors():
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (args.samples,), generator=generator)
        return MLP(), DataLoader(
            TensorDataset(torch.rand(args.samples, 1, 28, 28, generator=generator), labels), 64, shuffle=True
        )

    found = {"tensors": tensors}
    if args.data is not None:
        found["photos, random crops"] = lambda: photos(RandomResizedCrop(args.side), RandomHorizontalFlip())
        found["photos"] = lambda: photos(Resize(args.side), CenterCrop(args.side))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="photos: a folder with train/CLASS/*")
    parser.add_argument("--model", default="test_resnet", help="timm's name of the network for photos")
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32, help="photos in a batch")
    parser.add_argument("--samples", type=int, default=60_000, help="MNIST-size tensors")
    parser.add_argument("--epochs", type=int, default=3, help="that are timed, after the first ones")
    parser.add_argument("--skip", type=int, default=3, help="first epochs that are not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch: CPUs on which training computes"
    )
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_wait.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    arms, works, rows = args.arms.split(","), workloads(args), []

    def fit(work, arm):
        seed_everything(0, verbose=False)
        module, loader = works[work]()
        epochs, profiler = Epochs(), SimpleProfiler()
        Trainer(
            callbacks=[*ARMS[arm](), epochs], max_epochs=args.skip + args.epochs, accelerator=args.accelerator, devices=1, profiler=profiler,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, loader)  # fmt: skip
        waits = profiler.recorded_durations[FETCH][sum(epochs.batches[: args.skip]) :]
        seconds = epochs.seconds[args.skip :]
        return {
            "workload": work, "arm": arm, "seconds": [round(one, 4) for one in seconds], "waited": round(sum(waits), 4),
            "share": round(sum(waits) / sum(seconds), 4), "workers": epochs.workers[-1],
        }  # fmt: skip

    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {"data": args.data.name if args.data else "none", "out": args.out.name}
    for turn in track(range(args.rounds), "rounds"):
        pairs = [(work, arm) for work in works for arm in arms]
        rows += [{"round": turn, **fit(*pair)} for pair in random.Random(turn).sample(pairs, len(pairs))]
        args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    for work in works:
        these = [row for row in rows if row["workload"] == work]
        plain = {row["round"]: statistics.median(row["seconds"]) for row in these if row["arm"] == arms[0]}
        for arm in arms:
            mine = [row for row in these if row["arm"] == arm]
            ratios = [plain[row["round"]] / statistics.median(row["seconds"]) for row in mine]
            print(
                f"{work:22s} {arm:22s} {statistics.median(one for row in mine for one in row['seconds']):7.2f} s an epoch, "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), waits "
                f"{statistics.median(row['share'] for row in mine):.0%}, workers {sorted({row['workers'] for row in mine})}"
            )


if __name__ == "__main__":
    main()
