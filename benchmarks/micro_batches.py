"""What AutoMicroBatch costs where all fits, what a batch costs in parts, and on a GPU what that saves of memory.

ResNet-18 and ViT-tiny on images of 96 pixels, batches of 64, AdamW, in a plain Trainer. All arms are interleaved in one run, in an order that
is shuffled anew each round; ratios are taken within a round. On a GPU each arm's peak of memory is noted, and in the end the memory is limited
to a share of what whole batches take, so that they really run out: the size that is found then, and the seconds until it was. Run nothing
beside it.

    python benchmarks/micro_batches.py [--rounds 7] [--steps 8] [--share 0.6]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_speedups import AutoMicroBatch, InMemoryLoader
from lightning_speedups.measure.machine import machine_facts, versions

SIDE, BATCH = 96, 64
NETWORKS = {
    "ResNet-18": lambda: timm.create_model("resnet18", num_classes=10),
    "ViT-tiny": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=SIDE),
}
ARMS = {
    "plain": list,
    "whole": lambda: [AutoMicroBatch()],
    **{f"{size} at a time": lambda size=size: [AutoMicroBatch(start=size)] for size in (32, 16, 8)},
}


class Net(LightningModule):
    def __init__(self, network):
        super().__init__()
        torch.manual_seed(0)
        self.network = NETWORKS[network]()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Clock(Callback):
    """Takes the time from one step to the next, and looks at the memory."""

    def on_train_start(self, trainer, pl_module):
        self.times, self.device = [], trainer.strategy.root_device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_end(self, *_):
        self.peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def median(self):
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[2:]))


def fit(network, tricks, steps):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH * steps, 3, SIDE, SIDE, generator=generator)
    clock = Clock()
    trainer = Trainer(
        callbacks=[clock, *tricks], max_epochs=1, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(network), InMemoryLoader([images, torch.arange(len(images)) % 10], batch_size=BATCH))
    return clock


def limited(network, share, peak, steps):
    """A run with so much less memory than whole batches take."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share * peak / total)
    micro = AutoMicroBatch()
    try:
        clock = fit(network, [micro], steps)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"share": share, "size": micro.size, "step_s": clock.median(), "first_s": clock.times[1] - clock.times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "micro_batches.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict] = {}
    for network in NETWORKS:
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        peaks: dict[str, int | None] = {}
        for seed in range(-1, args.rounds):
            for arm in random.Random(seed).sample(list(ARMS), len(ARMS)):
                clock = fit(network, ARMS[arm](), args.steps)
                peaks[arm] = clock.peak
                if seed >= 0:  # the first round only warms up
                    times[arm].append(clock.median())
        rows[network] = {}
        for arm, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times["plain"], strict=True)]
            row = {
                "step_s": statistics.median(taken),
                "ratio": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }
            rows[network][arm] = row | {"peak_bytes": peaks[arm], "steps_s": taken}
            print(
                f"{network:10s} {arm:14s} {row['step_s']:.4f} s, {row['ratio']:.3f}× {row['range']}, {peaks[arm]} bytes"
            )
        if peaks["plain"]:
            rows[network]["limited"] = limited(network, args.share, peaks["plain"], args.steps)
            print(network, rows[network]["limited"])
    facts = {"machine": machine_facts(), "versions": versions(), "rounds": args.rounds, "steps": args.steps}
    args.out.write_text(json.dumps({**facts, "networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
