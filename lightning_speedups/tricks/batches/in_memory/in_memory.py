"""Whole batches by index for the loaders of an unmodified project (as airbench loads: Jordan, arXiv:2404.00498)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_speedups.attach.loaders import LoaderSwap, take_batch
from lightning_speedups.attach.randomness import load_twice, same_randomness
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import tensors_in
from lightning_speedups.tensors.feature_store import evenly_spaced
from lightning_speedups.tricks.batches.in_memory.in_memory_loader import InMemoryLoader, gives_tensors
from lightning_speedups.tricks.batches.in_memory.samples import MOVABLE, made_alike, name_of

PROBES = 16
"""Samples that are loaded twice."""


class InMemory(Trick):
    """Puts an InMemoryLoader in the place of each loader of a fit whose samples fit in memory; nothing else changes.

    The hooks or the DataModule that make the loaders stay as they are. At the fit's start each sample of the training
    data, and of the validation data, is made once, by its own dataset and transforms, and kept; from then on no Python
    runs for a single sample. It takes ``TensorDataset``, the datasets of torchvision, lists, and ``Subset`` of these,
    with torch's own ``collate_fn`` alone; an ``InMemoryLoader`` stays as it is. Batches hold what they held, in the
    order they had: samplers are kept, and draw from torch's generator what they drew, so that a run ends as without the
    trick (if ``configure_optimizers`` asks for its length, the loaders are made twice, and orders are others). Resumed
    within an epoch it goes on with the next batch, as any run with an ``InMemoryLoader``; with
    ``shuffle=True``, whose order no checkpoint knows, that is a new order, of which it warns (beside ``ExactResume`` it
    is refused). Under DDP each process keeps all samples.

    Only transforms that make the same of a sample each time can be done once, such as ``ToTensor``, ``Normalize`` and
    ``Resize``, which are known by name. ``RandomCrop`` and ``RandomHorizontalFlip`` in a ``Compose`` are left out, and
    named in the log, beside a ``BatchAugmentation`` that crops or flips: it does so with whole batches, by arguments of
    its own (``padding="zeros"`` for torchvision's usual border), and behind ``Normalize``, so that zeros around an
    image are the mean colour and not black. Anything else is refused by name. Some samples are made twice, to see that
    they are not random. A validation loader that cannot be replaced is left as it is.

    When not to use it: data that does not fit in memory (for photos there is ``ImageStore``); fewer than two epochs;
    samples of several sizes; ``reload_dataloaders_every_n_epochs`` (refused).

    Args:
        max_gib: Largest size of a loader's samples, in GiB, 0 or more; while they are made, twice that is needed.
        on_device: Whether to keep them on the device, so that batches need no transfer.
        deterministic: Names of your own classes and functions (a loader, datasets, transforms) that make the same of a
            sample each time, with all that is in them.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if training samples may be other ones each time, are not tensors of
            one size in a tuple or a dict, or need more than ``max_gib``, or if loaders are made anew within the run.

    Source:
        Jordan, arXiv:2404.00498.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[InMemory(max_gib=8)])
    """

    def __init__(self, max_gib: float = 4.0, on_device: bool = False, deterministic: Sequence[str] = ()) -> None:
        super().__init__()
        check_number("max_gib", max_gib, 0)
        if isinstance(deterministic, str) or not all(isinstance(one, str) for one in deterministic):
            raise ValueError(f"Expected `deterministic` to be a list of names, but got {deterministic!r}.")
        self.max_gib, self.on_device, self.deterministic = max_gib, bool(on_device), tuple(deterministic)
        # Innermost: those who would give a loader workers, or copy its batches ahead, see what takes its place.
        self.grips = (LoaderSwap(self, self._swap, order=-3),)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse loaders that are made anew."""
        super().on_fit_start(trainer, pl_module)
        if every := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]  # set undeclared
            what = f"makes each sample once, but Trainer(reload_dataloaders_every_n_epochs={every}) has them made anew"
            raise self.refusal(what, "Leave one of them out.")

    def _swap(self, trainer: Trainer, loader: Any) -> Any:
        """Return a loader of the same batches from memory, for training and validation."""
        if isinstance(loader, InMemoryLoader):
            return loader
        try:
            rows, pins = self._rows(trainer, loader), loader.pin_memory and not self.on_device
            return InMemoryLoader(rows, batch_sampler=loader.batch_sampler, generator=loader.generator, pin_memory=pins)
        except Exception as error:  # of somebody's dataset, or of samples that do not go into tensors
            what = f"cannot keep the samples of the {name_of(loader)}: {error}"
            told = self.refusal(what.removesuffix("."), f"Or leave out {self.name}.")
            if trainer.training:
                raise told from error
            rank_zero_info(f"A validation loader stays as it is: {told}")
            return loader

    def _rows(self, trainer: Trainer, loader: Any) -> Any:
        """Return all samples of a loader, as one batch."""
        data: Any = getattr(loader, "dataset", None)
        is_plain = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
        if not is_plain or loader.batch_sampler is None or isinstance(data, IterableDataset):
            raise ValueError(
                "it needs a DataLoader that makes batches of a map-style dataset, with torch's `collate_fn`"
            )
        kept, moved = made_alike(loader, self.deterministic)
        rows = [*data.tensors] if gives_tensors(data) else self._made(trainer, loader, DataLoader(kept), moved)
        return move_data_to_device(rows, trainer.strategy.root_device) if self.on_device else rows

    def _made(self, trainer: Trainer, loader: Any, source: DataLoader[Any], moved: list[Any]) -> Any:
        """Make all samples of a source, which lacks what is left to batches."""
        count, left = len(loader.dataset), " and ".join(map(str, moved))
        _, found = load_twice(trainer, lambda: take_batch(source, evenly_spaced(PROBES, count)))
        if found:
            raise ValueError(f"they {found}")
        self._require_augmentation(trainer, moved, left)
        with same_randomness(trainer):
            first, whole = take_batch(source, [0]), take_batch(loader, [0])
            if [one.shape for one in tensors_in(first)] != [one.shape for one in tensors_in(whole)]:
                raise ValueError(f"without {left} they have another size. Resize them before")
            gib = count * sum(one.nbytes for one in tensors_in(first)) / 2**30
            if gib > self.max_gib:
                more = "Give a larger `max_gib`; photos in files are for an ImageStore"
                raise ValueError(f"they need {gib:.3g} GiB. {more}")
            rows = take_batch(source, range(count))
        if type(rows) not in (list, dict):
            raise ValueError("they are neither plain tuples nor dicts")
        told = f", without {left}, left to BatchAugmentation" if moved else ""
        rank_zero_info(f"{self.name} holds {count:,} samples of the {name_of(loader)} in {gib:.2g} GiB{told}.")
        return rows

    def _require_augmentation(self, trainer: Trainer, moved: list[Any], left: str) -> None:
        """Refuse random transforms that no BatchAugmentation does with batches."""
        others = callbacks_of(trainer) if trainer.training else []
        wanted = {MOVABLE[name_of(one)] for one in moved}
        does = [{key for key in wanted if getattr(one, key)} for one in others if name_of(one) == "BatchAugmentation"]
        if wanted and wanted not in does:
            raise ValueError(f"{left} would be missing. Add a `BatchAugmentation`, which does that with whole batches")
