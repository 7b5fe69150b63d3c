"""What InMemory saves on the MLP of Lightning's own MNIST tutorial, whose hooks and DataLoaders stay as they are.

The data are MNIST's in form and size (60,000 images of 28 × 28 bytes, idx files), with random pixels, which cost the same; network, transforms,
split, batch size and optimizer are the tutorial's. The second arm is a careful user's: workers that stay alive, and pinned memory on a GPU. All
arms fit the same number of epochs, interleaved round by round. Samples per second are those of training, over all epochs but the first, without
validation; seconds are those of the whole fit, with what it takes to make the samples. Run nothing beside it.

    python benchmarks/in_memory.py [--rounds 3] [--epochs 3] [--samples 60000]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import struct
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchmetrics import Accuracy
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from lightning_speedups import InMemory
from lightning_speedups.measure.machine import machine_facts, versions

ARMS = {  # callbacks, and the DataLoaders' workers
    "DataLoader": (lambda: [], 0),
    "DataLoader, 2 workers": (lambda: [], 2),
    "InMemory": (lambda: [InMemory()], 0),
}


def write_digits(folder: Path, count: int) -> None:
    """Write files that torchvision takes for MNIST."""
    raw, generator = folder / "MNIST" / "raw", torch.Generator().manual_seed(0)
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
        for kind, values in (("images", pixels), ("labels", labels)):
            head = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
            (raw / f"{split}-{kind}-idx{values.ndim}-ubyte").write_bytes(head + values.numpy().tobytes())


class LitMNIST(LightningModule):
    """https://lightning.ai/docs/pytorch/stable/notebooks/lightning_examples/mnist-hello-world.html."""

    def __init__(self, folder, workers, hidden_size=64, learning_rate=2e-4):
        super().__init__()
        self.folder, self.workers, self.learning_rate = folder, workers, learning_rate
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, hidden_size), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden_size, 10),
        )  # fmt: skip
        self.val_accuracy = Accuracy(task="multiclass", num_classes=10)

    def forward(self, x):
        return F.log_softmax(self.model(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_accuracy.update(logits.argmax(1), y)
        self.log("val_loss", F.nll_loss(logits, y))
        self.log("val_acc", self.val_accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def setup(self, stage):
        full = MNIST(self.folder, train=True, transform=Compose([ToTensor(), Normalize((0.1307,), (0.3081,))]))
        held_out = len(full) // 12
        self.train_part, self.val_part = random_split(full, [len(full) - held_out, held_out])

    def loader(self, part):
        careful = self.workers > 0
        options = {"persistent_workers": careful, "pin_memory": careful and torch.cuda.is_available()}
        return DataLoader(part, batch_size=64, num_workers=self.workers, **options)

    def train_dataloader(self):
        return self.loader(self.train_part)

    def val_dataloader(self):
        return self.loader(self.val_part)


class Clock(Callback):
    """Seconds and samples of training, epoch by epoch, without validation."""

    def __init__(self):
        self.seconds, self.samples = [], []

    def on_train_epoch_start(self, trainer, module):
        self.seconds.append(-time.perf_counter())
        self.samples.append(0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.samples[-1] += len(batch[1])

    def on_validation_start(self, trainer, module):
        self.seconds[-1] += time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="2 or more")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "in_memory.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []

    def fit(arm, number):
        seed_everything(number, verbose=False)
        clock, (make, workers) = Clock(), ARMS[arm]
        module = LitMNIST(folder, workers)
        trainer = Trainer(
            callbacks=[*make(), clock], max_epochs=args.epochs, accelerator=args.accelerator, devices=1, num_sanity_val_steps=0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(module)
        seconds = time.perf_counter() - started
        rate = sum(clock.samples[1:]) / sum(clock.seconds[1:])
        return {
            "arm": arm, "round": number, "samples_per_second": round(rate), "seconds": round(seconds, 3),
            "epochs": [round(one, 4) for one in clock.seconds], "val_loss": float(trainer.callback_metrics["val_loss"]),
        }  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder), args.samples)
        for number in track(range(-1, args.rounds), "rounds"):
            for arm in random.Random(number).sample([*ARMS], len(ARMS)):
                row = fit(arm, max(number, 0))
                if number >= 0:  # the first round only warms up
                    rows.append(row)
    facts = {"machine": machine_facts(), "versions": versions(), "settings": {k: str(v) for k, v in vars(args).items()}}
    facts["settings"]["out"] = args.out.name
    args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    plain = {row["round"]: row for row in rows if row["arm"] == "DataLoader"}
    for arm in ARMS:
        these = [row for row in rows if row["arm"] == arm]
        for key, word in (("samples_per_second", "samples/s"), ("seconds", "s for the fit")):
            values = [row[key] for row in these]
            ratios = [row[key] / plain[row["round"]][key] for row in these]
            ratios = [1 / ratio for ratio in ratios] if key == "seconds" else ratios
            print(
                f"{arm:22s} {statistics.median(values):10.1f} {word}, {statistics.median(ratios):.2f}x "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
    ends = {(row["round"], row["val_loss"]) for row in rows if row["arm"] != "DataLoader, 2 workers"}
    print("DataLoader and InMemory end with the same validation loss." if len(ends) == args.rounds else f"Ends: {ends}")


if __name__ == "__main__":
    main()
