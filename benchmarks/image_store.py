"""What ImageStore saves: images per second from a folder of JPEG photos, decoded by a DataLoader, against those from the store.

The photos are those of a folder (train/CLASS/*), such as TrashNet's, written once as JPEG into a folder of their own. Arms, interleaved round by
round, each a pass over all photos in random order:

- random: torchvision's RandomResizedCrop and RandomHorizontalFlip in a DataLoader's workers, against such crops and flips of whole batches from the
  store, which is an eighth larger than the crops at each side (it holds the middle of each photo, at fewer pixels, so that small crops are less sharp);
- fixed: Resize and CenterCrop in a DataLoader's workers, against the store of that size.

All arms end with float batches in [0, 1]; all files are in memory after the round that warms up. Workers and threads are as many as there are CPUs. Run nothing beside it.

    python benchmarks/image_store.py trashnet/ [--rounds 5] [--side 128] [--batch-size 64] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, RandomHorizontalFlip, RandomResizedCrop, Resize, ToTensor

from lightning_speedups import ImageStore, InMemoryLoader
from lightning_speedups.core.augmentation import flip_some
from lightning_speedups.core.resized_crops import random_boxes, resized_crops
from lightning_speedups.measure.machine import machine_facts, versions

SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


def write_jpegs(source: Path, folder: Path) -> dict[str, float]:
    """Write the photos of a folder as JPEG, and return what decoding depends on: their bytes and pixels."""
    photos, pixels = ImageFolder(source), []
    for number, (image, label) in enumerate(photos):
        pixels.append(image.width * image.height)
        path = folder / photos.classes[label] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    size = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    return {"jpeg_bytes": size, "median_pixels": statistics.median(pixels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder with train/CLASS/*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "image_store.json")
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    side, seconds, facts = args.side, {}, {}
    cut = [RandomResizedCrop(side, SCALE, RATIO), RandomHorizontalFlip(), ToTensor()]
    fixed = [Resize(side), CenterCrop(side), ToTensor()]
    with tempfile.TemporaryDirectory() as folder:
        jpegs = Path(folder, "photos")
        facts |= write_jpegs(args.photos / "train", jpegs)
        stores = {}
        for name, size in (("random", side + side // 4), ("fixed", side)):
            started = time.perf_counter()
            stores[name] = ImageStore(jpegs, Path(folder, f"{name}.safetensors"), size, workers=args.workers)
            facts[f"{name}_store"] = {
                "size": size, "bytes": Path(folder, f"{name}.safetensors").stat().st_size,
                "seconds_to_make": round(time.perf_counter() - started, 3),
            }  # fmt: skip
            started = time.perf_counter()
            ImageStore(jpegs, Path(folder, f"{name}.safetensors"), size)
            facts[f"{name}_store"]["seconds_to_open"] = round(time.perf_counter() - started, 3)
        count = len(stores["fixed"])

        def decoded(transforms):
            data = ImageFolder(jpegs, Compose(transforms))
            options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
            return DataLoader(data, args.batch_size, shuffle=True, **options)

        def stored(name):
            return InMemoryLoader(stores[name], args.batch_size, shuffle=True, seed=0)

        def cropped(loader):
            generator = torch.Generator().manual_seed(0)
            for images, labels in loader:
                boxes = random_boxes(len(images), tuple(images.shape[-2:]), SCALE, RATIO, generator)
                flipped = torch.rand(len(images), generator=generator) < 0.5
                yield flip_some(resized_crops(images, boxes, (side, side)), flipped).float().div_(255), labels

        def plain(loader):
            for images, labels in loader:
                yield images.float().div_(255), labels

        loaders = {"random, JPEG": decoded(cut), "fixed, JPEG": decoded(fixed)}
        arms = {
            "random, JPEG": lambda: loaders["random, JPEG"],
            "random, ImageStore": lambda: cropped(stored("random")),
            "fixed, JPEG": lambda: loaders["fixed, JPEG"],
            "fixed, ImageStore": lambda: plain(stored("fixed")),
        }
        for number in track(range(-1, args.rounds), "rounds"):
            for arm in random.Random(number).sample([*arms], len(arms)):
                started, seen = time.perf_counter(), 0
                for images, labels in arms[arm]():
                    assert images.shape[1:] == (3, side, side)
                    assert images.dtype == torch.float32
                    seen += len(labels)
                assert seen == count
                if number >= 0:  # the first round only warms up
                    seconds.setdefault(arm, []).append(time.perf_counter() - started)
    for arm in arms:
        rates = [count / taken for taken in seconds[arm]]
        base = seconds[f"{arm.split(',')[0]}, JPEG"]
        ratios = [theirs / ours for theirs, ours in zip(base, seconds[arm], strict=True)]
        print(
            f"{arm:20s} {statistics.median(rates):8.0f} images/s, {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    for name in ("random", "fixed"):
        print(f"{name} store: {facts[f'{name}_store']}")
    settings = {key: str(value) for key, value in vars(args).items()} | {
        "photos": args.photos.name,
        "out": args.out.name,
    }
    document = {"machine": machine_facts(), "versions": versions(), "settings": settings, "images": count, **facts}
    args.out.write_text(json.dumps({**document, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
