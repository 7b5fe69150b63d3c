"""The three methods of arXiv:2312.10024, each alone and together: gradient accumulation, mixed precision, pinned memory.

Each arm is a fit of a few optimizer steps in a plain Trainer. All have the same start, data in the same order, samples in a step, optimizer,
clipping and number of workers; an arm that accumulates has a quarter of the samples in a batch, and `EffectiveBatchSize`. Arms are interleaved
in an order that is shuffled anew each round, and ratios are taken within a round. Beside seconds a step: the memory that the forward pass of a
batch keeps for the backward pass, on a GPU also the peak of all, and the mean loss, which says that arms train alike (BatchNorm sees the smaller
batches, and half precision rounds). Pinned memory matters to a GPU alone: without one its arms are marked as not measured. Run nothing beside it.

    python benchmarks/accumulation_amp_pinned.py [--rounds 5] [--steps 4] [--networks ResNet-50,ViT-small,EfficientNet-B0]

Results that are there already are kept for networks that are left out.
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
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import EffectiveBatchSize
from lightning_speedups.measure.machine import machine_facts, versions

ON_GPU = torch.cuda.is_available()
HALF = "16-mixed" if ON_GPU else "bf16-mixed"
PARTS, WARM = 4, 2  # batches of a step that accumulates; steps before the clock starts
NETWORKS: dict[
    str, tuple[str, dict[str, Any], int, int]
] = {  # timm's name and options, side of images, samples of a step
    "ResNet-50": ("resnet50", {}, 64, 32),
    "ViT-small": ("vit_small_patch16_224", {"img_size": 64}, 64, 32),
    "EfficientNet-B0": ("efficientnet_b0", {}, 64, 32),
}
ARMS = {  # accumulates, half precision, pinned memory
    "plain": (False, False, False),
    "accumulation": (True, False, False),
    "AMP": (False, True, False),
    "pinned memory": (False, False, True),
    "accumulation and AMP": (True, True, False),
    "all three": (True, True, True),
}


class Net(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, options, *_ = NETWORKS[name]
        torch.manual_seed(0)
        self.network = timm.create_model(kind, num_classes=10, **options)
        self.losses: list[torch.Tensor] = []

    def loss(self, batch):
        return F.cross_entropy(self.network(batch[0]).float(), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(Callback):
    """Looks at the clock after the steps that warm up and after the last one, when the device has done all before."""

    def __init__(self, last: int) -> None:
        self.last, self.step, self.seen = last, 0, list[float]()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.step in (WARM, self.last):
                if ON_GPU:
                    torch.cuda.synchronize()
                self.seen.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step."""
        begin, end = self.seen
        return (end - begin) / (self.last - WARM)


def data_of(name: str, steps: int) -> TensorDataset:
    _, _, side, samples = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (samples * steps,), generator=generator)
    return TensorDataset(torch.randn(len(labels), 3, side, side, generator=generator), labels)


def kept_mib(name: str, arm: str) -> float:
    """What the forward pass of a batch keeps for the backward pass, parameters left out."""
    accumulates, half, _ = ARMS[arm]
    samples = NETWORKS[name][-1] // (PARTS if accumulates else 1)
    device = torch.device("cuda" if ON_GPU else "cpu")
    module = Net(name).to(device)
    parameters, kept = {one.untyped_storage().data_ptr() for one in module.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = [part[:samples].to(device) for part in data_of(name, 1).tensors]
    dtype = torch.float16 if ON_GPU else torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until all is counted, or memory comes back under the same address.
        with torch.autocast(device.type, dtype, enabled=half):
            loss = module.loss(batch)
        total = sum(kept.values())
        del loss
    return round(total / 2**20, 1)


def measured(name: str, arm: str, steps: int, workers: int) -> dict[str, float]:
    """Seconds of a step, the mean loss, and on a GPU the peak of memory."""
    accumulates, half, pinned = ARMS[arm]
    samples, last = NETWORKS[name][-1], WARM + steps
    module, clock = Net(name), Clock(last)
    batch_size = samples // PARTS if accumulates else samples
    loader = DataLoader(data_of(name, last), batch_size, num_workers=workers, pin_memory=pinned)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    Trainer(
        callbacks=[*([EffectiveBatchSize(samples)] if accumulates else []), clock], max_epochs=1, gradient_clip_val=1.0,
        accelerator="gpu" if ON_GPU else "cpu", devices=1, precision=HALF if half else "32-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip
    assert clock.step == last
    facts = {"seconds": clock.seconds, "loss": float(torch.stack(module.losses).mean())}
    return facts | ({"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if ON_GPU else {})


def compared(name: str, rounds: int, steps: int, workers: int) -> dict[str, Any]:
    """Run the arms, and return what each took, in seconds and as parts of the plain one's round by round."""
    arms = [arm for arm, (*_, pinned) in ARMS.items() if ON_GPU or not pinned]
    taken: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed in range(-1, rounds):
        for arm in random.Random(f"{name} {seed}").sample(arms, len(arms)):
            one = measured(name, arm, steps, workers)
            if seed >= 0:  # the first round only warms up
                taken[arm].append(one)
    rows: dict[str, Any] = {arm: "not measured: no GPU" for arm in ARMS}
    for arm, ones in taken.items():
        seconds = [one["seconds"] for one in ones]
        ratios = [one["seconds"] / plain["seconds"] for one, plain in zip(ones, taken["plain"], strict=True)]
        rows[arm] = {
            "seconds": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)],
            "of_plain": round(statistics.median(ratios), 3),
            "of_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "kept_mib": kept_mib(name, arm),
            "loss": round(ones[0]["loss"], 5),
        }
        if ON_GPU:
            rows[arm]["peak_mib"] = round(statistics.median(one["peak_mib"] for one in ones), 1)
        row = rows[arm]
        print(f"{name:16s} {arm:21s} {1e3 * row['seconds']:9.1f} ms a step, {row['of_plain']:.3f} of plain {row['of_plain_range']}, keeps {row['kept_mib']:8.1f} MiB, loss {row['loss']:.4f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--workers", type=int, default=4 if ON_GPU else 0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accumulation_amp_pinned.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.networks.split(","):
        facts = {"machine": machine_facts(), "versions": versions(), "rounds": args.rounds, "steps": args.steps}
        facts |= {"workers": args.workers, "half": HALF, "side": NETWORKS[name][2], "samples": NETWORKS[name][3]}
        results[name] = {**facts, "parts": PARTS, "arms": compared(name, args.rounds, args.steps, args.workers)}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
