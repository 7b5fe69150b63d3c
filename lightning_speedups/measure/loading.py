"""The caller's own images, from an ``.npz`` file or a folder, checked before anything trains."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from lightning_speedups.core.counts import counted
from lightning_speedups.measure.errors import CompareError, as_compare_error
from lightning_speedups.measure.images import ImageData, subset
from lightning_speedups.modules.weights import shortened

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_data(path: str | Path, *, image_size: int | None = None, samples: int | None = None) -> ImageData:
    """Load the caller's own images from an ``.npz`` file or a folder.

    Args:
        path: A file for `load_npz` or a folder for `load_folder`.
        image_size: Side to which a folder's images are resized, in pixels.
        samples: Training images to load from a folder; ``None`` for all.

    Returns:
        The images.

    Raises:
        CompareError: If the path does not exist or what lies there can't be used.
    """
    if os.path.isdir(path):  # False also where the name itself is too long for the disk
        return load_folder(Path(path), image_size=image_size, samples=samples)
    if image_size is not None:
        raise CompareError("`image_size` is for folders of images; the images of an .npz file are taken as they are")
    return load_npz(Path(path))


def load_npz(path: Path) -> ImageData:
    """Load images from an ``.npz`` file with x_train, y_train, x_test and y_test.

    Args:
        path: The file. Images are uint8, (N, H, W) or (N, H, W, C) with C = 1 or 3; labels are integers from 0, (N,).

    Returns:
        The images, as many classes as the largest training label says.

    Raises:
        CompareError: If the file can't be read, lacks an array, or an array has the wrong type, shape or values.
    """
    # np.load answers damaged and foreign files in more ways than can be listed
    what = f"can't read {str(path)[:150]} as an .npz file with {', '.join(KEYS)}: "
    with as_compare_error(what, Exception):
        if not path.exists():
            raise ValueError("there is no such file or folder")
        if not zipfile.is_zipfile(path):
            raise ValueError("it is none; for images in files name the folder that holds train/ and test/")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in KEYS}
    with as_compare_error(f"{path}: ", ValueError):
        x_train = _checked_images("train", arrays["x_train"], arrays["y_train"])
        x_test = _checked_images("test", arrays["x_test"], arrays["y_test"])
        if x_train[0].shape != x_test[0].shape:
            raise ValueError(f"training and test images differ in shape: {[*x_train[0].shape]}, {[*x_test[0].shape]}")
        y_train, y_test = _checked_labels(arrays["y_train"], arrays["y_test"])
    return ImageData(path.name, x_train, y_train, x_test, y_test, num_classes=int(y_train.max()) + 1)


def _checked_images(split: str, images: Any, labels: Any) -> Tensor:
    """The images of one split, (N, C, H, W), when they are images with a label each."""
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
        raise ValueError(
            f"x_{split} must be uint8 of shape (N, H, W) or (N, H, W, C) with C = 1 or 3, got {images.dtype} of shape "
            f"{images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"y_{split} must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    if len(images) != len(labels):
        has = f"y_{split} has {counted(len(labels), 'label')}"
        raise ValueError(f"x_{split} has {counted(len(images), 'image')} but {has}")
    return torch.from_numpy(images).movedim(3, 1).contiguous()


def _checked_labels(train: Any, test: Any) -> tuple[Tensor, Tensor]:
    """Training and test labels as int64, when they are class indices."""
    low, high = train.min(), train.max()
    if low < 0 or high >= 10 * len(train):
        raise ValueError(f"labels must be class indices from 0, y_train has {low if low < 0 else high}")
    if low == high:
        raise ValueError("y_train has one class only")
    unseen = np.setdiff1d(test, train)
    if len(unseen):
        raise ValueError(f"y_test has label {unseen[0]}, which y_train lacks")
    return torch.from_numpy(train.astype(np.int64)), torch.from_numpy(test.astype(np.int64))


def load_folder(path: Path, *, image_size: int | None = None, samples: int | None = None) -> ImageData:
    """Load images from a folder with train/CLASS/* and test/CLASS/*, resized and cropped to squares, into memory.

    Args:
        path: The folder.
        image_size: Side of the squares in pixels; by default 64, or less when the images are smaller.
        samples: Training images to load, a seeded choice; ``None`` for all.

    Returns:
        RGB images.

    Raises:
        CompareError: If the layout is wrong, a file is no image, or a test class is unknown in train/.
    """
    with as_compare_error(f"{path} must hold train/CLASS/* and test/CLASS/*: ", FileNotFoundError):
        if lacking := _lacking(path):
            higher = next((f"; did you mean {one}?" for one in path.absolute().parents if not _lacking(one)), "")
            found = shortened(sorted(one.name + "/" * one.is_dir() for one in path.iterdir())) or "nothing"
            raise FileNotFoundError(f"it has no {' and no '.join(lacking)}, but {found}{higher}")
        train, test = ImageFolder(path / "train"), ImageFolder(path / "test")
    if unseen := sorted(set(test.classes) - set(train.classes)):
        raise CompareError(f"{path}: test/ has the class {unseen[0]!r}, which train/ lacks")
    if len(train.classes) < 2:
        raise CompareError(f"{path}: train/ has one class only")
    if image_size is None:
        some = train.samples[:: max(1, len(train.samples) // 32)]
        image_size = max(8, min(64, median_high(min(_opened(file).size) for file, _ in some)))

    def loaded(folder: ImageFolder, keep: int | None) -> tuple[Tensor, Tensor]:
        chosen = [folder.samples[i] for i in subset(len(folder.samples), keep).tolist()]
        squares = [_square(file, image_size) for file, _ in chosen]
        # test/ may lack classes, and counts those that it has from 0
        return torch.stack(squares), torch.tensor([train.class_to_idx[folder.classes[label]] for _, label in chosen])

    return ImageData(path.name, *loaded(train, samples), *loaded(test, None), num_classes=len(train.classes))


def _lacking(path: Path) -> list[str]:
    return [f"{split}/" for split in ("train", "test") if not (path / split).is_dir()]


def _opened(file: str) -> Image.Image:
    # pillow, too, answers damaged files in many ways
    with as_compare_error(f"can't read the image {file}: ", Exception), Image.open(file) as image:
        return image.convert("RGB")


def _square(file: str, side: int) -> Tensor:
    """The middle of an image, uint8, (3, side, side)."""
    square: Tensor = center_crop(resize(pil_to_tensor(_opened(file)), [side], antialias=True), [side, side])
    return square
