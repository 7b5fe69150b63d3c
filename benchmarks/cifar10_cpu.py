"""CIFAR-10 to 90 % test accuracy on a CPU: the same network trained plainly, by a careful user, and by the fast stack.

    python benchmarks/cifar10_cpu.py cifar10.npz [--seeds 8] [--arms plain,tuned,fast,raw] [--few plain,tuned --few-seeds 2]
    python benchmarks/cifar10_cpu.py cifar10.npz --ablation [--seeds 3]
    python benchmarks/cifar10_cpu.py cifar10.npz --validation 5000 ...     (for choosing settings: the test images are not touched)

Arms: `plain` (float32, batches of 128, torchvision's transforms in a DataLoader, SGD at a constant rate that drops tenfold once near the end),
`tuned` (what a careful user does without this package: torch's one-cycle, torch's label smoothing, bfloat16 by flag), `fast` (the recipe
"vision-fast" in a plain Trainer), `raw` (the same by hand, without Lightning and without this package). The arms of a seed are interleaved. The result file is
written after every run, and a run that is in it is not repeated: stop and go on as you like. Seconds are those of training, without evaluation
and without reading the data. No test-time augmentation. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from clock import Clock
from convnet import convnet
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lightning_speedups.core.throughput import time_to_target
from lightning_speedups.measure.loading import load_npz
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.recipes import recipe

TARGET = 0.9
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's training images
EPOCHS = {"plain": 16, "tuned": 10, "fast": 6, "raw": 6}
DROP = 12  # epochs of plain before its rate drops


def normalized(images):
    return (images.float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Net(LightningModule):
    """An ordinary module; images come as uint8 or normalised already."""

    def __init__(self, loss, schedule=None, lr=0.02, width=32):
        super().__init__()
        self.net, self.loss, self.schedule, self.lr = convnet(width), loss, schedule, lr

    def forward(self, images):
        return self.net(normalized(images) if images.dtype == torch.uint8 else images)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if self.schedule is None:
            return optimizer
        scheduler, interval = self.schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class Photos(Dataset):
    """One image at a time, through torchvision's transforms."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def photo_loader(images, labels, batch_size):
    scale = v2.Compose([v2.ToDtype(torch.float32), v2.Normalize(MEAN, STD)])
    transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), scale])
    return DataLoader(Photos(images, labels, transform), batch_size, shuffle=True, drop_last=True)


def fit(module, loader, test, epochs, every_epoch, callbacks=(), stop_at=math.inf, **arguments):
    clock = Clock(stop_at=stop_at, with_setup=True)
    settings = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": epochs, "check_val_every_n_epoch": 1 if every_epoch else epochs,
    }  # fmt: skip
    Trainer(callbacks=[clock, *callbacks], **(settings | arguments)).fit(module, loader, test)
    return clock.points


def plain(data, test, epochs):
    """Ends when it has reached the target: nothing says beforehand when a constant rate will."""
    drop = lambda optimizer: (torch.optim.lr_scheduler.MultiStepLR(optimizer, [DROP]), "epoch")  # noqa: E731
    return fit(Net(nn.CrossEntropyLoss(), drop), photo_loader(*data, 128), test, epochs, True, stop_at=TARGET)


def tuned(data, test, epochs, lr=0.2, batch_size=128):
    steps = epochs * (len(data[1]) // batch_size)
    cycle = lambda optimizer: (torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.25), "step")  # noqa: E731
    module = Net(nn.CrossEntropyLoss(label_smoothing=0.1), cycle)
    return fit(module, photo_loader(*data, batch_size), test, epochs, True, precision="bf16-mixed")


def fast(data, test, epochs, without=()):
    """Nothing but the recipe; an ablation takes callbacks out of it by name."""
    module = Net(nn.CrossEntropyLoss())
    stack = recipe("vision-fast", data, epochs=epochs)
    if "LabelSmoothingLoss" not in without:
        module.loss = stack.loss
    callbacks = [one for one in stack.trainer.pop("callbacks") if type(one).__name__ not in without]
    if "bf16" in without:
        stack.trainer["precision"] = "32-true"
    return fit(module, stack.loader, test, epochs, False, callbacks, **stack.trainer)


