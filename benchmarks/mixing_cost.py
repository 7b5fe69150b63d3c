"""What mixing costs in a ResNet-18 step: the seconds inside MixupCallback beside those of the whole step, and steps with and without it.

Images of 224 pixels in a real fit, mixup, CutMix and no mixing interleaved round by round. Run nothing beside it.

    python benchmarks/mixing_cost.py [--rounds 5] [--steps 6] [--batch-size 32]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.progress import track
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import MixupCallback
from lightning_speedups.measure.machine import machine_facts, versions

ARMS = {
    "plain": lambda: [],
    "mixup": lambda: [MixupCallback(alpha=0.2)],
    "cutmix": lambda: [MixupCallback(alpha=0, cutmix_alpha=1.0)],
    "per element": lambda: [MixupCallback(alpha=0.2, cutmix_alpha=1.0, per_element=True)],
}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=100)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(Callback):
    """Seconds from one batch's end to the next one's."""

    def __init__(self):
        self.seconds, self.since = [], None

    def on_train_batch_end(self, *_):
        now = time.perf_counter()
        if self.since is not None:  # the first step warms up
            self.seconds.append(now - self.since)
        self.since = now


def timed(trick):
    """Make a trick note the seconds of each change of a batch."""
    inner, trick.seconds = trick.change_batch, []

    def change_batch(*args):
        started = time.perf_counter()
        try:
            return inner(*args)
        finally:
            trick.seconds.append(time.perf_counter() - started)

    trick.change_batch = change_batch
    return trick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixing_cost.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seed_everything(0, verbose=False)
    count = args.batch_size * (args.steps + 1)
    data = TensorDataset(torch.randn(count, 3, 224, 224), torch.randint(0, 100, (count,)))
    facts = {"machine": machine_facts(), "versions": versions(), "batch_size": args.batch_size}
    steps, mixing = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
    for _ in track(range(args.rounds), "rounds"):
        for arm, make in ARMS.items():
            tricks, clock = [timed(trick) for trick in make()], Clock()
            Trainer(
                callbacks=[*tricks, clock], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(Net(), DataLoader(data, args.batch_size))  # fmt: skip
            steps[arm] += clock.seconds
            mixing[arm] += [second for trick in tricks for second in trick.seconds[1:]]
    plain = statistics.median(steps["plain"])
    for arm in ARMS:
        share = f", of which mixing {100 * statistics.median(mixing[arm]) / plain:.2f} %" if mixing[arm] else ""
        print(
            f"{arm:12s} {1e3 * statistics.median(steps[arm]):7.1f} ms a step ({statistics.median(steps[arm]) / plain:.3f} of plain){share}"
        )
    args.out.write_text(json.dumps({**facts, "steps": steps, "mixing": mixing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
