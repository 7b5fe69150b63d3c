"""Whole batches by index from tensors in memory, as airbench loads (Jordan, arXiv:2404.00498)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_speedups.attach.loaders import draws_alike, epoch_of_fit
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.randomness import generator_for


class InMemoryLoader(DataLoader[Any]):
    """A DataLoader over tensors in memory that takes each batch out of them in one go, without Python for each sample.

    It hands out what ``DataLoader(TensorDataset(...))`` does: lists of tensors, or dictionaries. The tensors may lie on
    the GPU; batches then need no transfer. Images in ``torch.channels_last`` come in it. Its order depends on the seed
    and the epoch alone, and a Trainer's checkpoint holds its place, so that a run interrupted within an epoch goes on
    with the very next batch; with a random ``sampler``, of whose order a checkpoint knows nothing, it warns that the
    order is another one. Under DDP Lightning gives it a ``DistributedSampler`` as any DataLoader. Worker processes,
    which Lightning advises, do not help it. Outside a Trainer call ``loader.sampler.set_epoch(epoch)`` before each
    epoch.

    When not to use it: data that does not fit in memory as tensors of one size; transforms of single samples.

    Args:
        dataset: Tensors with samples along the first dimension: a sequence or a dictionary of them, or a
            ``TensorDataset``.
        batch_size: Samples in a batch, 1 or more.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a last, smaller batch.
        seed: Seed of the orders, any whole number. None: the seed of torch's generator (what ``seed_everything`` sets);
            a checkpoint within an epoch keeps it, but Lightning does not give it back to a run resumed between epochs.
        sampler: Another order of indices instead of ``shuffle``.
        **options: Further arguments of ``DataLoader``, such as ``pin_memory``; not ``collate_fn``.

    Raises:
        ValueError: If an argument is out of range, or the dataset holds anything but tensors of one length.

    Source:
        Jordan, arXiv:2404.00498.

    Example:
        >>> images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
        >>> loader = InMemoryLoader([images, labels], batch_size=40, shuffle=True)
        >>> [tuple(x.shape) for x, y in loader]
        [(40, 3, 32, 32), (40, 3, 32, 32), (20, 3, 32, 32)]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int | None = None,
        sampler: Any = None,
        **options: Any,
    ) -> None:
        seed = check_number("seed", seed, whole=True, optional=True)
        batch_size = check_number("batch_size", batch_size, 1, whole=True)
        if options.get("collate_fn") not in (None, _whole):
            raise ValueError("Expected no `collate_fn`: the batches of an InMemoryLoader are whole already.")
        if shuffle and sampler is not None:
            raise ValueError("Expected `shuffle` or `sampler`, but got both.")
        rows = dataset if isinstance(dataset, _Rows) else _Rows(dataset)
        if sampler is None and options.get("batch_sampler") is None:
            order = torch.initial_seed() if seed is None else int(seed)
            sampler = _Shuffled(rows, order) if shuffle else _InOrder(rows)
        options["collate_fn"] = _whole
        super().__init__(rows, batch_size, sampler=sampler, drop_last=drop_last, **options)
        self.seed = seed  # Lightning reads the arguments from here when it makes one with another sampler
        self._position, self._epoch, self._goes_on = 0, 0, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Lightning asks for an iterator before it sets the epoch; a generator's first line runs with the first batch.
        epoch = epoch_of_fit()
        epoch = int(getattr(self.sampler, "epoch", 0)) if epoch is None else epoch
        # An epoch that was cut short leaves a place as well, but the next one begins at the beginning.
        begin = self._position if self._goes_on and self._epoch == epoch else 0
        if begin and not draws_alike(self.batch_sampler):
            rank_zero_warn(
                "InMemoryLoader is resumed within an epoch, but its sampler's order is random, and not in the "
                "checkpoint. It goes on with another order: in this epoch some samples come again, and others do not "
                "come. Use `shuffle=True`, or a checkpoint between two epochs."
            )
        self._epoch, self._goes_on = epoch, False
        last, states = len(self) - 1, torch.get_rng_state()
        batches = super().__iter__()
        if begin:  # what torch draws for the workers of an epoch was drawn before it was interrupted
            torch.set_rng_state(states)
        for position, batch in enumerate(batches):
            if position >= begin:
                # Before the last one is handed out: nobody asks the generator again after it.
                self._position = 0 if position == last else position + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch, and the seed."""
        return {"position": self._position, "epoch": self._epoch, "seed": getattr(self.sampler, "seed", None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there in the next epoch that is asked for, if it is that one."""
        self._position, self._epoch, self._goes_on = state_dict["position"], state_dict["epoch"], True
        if self.seed is None and isinstance(self.sampler, _Shuffled):
            self.sampler.seed = state_dict["seed"]


def gives_tensors(dataset: Any) -> bool:
    """Tell whether the samples of a dataset are the rows of its tensors: whether it is a ``TensorDataset``, or a
    subclass that makes them in no other way.

    Args:
        dataset: Any.

    Example:
        >>> gives_tensors(TensorDataset(torch.ones(3))), gives_tensors([torch.ones(3)])
        (True, False)
    """
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


class _Rows(Dataset[Any]):
    """Tensors of one length, and their rows."""

    def __init__(self, tensors: Any) -> None:
        parts = tensors.tensors if gives_tensors(tensors) else tensors
        self.keys = list(parts) if isinstance(parts, Mapping) else None
        values = parts.values() if isinstance(parts, Mapping) else parts if isinstance(parts, Sequence) else [parts]
        self.tensors = list(values)
        if not self.tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in self.tensors):
            raise ValueError(
                "Expected `dataset` to be a sequence or dictionary of tensors, or a TensorDataset (no subclass, if its "
                f"own way to make samples would be lost), but got {type(tensors).__name__} of "
                f"{[type(value).__name__ for value in self.tensors]}. Stack the samples first, or use a DataLoader."
            )
        lengths = [len(tensor) for tensor in self.tensors]
        if len(set(lengths)) > 1:
            raise ValueError(f"Expected `dataset` to hold tensors of one length, but got lengths {lengths}.")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def _pack(self, parts: list[Tensor]) -> Any:
        return parts if self.keys is None else dict(zip(self.keys, parts, strict=True))

    def __getitem__(self, index: int) -> Any:
        return self._pack([tensor[index].clone() for tensor in self.tensors])

    def __getitems__(self, indices: list[int]) -> Any:
        rows = torch.tensor(indices)
        return self._pack([_select(tensor, rows.to(tensor.device)) for tensor in self.tensors])


def _select(tensor: Tensor, rows: Tensor) -> Tensor:
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        # Torch selects rows of other layouts number by number, ten times slower for bytes, and would lose this one.
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def _whole(batch: Any) -> Any:
    return batch


class _InOrder(SequentialSampler):
    """One after the other; knows the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _Shuffled(RandomSampler):
    """An order for each epoch, which depends on nothing but the seed and the epoch."""

    def __init__(self, rows: Dataset[Any], seed: int) -> None:
        super().__init__(rows)  # type: ignore[arg-type]  # it has a length
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self), generator=generator_for(self.seed, self.epoch)).tolist())
