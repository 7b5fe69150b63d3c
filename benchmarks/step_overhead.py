"""What each trick costs a training step beyond a bare Trainer, in microseconds.

A network so small that hooks and patches are all there is to see. All arms are interleaved in one run, in an order that is shuffled anew
each round; the difference to the bare Trainer is taken within a round. Run nothing beside it.

That difference is small beside the noise of a step, so what the drivers of optimizer values add is also timed by itself: everything that
the trick does around one step, with an empty step in it.

    python benchmarks/step_overhead.py [--rounds 15] [--steps 400]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import time
import timeit
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import nn

from lightning_speedups import (
    BatchAugmentation,
    CyclicMomentum,
    ExactResume,
    FreezeBackboneFinetune,
    FreezeProgressively,
    InMemoryLoader,
    LabelSmoothingLoss,
    LRCurve,
    MixupCallback,
    OneCycleMomentum,
    ProgressiveResizing,
    SmoothingSchedule,
    StopAtTarget,
    SubsetTraining,
    WarmupLRScaler,
)
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.steps import Driver, OptimizerTrick
from lightning_speedups.measure.machine import machine_facts, versions

ARMS = {
    "bare Trainer": list,
    "empty Callback": lambda: [Callback()],
    "OneCycleMomentum": lambda: [OneCycleMomentum(0.1)],
    "WarmupLRScaler": lambda: [WarmupLRScaler(scale=2.0, warmup_steps=100)],
    "CyclicMomentum": lambda: [CyclicMomentum(0.01, 0.1)],
    "LRCurve": lambda: [LRCurve("cosine", warmup=0.1)],
    "StopAtTarget": lambda: [StopAtTarget("loss", 0.0, "min")],
    "FreezeBackboneFinetune": lambda: [FreezeBackboneFinetune("backbone", unfreeze_at_epoch=0)],
    "FreezeProgressively": lambda: [FreezeProgressively("backbone", start=0.99, anneal=False)],
    "MixupCallback": lambda: [MixupCallback(seed=0)],
    "LabelSmoothingLoss": list,
    "SmoothingSchedule": lambda: [SmoothingSchedule("linear")],
    "BatchAugmentation": lambda: [BatchAugmentation(crop=1, seed=0)],
    "ProgressiveResizing": lambda: [ProgressiveResizing(multiple=1)],
    "SubsetTraining": lambda: [SubsetTraining()],
    "ExactResume": lambda: [ExactResume()],
    "all": lambda: [
        OneCycleMomentum(0.1),
        WarmupLRScaler(scale=2.0, warmup_steps=100),
        FreezeBackboneFinetune("backbone", unfreeze_at_epoch=0),
        MixupCallback(seed=0),
    ],
}


class Tiny(LightningModule):
    def __init__(self, criterion):
        super().__init__()
        self.backbone, self.head, self.criterion = nn.Linear(3, 8), nn.Linear(8, 4), criterion

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:  # once: logging costs more than any trick
            self.log("loss", 1.0, on_step=False, on_epoch=True)
        return self.criterion(self.head(self.backbone(batch[0].mean((2, 3)))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(Callback):
    """Takes the median time from one step to the next, which a busy moment of the machine does not move."""

    def on_train_start(self, trainer, pl_module):
        self.times = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.times.append(time.perf_counter())

    def median(self):
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[20:]))


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16 * steps, 3, 8, 8, generator=generator), torch.zeros(16 * steps, dtype=torch.int64)
    return InMemoryLoader([images, labels], batch_size=16)


def step_microseconds(arm: str, steps: int) -> float:
    criterion = (
        LabelSmoothingLoss(0.1) if arm in ("LabelSmoothingLoss", "SmoothingSchedule", "all") else F.cross_entropy
    )
    clock = Clock()
    trainer = Trainer(
        callbacks=[clock, *ARMS[arm]()], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(criterion), batches(steps))
    return clock.median() * 1e6


class Direct(Callback):
    """Takes the time of what a trick adds to one optimizer step, with nothing else in it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != 1:
            return
        (optimizer,) = raw_optimizers(trainer)
        driver = Driver.of(trainer)
        (trick,) = driver.members
        before = list(trick.steps_done)

        def step():
            driver.step(lightning, optimizer, nothing)

        def lightning(optimizer, closure):
            driver.work(0, arithmetic, closure)

        def arithmetic(closure):
            closure()

        def hooks():
            trick.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            trick.on_train_batch_end(trainer, pl_module, None, batch, batch_idx)

        def nothing(*args):
            pass

        both = [statistics.median(timeit.repeat(part, number=1000, repeat=25)) * 1e3 for part in (step, hooks)]
        self.microseconds = sum(both)
        trick.saved.steps_done = before


def driver_microseconds(arm: str) -> float | None:
    callbacks, direct = ARMS[arm](), Direct()
    if len(callbacks) != 1 or not isinstance(callbacks[0], OptimizerTrick):
        return None
    trainer = Trainer(
        callbacks=[*callbacks, direct], max_steps=1000, limit_train_batches=3, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    direct.on_train_batch_end = lambda *args: setattr(trainer, "should_stop", hasattr(direct, "microseconds"))
    trainer.fit(Tiny(F.cross_entropy), batches(1000))
    return round(direct.microseconds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_overhead.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in track(range(-1, args.rounds), "rounds"):
        for arm in random.Random(seed).sample(list(ARMS), len(ARMS)):
            taken = step_microseconds(arm, args.steps)
            if seed >= 0:  # the first round only warms up
                times[arm].append(taken)
    bare = times["bare Trainer"]
    rows = {}
    for arm, taken in times.items():
        extra = sorted(a - b for a, b in zip(taken, bare, strict=True))
        quarter = len(extra) // 4
        rows[arm] = {
            "step_us": round(statistics.median(taken), 1),
            "extra_us": round(statistics.median(extra), 1),
            "extra_us_quartiles": [round(extra[quarter], 1), round(extra[-1 - quarter], 1)],
        }
        rows[arm]["driver_us"] = driver_microseconds(arm)
        row = rows[arm]
        print(
            f"{arm:24s} {row['step_us']:8.1f} µs a step, {row['extra_us']:+7.1f} {row['extra_us_quartiles']}, by itself {row['driver_us']}"
        )
    facts = {"machine": machine_facts(), "versions": versions(), "rounds": args.rounds, "steps": args.steps}
    args.out.write_text(json.dumps({**facts, "arms": rows, "step_us": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
