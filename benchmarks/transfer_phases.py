"""What each phase of a finetuning costs, in time and in memory, against the step that trains everything.

The same fit of the same network (timm's, random weights: the cost does not depend on them) on the same photos, with `FreezeBackboneFinetune`
and `FeatureCache` in their phases. The phases are interleaved round by round. Seconds are those of an epoch, the median of several after one
of warm-up, which in the cached phase fills the cache (and its second, fourth, ... epoch compute one batch to check it). Memory: what the forward pass keeps for the backward pass, gradients and
optimizer state, counted exactly; on a GPU also the peak. Run nothing beside it.

    python benchmarks/transfer_phases.py [photos] [--model resnet18] [--side 128] [--samples 1024] [--rounds 3] [--precision 32-true]

`photos` is a folder (train/CLASS/*) or an .npz; random pixels without it.
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
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.progress import track

from lightning_speedups import FeatureCache, FreezeBackboneFinetune, InMemoryLoader, TransferClassifier
from lightning_speedups.measure.loading import load_data
from lightning_speedups.measure.machine import machine_facts, versions

FROZEN = {"unfreeze_at_epoch": None}
PHASES = {
    "full": lambda last: [],
    "head": lambda last: [FreezeBackboneFinetune(None, **FROZEN)],
    "head, not folded": lambda last: [FreezeBackboneFinetune(None, fold=False, **FROZEN)],
    "head and last layer": lambda last: [FreezeBackboneFinetune(None, schedule={0: ["head", last]})],
    "head, cached": lambda last: [FreezeBackboneFinetune(None, **FROZEN), FeatureCache()],
}


class Meter(Callback):
    """Seconds of each epoch's training, and the bytes that training holds beside the weights."""

    def __init__(self):
        self.seconds, self.kept, self.peak = [], 0, 0

    def on_train_epoch_start(self, trainer, module):
        self._synchronize(trainer)
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        self._synchronize(trainer)
        self.seconds.append(time.perf_counter() - self.since)

    def _synchronize(self, trainer):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # In the epoch of warm-up, as counting costs time; there too a cached phase computes its features without a graph.
        self.counting = trainer.current_epoch == 0 and batch_idx == 0
        if self.counting:
            weights, self.saved = {p.data_ptr() for p in module.parameters()}, {}

            def keep(tensor):
                if tensor.data_ptr() not in weights:
                    self.saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            self.hooks.__enter__()

    def on_after_backward(self, trainer, module):
        if self.counting:
            self.hooks.__exit__(None, None, None)
            self.gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
            self.counting = False

    def on_train_end(self, trainer, module):
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.state = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="photos: a folder with train/CLASS/*, or an .npz")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--last", help="layer that trains with the head (default: layer4, or the like)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer_phases.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.data is None:
        images = torch.randn(args.samples, 3, args.side, args.side)
        labels = torch.arange(args.samples) % 10
    else:
        data = load_data(args.data, image_size=args.side)
        order = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(0))[: args.samples]
        images, labels = data.x_train[order].float() / 255, data.y_train[order]
    last = args.last or {"resnet": "layer4", "vit": "blocks.11", "conv": "stages.3"}.get(args.model[:6], "blocks.6")

    def fit(phase):
        seed_everything(0, verbose=False)
        meter = Meter()
        module = TransferClassifier(args.model, int(labels.max()) + 1, weights=None)
        loader = InMemoryLoader([images, labels], args.batch_size, shuffle=True, seed=0)
        Trainer(
            callbacks=[*PHASES[phase](last), meter], max_epochs=8 if phase == "head, cached" else 2, accelerator=args.accelerator, devices=1, precision=args.precision,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, loader)  # fmt: skip
        _warm_up, *timed = meter.seconds
        return {
            "phase": phase, "seconds": round(statistics.median(timed), 4), "epochs": [round(s, 4) for s in meter.seconds],
            "activations": sum(meter.saved.values()), "gradients": meter.gradients, "optimizer_state": meter.state,
        }  # fmt: skip

    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"] |= {"data": args.data.name if args.data else "random pixels", "out": args.out.name}
    rows = []
    for turn in track(range(args.rounds), "rounds"):
        rows += [{"round": turn, **fit(phase)} for phase in random.Random(turn).sample(list(PHASES), len(PHASES))]
        args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    full = {row["round"]: row["seconds"] for row in rows if row["phase"] == "full"}
    for phase in PHASES:
        these = [row for row in rows if row["phase"] == phase]
        shares = [row["seconds"] / full[row["round"]] for row in these]
        megabytes = [these[0][kind] / 2**20 for kind in ("activations", "gradients", "optimizer_state")]
        print(
            f"{phase:20s} {statistics.median(row['seconds'] for row in these):8.3f} s an epoch, share "
            f"{statistics.median(shares):.4f} ({min(shares):.4f} to {max(shares):.4f}); MiB kept for backward, gradients, optimizer: "
            + ", ".join(f"{size:.1f}" for size in megabytes)
        )


if __name__ == "__main__":
    main()
