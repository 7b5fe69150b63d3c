"""The next batch travels while this one trains (Murray et al., arXiv:2101.12127, prefetch), as bytes where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_speedups.attach.ahead import Ahead
from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.attach.loaders import LoaderSwap
from lightning_speedups.attach.packages import is_overridden
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick
from lightning_speedups.attach.workers import copy_loader
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, check_place, get_part, replace_part, say_places

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device")
"""What comes before a batch is on the device, or brings it there."""
ON_CPU = "a CPU needs no copies, and worker processes load ahead (LoaderTuning)"


def reason_against(loader: Any, device: str, owners: Iterable[Any] = ()) -> str:
    """Return why a loader's batches are not copied ahead; an empty string if they may be.

    Args:
        loader: Any training loader.
        device: The type of the device that trains.
        owners: The LightningModule, and the DataModule if there is one.

    Example:
        >>> reason_against(DataLoader(range(8)), "cuda"), reason_against(DataLoader(range(8)), "mps")
        ('no worker processes fill pinned memory', 'it copies to CUDA devices, and not to mps')
    """
    if device != "cuda":
        return f"it copies to CUDA devices, and not to {device}" if device != "cpu" else ON_CPU
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or hasattr(loader, "state_dict")
    ):
        return "the loader is no plain DataLoader over a map-style dataset"
    if not (loader.num_workers and loader.pin_memory):
        return "no worker processes fill pinned memory"
    hooks = [f"`{hook}`" for owner in owners for hook in HOOKS if is_overridden(hook, owner)]
    return f"{hooks[0]} is to see batches before they travel, or brings them itself" if hooks else ""


def to_floats(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images as floating point numbers, normalised as torchvision's ToTensor and Normalize do, to the last bit.

    Args:
        images: ``(..., C, H, W)``, uint8.
        mean: Of each channel, in [0, 1] of the brightest, ``(C, 1, 1)``, or one for all.
        std: The same for the standard deviation.

    Example:
        >>> to_floats(torch.tensor([[[0, 255]]], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(0.25)).tolist()
        [[[-2.0, 2.0]]]
    """
    return images.to(mean.dtype).div_(255).sub_(mean).div_(std)


@dataclass
class Run:
    """What belongs to a run.

    Attributes:
        constants: Mean and standard deviation, on each device.
    """

    constants: dict[torch.device, list[Tensor]] = field(default_factory=dict)


class PrefetchToDevice(Trick):
    """Copies the next training batch to a CUDA device while this one trains.

    The copy goes through a stream of its own, from the pinned memory that worker processes fill (``LoaderTuning`` sees
    to both). The batches and their order are the same to the bit. One batch more is held on the device.

    With ``mean``, images that the loader hands out as bytes (uint8) travel so, a quarter of the size, and become
    floating point numbers on the device, normalised, in training, validation, test and prediction alike, on any device.
    In the dataset ``PILToTensor()`` then takes the place of ``ToTensor()`` and ``Normalize(mean, std)``.

    Where it cannot help it copies nothing, and says why in one line: on a CPU, where worker processes load ahead
    already; without workers or pinned memory; with an own ``on_before_batch_transfer`` or
    ``transfer_batch_to_device``; with iterable datasets, and loaders whose place checkpoints hold.

    When not to use it: where training does not wait for data or transfer (``LoaderTuning`` tells); where the device's
    memory is full.

    Args:
        mean: Mean of the normalisation, in [0, 1] of the brightest value: one number, or one for each channel. None:
            bytes stay bytes.
        std: Standard deviation, above 0: likewise.
        inputs: Where the images ``(N, ..., C, H, W)`` stand in the batch: an index, key, attribute or path.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer is none of Lightning's; in the first batch,
            if there are no images in that place, or as many channels as ``mean`` or ``std`` has not.

    Source:
        Murray et al., arXiv:2101.12127.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PrefetchToDevice(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
    """

    run_as = Run
    run: Run

    def __init__(
        self, mean: float | Sequence[float] | None = None, std: float | Sequence[float] = 1.0, inputs: Place = 0
    ) -> None:
        super().__init__()
        for one in mean if isinstance(mean, (list, tuple)) else [mean]:
            check_number("mean", one, 0, 1, optional=mean is None)
        for one in std if isinstance(std, (list, tuple)) else [std]:
            check_number("std", one, 0, above=True)
        check_place("inputs", inputs)
        self.mean, self.std, self.inputs = mean, std, inputs
        self.grips = (LoaderSwap(self, self._swap, order=-1),)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand where batches have come to the device, in every stage."""
        super().setup(trainer, pl_module, stage)
        if self.mean is not None:
            act = partial(self._transfer, trainer)
            Station.of(trainer.strategy, "batch_to_device").join(self, act, BatchOrder.CONVERT)

    def _transfer(self, trainer: Trainer, transfer: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch = transfer(batch, *args, **kwargs)
        try:
            images = get_part(batch, self.inputs)
        except LookupError as error:
            way_out = f"Name the right place{say_places(batch)}."
            raise self.refusal(f"found {error.args[0]}", way_out, inputs=self.inputs) from error
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            return batch
        floats = trainer.precision_plugin.convert_input(to_floats(images, *self._constants(images)))
        return replace_part(batch, self.inputs, floats)

    def _constants(self, images: Tensor) -> list[Tensor]:
        """Return mean and standard deviation on the images' device."""
        if images.device not in self.run.constants:
            made = [torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (self.mean, self.std)]
            if any(len(one) > 1 and images.shape[-3:-2] != one.shape[:1] for one in made):
                what = f"normalises each channel, but the images have the shape {tuple(images.shape)}"
                raise self.refusal(what, "Give one number, or one for each channel.", mean=self.mean, std=self.std)
            self.run.constants[images.device] = [one.to(images.device) for one in made]
        return self.run.constants[images.device]

    def _swap(self, trainer: Trainer, loader: Any) -> Any:
        if not trainer.training:
            return loader
        device, datamodule = trainer.strategy.root_device, trainer.datamodule  # type: ignore[attr-defined]
        owners = [trainer.lightning_module, *([] if datamodule is None else [datamodule])]
        if reason := reason_against(loader, device.type, owners):
            rank_zero_info(f"{self.name} copies nothing ahead: {reason}.")
            return loader
        return copy_loader(loader, Ahead, copies_to=device)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand there no more."""
        Station.of(trainer.strategy, "batch_to_device").leave(self)
        super().undo(trainer, pl_module)
