"""Small images straight from a loader, where what makes them can be asked for another size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning_speedups.attach.batches import transferred
from lightning_speedups.attach.loaders import LoaderGrip, take_batch
from lightning_speedups.attach.packages import is_overridden
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.trick import Trick
from lightning_speedups.core.batch import Place, get_part
from lightning_speedups.core.resizing import Size
from lightning_speedups.tricks.batches.progressive_resizing.dataset_sizes import (
    SizeSettings,
    UnknownSizeError,
    find_settings,
)
from lightning_speedups.tricks.batches.progressive_resizing.growth import SizesOverRun

SAMPLES_TO_LOAD = 32  # of each batch that is wanted at full size


class LoaderSizes(LoaderGrip):
    """Lets the training loader make images as small as each epoch allows, where that leaves no trace elsewhere.

    Args:
        trick: Whose.
        sizes: Which size when.
        places: Where the images and maps stand in a batch.
        is_required: Whether to refuse a loader that cannot do it.
    """

    def __init__(self, trick: Trick, sizes: SizesOverRun, places: Iterable[Place], is_required: bool) -> None:
        super().__init__(trick, any_loader=True)
        self.sizes, self.places, self.is_required = sizes, tuple(places), is_required
        self.settings: SizeSettings | None = None  # while the loader makes the images small
        self.full: Size | None = None  # where they may come small from the loader, also when it has given up
        self.asked: Any = None  # the loader that was
        self.evaluated: list[Any] = []  # datasets

    def see_evaluation_loader(self, trainer: Any, loader: Any) -> None:
        """Note what validation uses."""
        self.evaluated.append(getattr(loader, "dataset", None))
        self._keep_apart()

    def change_loader(self, trainer: Any, loader: Any, epoch: int) -> None:
        """Let the loader make the images as small as the epoch allows."""
        if loader is not self.asked or self.batcher is None:
            self.restore()
            self.asked, self.full = loader, None
            try:
                self.settings = self._ask(trainer, loader)
            except UnknownSizeError as error:
                self._give_up(str(error))
            self._keep_apart()
        if self.settings is not None:
            self.full = self.settings.full
            self.settings.set_size(self.sizes.largest_in(epoch, self.settings.full))

    def _keep_apart(self) -> None:
        """Keep away from what validation shares."""
        if self.settings is not None and (kind := self.settings.shared_with(self.evaluated)):
            self._give_up(f"validation uses the same {kind}")

    def _give_up(self, reason: str) -> None:
        self.restore()
        if self.is_required:
            way_out = 'Use `in_loader="auto"` to resize on the device only.'
            raise self.trick.refusal(f"cannot let the loader make small images: {reason}", way_out, in_loader=True)
        self.trick.run.said.info(
            f"{self.name} resizes images on the device only, which does not relieve the loader: {reason}."
        )

    def _ask(self, trainer: Any, loader: Any) -> SizeSettings:
        if self.batcher is None:
            raise UnknownSizeError("there is not one training loader, a DataLoader over a map-style dataset")
        settings = settings_of_loader(trainer, loader)
        with same_randomness(trainer):
            for size in (settings.full, self.sizes.growth.size(0.0, settings.full)):
                try_size(loader, settings, size, self.places)
        return settings

    def at_full_size(self, trainer: Any, batch: Any) -> Callable[[], Any]:
        """Return what gives a batch at full size, later: itself, or its first samples, loaded once more.

        Args:
            trainer: A fitting Trainer.
            batch: A batch on the device.
        """
        if self.settings is None:
            return lambda: batch
        samples = self.samples_of_batch()[:SAMPLES_TO_LOAD]
        return partial(load_full, trainer, self.loader, self.settings, samples)

    def restore(self) -> None:
        """Let the loader make full images."""
        if self.settings is not None:
            self.settings.set_size(self.settings.full)
        self.settings = None

    def leave(self, trainer: Any) -> None:
        """Let the loader make full images, and forget it."""
        super().leave(trainer)
        self.restore()
        self.full, self.asked, self.evaluated = None, None, []


def settings_of_loader(trainer: Any, loader: Any) -> SizeSettings:
    """Return what sets the size of the images that a loader hands out.

    Args:
        trainer: A fitting Trainer.
        loader: The training loader.

    Raises:
        UnknownSizeError: If it cannot be set in what makes the images, or if something may change them afterwards.
    """
    if loader.num_workers and loader.persistent_workers:
        raise UnknownSizeError("with `persistent_workers=True` the workers keep their copies of the dataset")
    for owner in (trainer.lightning_module, trainer.datamodule):
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            if owner is not None and is_overridden(hook, owner):
                raise UnknownSizeError(f"what `{hook}` does to the images is not known")
    return find_settings(loader.dataset)


def try_size(loader: Any, settings: SizeSettings, size: Size, places: Iterable[Place]) -> None:
    """Try whether a loader's sample has the size that it was asked for.

    Args:
        loader: The training loader.
        settings: What sets the size of its images.
        size: The size to try; afterwards it is what it was.
        places: Where the images stand in a batch.

    Raises:
        UnknownSizeError: If it has another size, or none could be had.
    """
    try:
        with settings.at_size(size):
            sample = take_batch(loader, [0])
        found = [tuple(get_part(sample, place).shape[-2:]) for place in places]
    except Exception as error:
        raise UnknownSizeError(f"no sample of size {size} could be had ({error})") from error
    if any(one != size for one in found):
        raise UnknownSizeError(f"asked for images of size {size}, the dataset gave {found[0]}")


def load_full(trainer: Any, loader: Any, settings: SizeSettings, samples: list[int]) -> Any:
    """Return samples at full size, as a batch on the device.

    Args:
        trainer: A fitting Trainer.
        loader: The training loader.
        settings: What sets the size of its images.
        samples: Their places in its dataset.
    """
    with settings.at_size(settings.full):
        return transferred(trainer, take_batch(loader, samples))
