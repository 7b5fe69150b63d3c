"""What the hardware's switches save: ChannelsLast, AllocatorTuning, FusedOptimizer and AutocastCache, beside bf16.

Each arm is a fit of a few steps in a plain Trainer; the arms of a group are interleaved in an order that is shuffled anew each round, and
ratios are taken within a round. Fits of the allocator run in processes of their own, as a first setting of it lasts; what a step takes from
the kernel is counted as minor page faults. Optimizers' steps are timed by themselves too. Run nothing beside it.

    python benchmarks/switches.py [--rounds 7] [--steps 8] [--groups layout,allocator,fused,cache]

With two threads and the defaults it takes about forty minutes. Results that are there already are kept for groups that are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from convnet import convnet
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_speedups import AllocatorTuning, AutocastCache, ChannelsLast, FusedOptimizer
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.tricks.hardware.fused_optimizer import set_fused

GROUPS = ("layout", "allocator", "fused", "cache")


NETWORKS = {  # and the side of its images and how many are in a batch
    "testbed": (convnet, 32, 128),
    "ResNet-18": (lambda: timm.create_model("resnet18", num_classes=10), 96, 32),
    "MobileNetV3-small": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=10), 96, 32),
    "ViT-tiny": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=96), 96, 32),
}


class Repeated(nn.Module):
    """Applies one part several times, as networks with shared layers do."""

    def __init__(self, part, times):
        super().__init__()
        self.part, self.times = part, times

    def forward(self, features):
        for _ in range(self.times):
            features = features + self.part(features)
        return features


class Unrolled(nn.Module):
    """A GRU cell over so many steps, by hand."""

    def __init__(self, width, times):
        super().__init__()
        self.cell, self.times = nn.GRUCell(width, width), times

    def forward(self, features):
        state = torch.zeros_like(features)
        for _ in range(self.times):
            state = self.cell(features, state)
        return state


def mlp(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


REPEATED = {  # and how many samples of width 512 are in a batch
    **{
        f"shared MLP, batch {n}, {k} times": (lambda k=k: Repeated(mlp(512), k), n)
        for n in (32, 256)
        for k in (1, 4, 16)
    },
    **{f"GRU cell, batch 64, {k} times": (lambda k=k: Unrolled(512, k), 64) for k in (1, 4, 16)},
}


class Net(LightningModule):
    def __init__(self, network, optimizer):
        super().__init__()
        self.network, self.make = network, optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)


class Clock(Callback):
    """Takes the seconds and the page faults of each step but the first three."""

    def __init__(self):
        self.seconds, self.faults = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.seconds.append(time.perf_counter())
        self.faults.append(faults)

    def read(self):
        seconds, faults = ([b - a for a, b in itertools.pairwise(one[3:])] for one in (self.seconds, self.faults))
        return {"seconds": statistics.median(seconds), "faults": statistics.median(faults)}


class Same:
    """A loader of one batch, again and again."""

    def __init__(self, batch, count):
        self.batch, self.count = batch, count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([self.batch] * self.count)


def measured(network, shape, steps, tricks=(), precision="32-true", optimizer=sgd):
    """Median seconds and page faults of a step."""
    torch.manual_seed(0)
    batch = [torch.randn(shape), torch.randint(0, 10, shape[:1])]
    clock = Clock()
    Trainer(
        callbacks=[*tricks, clock], max_epochs=1, accelerator="cpu", precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(network(), optimizer), Same(batch, steps + 4))  # fmt: skip
    return clock.read()


def layout(steps):
    settings = {
        "plain": ((), "32-true"),
        "ChannelsLast": ((ChannelsLast,), "32-true"),
        "bf16": ((), "bf16-mixed"),
        "both": ((ChannelsLast,), "bf16-mixed"),
    }
    for name, (network, side, size) in NETWORKS.items():
        yield (
            name,
            {
                arm: lambda n=network, s=(size, 3, side, side), t=tricks, p=precision: measured(
                    n, s, steps, [trick() for trick in t], p
                )
                for arm, (tricks, precision) in settings.items()
            },
        )


def allocator_in_this_process(size, tuned, steps, threads):
    torch.set_num_threads(threads)
    tricks = [ChannelsLast(), *([AllocatorTuning()] if tuned else [])]
    return measured(convnet, (size, 3, 32, 32), steps, tricks, "bf16-mixed")


def allocator(steps):
    def apart(size, tuned):
        told = json.dumps([size, tuned, steps, torch.get_num_threads()])
        command = [sys.executable, __file__, "--allocator", told]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    for size in (128, 250, 1000):
        yield (
            f"testbed, bf16, batch {size}",
            {arm: lambda n=size, on=on: apart(n, on) for arm, on in (("plain", False), ("AllocatorTuning", True))},
        )


OPTIMIZERS = {
    "SGD": sgd,
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3),
}


def only_the_step(network, make, fused, steps):
    torch.manual_seed(0)
    parameters = [*network().parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer, seconds = make(parameters), []
    set_fused(optimizer, optimizer.param_groups[0], fused or None, False if fused else None)
    for _ in range(steps + 3):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[3:])}


def fused(steps):
    arms = (("plain", False), ("FusedOptimizer", True))
    for name, kind in itertools.product(NETWORKS, OPTIMIZERS):
        network, make = NETWORKS[name][0], OPTIMIZERS[kind]
        yield (
            f"{name}, {kind}, step alone",
            {arm: lambda n=network, m=make, on=on: only_the_step(n, m, on, steps) for arm, on in arms},
        )
    for name, kind in (("ResNet-18", "SGD"), ("ViT-tiny", "AdamW")):
        network, side, size = NETWORKS[name]
        yield (
            f"{name}, {kind}, whole step",
            {
                arm: lambda n=network, s=(size, 3, side, side), m=OPTIMIZERS[kind], on=on: measured(
                    n, s, steps, [FusedOptimizer()] * on, optimizer=m
                )
                for arm, on in arms
            },
        )


def cache(steps):
    for name, (network, size) in REPEATED.items():
        yield (
            name,
            {
                arm: lambda n=network, s=(size, 512), on=on: measured(n, s, steps, [AutocastCache()] * on, "bf16-mixed")
                for arm, on in (("plain", False), ("AutocastCache", True))
            },
        )


def compared(name, arms, rounds):
    """Run the arms, and return what each took, in seconds and as parts of the plain one's round by round."""
    taken = {arm: [] for arm in arms}
    for seed in range(-1, rounds):
        for arm in random.Random(f"{name} {seed}").sample(list(arms), len(arms)):
            one = arms[arm]()
            if seed >= 0:  # the first round only warms up
                taken[arm].append(one)
    rows = {}
    for arm, ones in taken.items():
        ratios = [one["seconds"] / plain["seconds"] for one, plain in zip(ones, taken["plain"], strict=True)]
        seconds = [one["seconds"] for one in ones]
        rows[arm] = {
            "seconds": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)],
            "of_plain": round(statistics.median(ratios), 3),
            "of_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        if "faults" in ones[0]:
            rows[arm]["faults"] = statistics.median(one["faults"] for one in ones)
        row = rows[arm]
        faults = f", {row['faults']:8.0f} page faults" if "faults" in row else ""
        print(f"{name:32s} {arm:16s} {1e3 * row['seconds']:9.2f} ms, {row['of_plain']:.3f} of plain {row['of_plain_range']}{faults}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--allocator", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "switches.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.allocator:
        print(json.dumps(allocator_in_this_process(*json.loads(args.allocator))))
        return
    makers = {"layout": layout, "allocator": allocator, "fused": fused, "cache": cache}
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for group in args.groups.split(","):
        facts = {"machine": machine_facts(), "versions": versions(), "rounds": args.rounds, "steps": args.steps}
        arms = {name: compared(name, arms, args.rounds) for name, arms in makers[group](args.steps)}
        results[group] = {**facts, "arms": arms}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