ABLATION = ["MuonCallback", "FastStart", "LRCurve", "BatchAugmentation", "ProgressiveResizing", "SubsetTraining",
            "ChannelsLast", "AllocatorTuning", "LabelSmoothingLoss", "bf16"]  # fmt: skip


def orthogonal(update, steps=3):
    x = update.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).float()


def whitened(images, count):
    patches = F.unfold(images, 3).transpose(1, 2).reshape(-1, 27).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.flip(0)[: count // 2].reshape(-1, 3, 3, 3).float()
    return torch.cat([filters, -filters])


def crops(images, pad=2):
    padded = F.pad(images, [pad] * 4, mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)
    rows, columns = torch.randint(2 * pad + 1, (2, len(images)))
    return padded[torch.arange(len(images)), :, rows, columns]


def accuracy(net, test):
    net.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = sum(int((net(normalized(x)).argmax(1) == y).sum()) for x, y in test)
    net.train()
    return right / sum(len(y) for _, y in test)


def raw(
    data,
    test,
    epochs,
    keep=0.5,
    sides=(20, 24, 32),
    ends=(0.3, 0.7),
    lr=0.24,
    bias_lr=0.83,
    head_lr=0.01,
):
    """The fast stack by hand."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    images, labels = data
    started, count = time.perf_counter(), len(labels)
    batch_size = max(32, min(1000, count // 50))
    net = convnet()
    first, *filters = [layer.weight for layer in net if isinstance(layer, nn.Conv2d)]
    norms, head = [layer for layer in net if isinstance(layer, nn.BatchNorm2d)], net[-1].weight
    with torch.no_grad():
        first.copy_(whitened(normalized(images[:2000]), len(first))).requires_grad_(False)
        head.mul_(1 / 9)
        for weight in filters:
            nn.init.dirac_(weight[: weight.shape[1]])
    for norm in norms:
        norm.momentum = 0.4
    net.to(memory_format=torch.channels_last)
    momenta, coins, losses = (
        [torch.zeros_like(weight) for weight in filters],
        torch.randint(2, (count,)),
        torch.full((count,), math.inf),
    )
    rest, rates = [[norm.bias for norm in norms], [head]], (bias_lr, head_lr)  # the norms' weights stay 1
    sgd = torch.optim.SGD([{"params": p} for p in rest], momentum=0.85, nesterov=True)
    lengths = [round((keep if epoch else 1) * count) for epoch in range(epochs)]
    step, steps = 0, sum(length // batch_size for length in lengths)
    for epoch, length in enumerate(lengths):
        order = torch.randperm(count)
        if length < count:  # hard samples rather
            percentile = torch.searchsorted(losses.sort().values, losses, right=True) / count
            order = (torch.empty(count).exponential_() / percentile).argsort()[:length][torch.randperm(length)]
        for rows in order[: length // batch_size * batch_size].split(batch_size):
            side = next((side for side, end in zip(sides, ends, strict=False) if step < end * steps), sides[-1])
            mirrored = ((coins[rows] + epoch) % 2 == 1).view(-1, 1, 1, 1)
            batch = crops(normalized(images[rows]))
            batch = torch.where(mirrored, batch.flip(-1), batch)
            if side < 32:
                batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(batch.contiguous(memory_format=torch.channels_last)).float()
            losses[rows] = F.cross_entropy(logits.detach(), labels[rows], reduction="none")
            net.zero_grad()
            F.cross_entropy(logits, labels[rows], label_smoothing=0.2).backward()
            left = 1 - step / steps
            with torch.no_grad():
                for weight, momentum in zip(filters, momenta, strict=True):
                    momentum.mul_(0.6).add_(weight.grad)
                    update = orthogonal(weight.grad.add(momentum, alpha=0.6).flatten(1)).view_as(weight)
                    weight.mul_(len(weight) ** 0.5 / weight.norm()).sub_(update, alpha=lr * left)
            for group, rate in zip(sgd.param_groups, rates, strict=True):
                group["lr"] = rate * left
            sgd.step()
            step += 1
    return [(round(time.perf_counter() - started, 2), accuracy(net, test))]


ARMS: dict[str, Callable] = {"plain": plain, "tuned": tuned, "fast": fast, "raw": raw}


def run(args, arm, seed):
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    load, images = machine_facts()["load"], load_npz(args.data)
    x, y, x_test, y_test = images.x_train, images.y_train, images.x_test, images.y_test
    if args.validation:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(99))
        held_out, rest = order[: args.validation], order[args.validation :]
        x, y, x_test, y_test = x[rest], y[rest], x[held_out], y[held_out]
    test = DataLoader(list(zip(x_test.split(500), y_test.split(500), strict=True)), batch_size=None)
    seed_everything(seed, verbose=False)
    name, _, part = arm.partition("-")
    train = ARMS[name] if name else partial(fast, without=(part,))
    points = train((x[: args.samples], y[: args.samples]), test, args.epochs or EPOCHS[name or "fast"])
    return {"arm": arm, "seed": seed, "load": load, "points": points}


def summary(rows, arm):
    """Seconds to the target and what was reached at the end; runs of one length take as long as they take."""
    runs = [row for row in rows if row["arm"] == arm]
    times = [time_to_target(row["points"], TARGET) for row in runs]
    if arm in ("fast", "raw") or arm.startswith("-"):  # judged by the mean: a single run may end a little below
        times = [row["points"][-1][0] for row in runs]
    ends = [100 * row["points"][-1][1] for row in runs]
    return times, ends


def report(rows):
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    base = statistics.median(summary(rows, "fast" if "fast" in arms else arms[0])[0])
    for arm in arms:
        times, ends = summary(rows, arm)
        spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
        middle = statistics.median(times)
        margin = (statistics.mean(ends) - 100 * TARGET) * math.sqrt(len(ends))
        print(
            f"{arm:22s} {middle:7.1f} s ({min(times):.1f} to {max(times):.1f}), {middle / base:5.2f} of fast; {statistics.mean(ends):.2f} ± "
            f"{spread:.2f} %, {len(ends)} seeds, (mean - 90) sqrt(n) = {margin:+.2f}"
        )


def draw(rows, path):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row["points"] for row in rows if row["arm"] == arm]
        (line,) = axes.plot(*zip(*[(s, 100 * a) for s, a in runs[0]], strict=True), marker="o", ms=4, label=arm)
        for points in runs[1:]:
            axes.plot(*zip(*[(s, 100 * a) for s, a in points], strict=True), marker="o", ms=4, color=line.get_color())
    axes.axhline(100 * TARGET, color="grey", ls=":")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=100, help="fresh ones: settings were chosen with others")
    parser.add_argument("--arms", default="plain,tuned,fast,raw")
    parser.add_argument("--few", default="plain,tuned", help="arms that run on the first --few-seeds seeds only")
    parser.add_argument("--few-seeds", type=int, default=2)
    parser.add_argument("--ablation", action="store_true", help="take each part out of the fast stack")
    parser.add_argument("--validation", type=int, default=0, help="training images to hold out and to test on")
    parser.add_argument("--samples", type=int, default=None, help="training images to use")
    parser.add_argument("--epochs", type=int, default=None, help="for all arms, to try the script")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"cifar10_cpu{'_ablation' * args.ablation}.json"
    settings = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
    facts = {"machine": machine_facts(), "versions": versions(), "settings": settings}
    rows = json.loads(out.read_text())["runs"] if out.exists() else []
    arms = ["fast", *(f"-{name}" for name in ABLATION)] if args.ablation else args.arms.split(",")
    plan = [
        (arm, args.first_seed + i) for i in range(args.seeds) for arm in random.Random(i).sample(arms, len(arms))
        if i < args.few_seeds or arm not in args.few.split(",")
    ]  # fmt: skip
    plan = [one for one in plan if one not in [(row["arm"], row["seed"]) for row in rows]]
    for arm, seed in track(plan, "runs"):
        # a process for each: an allocator, once tuned, is never again quite as it was
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(process.submit(run, args, arm, seed).result())
        out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
        print(f"{arm} {seed}: {rows[-1]['points'][-1]}", flush=True)
    draw(rows, out.with_suffix(".png"))
    report(rows)


if __name__ == "__main__":
    main()
