"""The caller's own images, from an ``.npz`` file or a folder, checked before anything trains."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData, subset

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

__all__ = ["load_data", "load_folder", "load_npz"]

# np.load answers damaged or foreign files with any of these; an .npy file is an array, which has no `files`
DAMAGED = (
    OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, RuntimeError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


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
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CompareError(f"can't look at {str(path)[:150]}: {error.strerror or error}") from error
    if is_folder:
        return load_folder(path, image_size=image_size, samples=samples)
    if not exists:
        raise CompareError(f"no such file or folder: {path}")
    if image_size is not None:
        raise CompareError("`image_size` is for folders of images; the images of an .npz file are taken as they are")
    return load_npz(path)


def load_npz(path: Path) -> ImageData:
    """Load images from an ``.npz`` file with x_train, y_train, x_test and y_test.

    Args:
        path: The file. Images are uint8, (N, H, W) or (N, H, W, C) with C = 1 or 3; labels are integers from 0, (N,).

    Returns:
        The images, as many classes as the largest training label says.

    Raises:
        CompareError: If the file can't be read, lacks an array, or an array has the wrong type, shape or values.
    """
    import numpy as np

    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise CompareError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive.files) or 'nothing'}")
            arrays = {key: archive[key] for key in keys}
    except CompareError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CompareError(f"can't read {path} as an .npz file: {reason[:150]}") from error
    tensors: dict[str, Tensor] = {}
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if images.dtype != np.uint8:
            raise CompareError(f"{path}: x_{split} must be uint8, got {images.dtype}")
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or min(images.shape) == 0:
            raise CompareError(
                f"{path}: x_{split} must be (N, H, W) or (N, H, W, C) with C = 1 or 3, got {images.shape}"
            )
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise CompareError(
                f"{path}: y_{split} must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}"
            )
        if len(images) != len(labels):
            raise CompareError(f"{path}: x_{split} has {len(images)} images but y_{split} has {len(labels)} labels")
        if labels.max() > np.iinfo(np.int64).max:
            raise CompareError(f"{path}: labels must be class indices from 0, y_{split} has {labels.max()}")
        if labels.min() < 0:
            raise CompareError(f"{path}: labels must be >= 0, y_{split} has {labels.min()}")
        channels_last = images if images.ndim == 4 else images[..., None]
        tensors[f"x_{split}"] = torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))
        tensors[f"y_{split}"] = torch.from_numpy(labels.astype(np.int64))
    if tensors["x_train"].shape[1:] != tensors["x_test"].shape[1:]:
        raise CompareError(
            f"{path}: training and test images differ in shape:"
            f" {arrays['x_train'].shape[1:]} and {arrays['x_test'].shape[1:]}"
        )
    unseen = sorted(set(tensors["y_test"].tolist()) - set(tensors["y_train"].tolist()))
    if unseen:
        raise CompareError(f"{path}: y_test has label {unseen[0]}, which y_train lacks")
    num_classes = int(tensors["y_train"].max()) + 1
    if len(set(tensors["y_train"].tolist())) < 2:
        raise CompareError(f"{path}: y_train has one class only")
    if num_classes > 10 * len(tensors["y_train"]):
        raise CompareError(f"{path}: y_train has the label {num_classes - 1}; labels must be class indices from 0")
    return ImageData(path.name, **tensors, num_classes=num_classes)


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
    try:
        from PIL import Image
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize
    except ImportError as error:
        raise CompareError("folders of images need torchvision: pip install 'lightning-speedups[bench]'") from error

    splits: dict[str, ImageFolder] = {}
    for split in ("train", "test"):
        try:
            splits[split] = ImageFolder(path / split)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = " ".join(str(error).split())
            raise CompareError(f"{path} must hold train/CLASS/* and test/CLASS/*: {reason[:150]}") from error
    classes = splits["train"].class_to_idx
    unseen = sorted(set(splits["test"].classes) - set(classes))
    if unseen:
        raise CompareError(f"{path}: test/ has the class {unseen[0]!r}, which train/ lacks")
    if len(classes) < 2:
        raise CompareError(f"{path}: train/ has one class only")

    def opened(file: str) -> Image.Image:
        try:
            with Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CompareError(f"can't read the image {file}: {' '.join(str(error).split())[:150]}") from error

    files = splits["train"].samples
    if image_size is None:
        short = sorted(min(opened(file).size) for file, _ in files[:: max(1, len(files) // 32)])
        image_size = max(8, min(64, short[len(short) // 2]))
    arrays: list[Tensor] = []
    for split, folder in splits.items():
        keep = subset(len(folder.samples), samples if split == "train" else None)
        chosen = [folder.samples[int(i)] for i in keep]
        squares = [
            center_crop(resize(pil_to_tensor(opened(file)), [image_size], antialias=True), [image_size, image_size])
            for file, _ in chosen
        ]
        arrays += [torch.stack(squares), torch.tensor([classes[folder.classes[label]] for _, label in chosen])]
    x_train, y_train, x_test, y_test = arrays
    return ImageData(path.name, x_train, y_train, x_test, y_test, num_classes=len(classes))
