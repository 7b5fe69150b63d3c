"""One ordered pipeline of batch changes for each Trainer, on ``strategy.batch_to_device``.

That is the one place which sees every kind of batch, on its device, after the user's own transfer hooks (also those of
a DataModule), and before any callback, metric or training_step does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_speedups.attach.packages import MisconfigurationException
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick, callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import (
    Place,
    get_part,
    left_behind,
    loader_paths,
    path_of,
    replace_part,
    say_places,
    seems_channels_last,
)
from lightning_speedups.core.randomness import generator_for
from lightning_speedups.core.resizing import Size


class BatchOrder(IntEnum):
    """When a trick changes the batch; lower comes first. Those below LOOK do so in every stage."""

    CONVERT = -10
    LOOK = 0
    CUT = 5
    AUGMENT = 10
    RESIZE = 20
    MEMORY_FORMAT = 30
    MIX = 40
    REPLACE = 50
    CHECK = 60

    def __repr__(self) -> str:
        """Say it as ever: random streams are made of this, and resumed runs redraw theirs."""
        return f"<Order.{self.name}: {self.value}>"


class AbsentPartError(MisconfigurationException):
    """A trick finds None where a part was to be."""


class BatchTrick(Trick):
    """A trick that changes training batches. A subclass says when (``batch_order``) and how (``change_batch``)."""

    batch_order: BatchOrder
    strength: float = 1.0
    """Share of its full strength, in [0, 1], for a trick that distorts; ProgressiveResizing lets it grow."""
    pixels: Mapping[str, tuple[Place, ...]] = MappingProxyType({})
    """Of a trick that moves pixels: the places that it was given, by argument, those of images as ``inputs``."""
    pixels_argument: ClassVar[str] = "maps"
    """The argument that names what goes along with the images."""
    has_changed: bool = False
    """Whether it has changed a batch since ``setup``."""

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Return the changed batch, on the device; the incoming tensors may be the dataset's own memory: never write
        into them.
        """
        raise NotImplementedError

    def part_of(self, batch: Any, place: Place, argument: str) -> Any:
        """Return what stands at the place in a batch that the user named by an argument."""
        try:
            part = get_part(batch, place)
        except LookupError as error:
            raise self.misplaced(f"found {error.args[0]}", batch, "", **{argument: place}) from error
        if part is None:
            way_out = "Name a place that has a tensor in each batch."
            raise AbsentPartError(self.refusal("found None", way_out, **{argument: place}).args[0])
        return part

    def tensor_of(self, batch: Any, place: Place, argument: str) -> Tensor:
        """Return the tensor that stands there, of one dimension or more."""
        part = self.part_of(batch, place, argument)
        if isinstance(part, Tensor) and part.ndim:
            return part
        found = "a tensor without dimensions" if isinstance(part, Tensor) else type(part).__name__
        what = f"expected a tensor with a batch dimension, but found {found}"
        raise self.misplaced(what, batch, "", **{argument: place})

    def with_part(self, batch: Any, place: Place, part: Any, argument: str) -> Any:
        """Return a copy of a batch with another part at the place that the user named by an argument."""
        try:
            return replace_part(batch, place, part)
        except ValueError as error:
            raise self.refusal("changes a copy of each batch", error.args[0], **{argument: place}) from error

    def misplaced(self, what: str, batch: Any, more: str, **given: Any) -> MisconfigurationException:
        """Return the error that says what was found at a place, and which places there are.

        Args:
            what: As in ``refusal``.
            batch: Where it was looked for.
            more: Other ways out, as sentences.
            **given: The argument that names the place, and others that matter.
        """
        way_out = f"Name the right place with `{next(iter(given))}=`{say_places(batch)}. {more}".strip()
        return self.refusal(what, way_out, **given)

    def left_behind(self, trainer: Trainer, batch: Any, *more: Size) -> tuple[dict[Place, Any], dict[Place, Any]]:
        """Return what goes with the images and no trick of this kind was given, by places: maps that it could take, and
        what it cannot change, such as points.

        Args:
            trainer: A fitting Trainer.
            batch: A batch as it comes to the trick.
            *more: Heights and widths that maps may have, besides those of the images.
        """
        alike = [one for one in callbacks_of(trainer) if isinstance(one, type(self))]
        named = [(one, place, argument) for one in alike for argument in one.pixels for place in one.pixels[argument]]
        moved = [one.part_of(batch, place, argument) for one, place, argument in named]
        inputs, loaders = self.pixels["inputs"], trainer.train_dataloader
        sides = [tuple(self.tensor_of(batch, place, "inputs").shape[-2:]) for place in inputs]
        begins = [path for path in loader_paths(loaders) if any(path_of(one)[: len(path)] == path for one in inputs)]
        maps, fixed = left_behind(batch, moved, [*sides, *more], begins or [()])  # a hook may make another batch
        if self.pixels_argument == "inputs":  # which takes no class ids
            fixed |= {place: one for place, one in maps.items() if not one.is_floating_point()}
        return {place: one for place, one in maps.items() if place not in fixed}, fixed

    def look(self, trainer: Trainer, batch: Any) -> None:
        """Look at a first batch: refuse pixels in another order, and warn of what goes with them and stays behind."""
        for place in self.pixels["inputs"]:
            shape = tuple(self.tensor_of(batch, place, "inputs").shape)
            if seems_channels_last(shape):
                what = f"expected images (N, ..., H, W), but those of the shape {shape} seem to be (N, ..., H, W, C)"
                way_out = "In the dataset, put the channels second: `image.permute(2, 0, 1)`."
                raise self.refusal(what, way_out, inputs=place)
        maps, fixed = self.left_behind(trainer, batch)
        if maps:
            rank_zero_warn(f"{self.name} changes images, but not the maps of their size. {self.naming(maps)}")
        if fixed:
            places = ", ".join(map(repr, [*fixed][:8]))
            rank_zero_warn(f"{self.name} moves the pixels of images, but cannot move what is at {places} with them.")

    def naming(self, maps: Iterable[Place]) -> str:
        """Return the sentence that tells how to name more that goes with the images."""
        places = [*self.pixels.get(self.pixels_argument, ()), *maps]
        return f"If it belongs to them, name it: `{self.pixels_argument}={places if len(places) > 1 else places[0]!r}`."

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the pipeline."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.has_changed = False
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise self.refusal(
                f"changes batches on their way to `training_step`, but {type(pl_module).__name__}.training_step takes "
                "`dataloader_iter` and fetches them itself",
                "Write it as `training_step(self, batch, batch_idx)`.",
            )
        _pipeline(trainer).join(self, partial(self._change, trainer), self.batch_order)

    def _change(self, trainer: Trainer, transfer: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch = transfer(batch, *args, **kwargs)
        if not trainer.training or batch is None or not self.is_active(trainer):
            return batch
        try:
            if not self.has_changed and self.pixels:
                self.look(trainer, batch)
            changed = self.change_batch(trainer, trainer.lightning_module, batch)
        except AbsentPartError as error:
            if not self.has_changed:
                raise
            rank_zero_warn(f"{error} Batches without it stay as they are, such as those of a loader that ended.")
            return batch
        self.has_changed = True
        return changed

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the pipeline."""
        super().undo(trainer, pl_module)
        _pipeline(trainer).leave(self)


@dataclass
class Seed:
    """What a checkpoint holds of a trick that draws: the run's seed."""

    seed: int | None = None

    def settle(self, trainer: Trainer, given: int | None) -> int:
        """Return the seed given, else the checkpoint's, else that of torch's generator, and keep it."""
        if given is not None:
            self.seed = given
        elif self.seed is None:  # one for all ranks: a checkpoint holds one
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        return self.seed


class SeededBatchTrick(BatchTrick):
    """A trick that changes training batches at random: the draws depend on the seed, the rank and the batch's number
    alone, so that a resumed run draws the same.

    Args:
        seed: Any whole number. None: the seed of torch's generator (what ``seed_everything`` sets), kept in
            checkpoints.
    """

    saved_as = Seed
    saved: Seed

    def __init__(self, seed: int | None) -> None:
        check_number("seed", seed, whole=True, optional=True)
        self.seed = None if seed is None else int(seed)
        super().__init__()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the seed."""
        super().on_train_start(trainer, pl_module)
        self.run_seed(trainer)

    def run_seed(self, trainer: Trainer) -> int:
        """Return the seed given, else the checkpoint's, else that of torch's generator."""
        return self.saved.settle(trainer, self.seed)

    def generator(self, trainer: Trainer) -> torch.Generator:
        """Return the source of randomness for this batch, on the CPU."""
        return generator_for(self.run_seed(trainer), trainer.global_rank, batch_number(trainer), self.batch_order)


def rest_of_pipeline(trainer: Trainer, trick: BatchTrick, batch: Any) -> Any:
    """Return a batch as the tricks after one of them would leave it; they themselves remember nothing of it.

    Args:
        trainer: A fitting Trainer.
        trick: A trick in the pipeline.
        batch: What it would hand on.
    """
    tricks = [who for _, who, _ in _pipeline(trainer).members]
    for later in tricks[tricks.index(trick) + 1 :]:
        if later.is_active(trainer):
            twin = copy.copy(later)
            twin.saved, twin.run = copy.copy(later.saved), copy.copy(later.run)
            batch = twin.change_batch(trainer, trainer.lightning_module, batch)
    return batch


def transferred(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as it comes to the tricks: on the device, after the user's own transfer hooks.

    Args:
        trainer: A fitting Trainer with a trick in its pipeline.
        batch: As the loader hands it out.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    station = _pipeline(trainer)
    transfer = station.original
    for order, _, act in station.members:
        if order < BatchOrder.LOOK:
            transfer = partial(act, transfer)
    return transfer(batch, dataloader_idx=0)


def batch_number(trainer: Trainer) -> int:
    """Return how many training batches came before this one in the whole run; the same after a resume."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def _pipeline(trainer: Trainer) -> Station:
    return Station.of(trainer.strategy, "batch_to_device")
