"""Small images straight from a loader, where what makes them can be asked for another size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_speedups.attach.loaders import LoaderGrip, take_batch
from lightning_speedups.attach.packages import is_overridden
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.core.batch import Place, get_part
from lightning_speedups.core.dataset_sizes import SizeSettings, UnknownSizeError, find_settings
from lightning_speedups.core.resizing import Size


def ask_for_sizes(
    grip: LoaderGrip,
    trainer: Trainer,
    loader: Any,
    places: Iterable[Place],
    smallest: Callable[[Size], Size],
    evaluated: Iterable[Any],
) -> SizeSettings:
    """Return what sets the size of a loader's images, tried on a sample.

    Args:
        grip: Who asks.
        trainer: A fitting Trainer.
        loader: The training loader.
        places: Where the images stand in a batch.
        smallest: The smallest size that will be asked for, from the full one.
        evaluated: The datasets of evaluation, which must stay as they are.

    Raises:
        UnknownSizeError: If the size cannot be set, or not without a trace elsewhere.
    """
    if grip.batcher is None:
        raise UnknownSizeError("there is not one training loader, a DataLoader over a map-style dataset")
    if loader.num_workers and loader.persistent_workers:
        raise UnknownSizeError("with `persistent_workers=True` the workers keep their copies of the dataset")
    for owner in (trainer.lightning_module, trainer.datamodule):  # type: ignore[attr-defined]  # set undeclared
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            if owner is not None and is_overridden(hook, owner):
                raise UnknownSizeError(f"what `{hook}` does to the images is not known")
    settings, places = find_settings(loader.dataset), list(places)
    for dataset in evaluated:
        if kind := settings.shared_with(dataset):
            raise UnknownSizeError(shared(kind))
    for size in (settings.full, smallest(settings.full)):
        try:
            settings.set_size(size)
            sample = take_batch(loader, [0])
            found = [get_part(sample, place).shape[-2:] for place in places]
        except Exception as error:
            raise UnknownSizeError(f"no sample of size {size} could be had ({error})") from error
        finally:
            settings.restore()
        if any(one != size for one in found):
            raise UnknownSizeError(f"asked for images of size {size}, the dataset gave {tuple(found[0])}")
    return settings


def shared(kind: str) -> str:
    """Say that validation uses the same thing.

    Args:
        kind: What it is.
    """
    return f"validation uses the same {kind}"


def full_batches(
    trainer: Trainer, loader: Any, settings: SizeSettings, size: Size, batches: Sequence[Sequence[Any]]
) -> list[Any]:
    """Load samples once more at full size, as batches on the device.

    Args:
        trainer: A fitting Trainer.
        loader: The training loader.
        settings: What sets the size of its images.
        size: The size that it has afterwards.
        batches: The samples of each batch.
    """
    settings.restore()
    try:
        with same_randomness(trainer):
            loaded = [take_batch(loader, samples) for samples in batches]
    finally:
        settings.set_size(size)
    convert = trainer.precision_plugin.convert_input
    return [trainer.strategy.batch_to_device(convert(batch), dataloader_idx=0) for batch in loaded]
