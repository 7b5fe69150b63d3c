"""Small images first, full ones at the end (fastai's practice in DAWNBench; Tan & Le, arXiv:2104.00298; Touvron et al.,
arXiv:1906.06423).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.batches import BatchOrder, BatchTrick, batch_number, rest_of_pipeline
from lightning_speedups.attach.copies import NoCopyError
from lightning_speedups.attach.image_sizes import ask_for_sizes, full_batches, shared
from lightning_speedups.attach.loaders import LoaderGrip, take_batch
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.regularization import Regularization
from lightning_speedups.attach.rehearsal import (
    Statistics,
    fresh_statistics,
    norms_of,
    rehearsal,
    swap_statistics,
)
from lightning_speedups.attach.run_length import batches_in_epoch, loader_batch_size, raw_optimizers, run_length
from lightning_speedups.attach.steps import Driver, ValueOrder
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, check_place, path_of, replace_part
from lightning_speedups.core.batch_scaling import Rule, scaling_factor
from lightning_speedups.core.dataset_sizes import SizeSettings, UnknownSizeError
from lightning_speedups.core.resizing import (
    Growth,
    Size,
    checked_stages,
    filled_batch,
    regularization,
    resize_images,
    resize_maps,
)

SAMPLES_TO_REFRESH = 32  # of each batch, where images must be loaded once more for it


class ProgressiveResizing(BatchTrick):
    """Trains on small images first and lets them grow to their full size, which takes a fraction of the time.

    The side is ``start`` of the full one until ``grow_from`` of the run, grows linearly, and is full from ``full_from``
    on; it depends on the place in the run alone, so that a resumed run goes on exactly. Images are resized on the
    device, in training only; evaluation always sees full ones. That saves the model's time, but not the loader's, so
    where transforms or a ``size`` of the dataset can be changed, the loader itself makes the images as small as the
    epoch allows, and the device does the rest. Where that is not possible, an info message says why.

    Before the first step it tries the model on the sizes to come, and before each validation it gives BatchNorm the
    statistics of full images, from recent training batches: those of small images do not fit them. Both run
    ``training_step`` on a copy of the module that shares its parameters, without logging, gradients or a change to
    random states; after the validation, BatchNorm has the training's own statistics back. Under DDP these are each
    rank's own, as always with BatchNorm. Checkpoints hold the training's statistics: one made while images were small
    evaluates worse than the validation before it. A module that optimizes manually, or a strategy that splits the
    model, goes without both.

    In eight epochs of CIFAR-10 (``benchmarks/smaller_batches.py``) it took 0.65 of the time and cost 1.3 points, where
    training in three quarters of the epochs took 0.75 and cost 2.3.

    When not to use it: small objects, or segmentation of fine detail; images that are tiny already; detection (boxes
    are not moved); models for one size only (timm's ViTs take others with ``dynamic_img_size=True``); short runs, where
    the small size costs more accuracy than time is won; a loader that is the bottleneck and that it cannot change.

    Args:
        start: Side at the start as a share of the full one, in (0, 1).
        grow_from: Fraction of the run, in [0, 1], at which growth begins.
        full_from: Fraction of the run, in [``grow_from``, 1], from which on images are full.
        multiple: Sides are multiples of this, 1 or more, in pixels, except the full one; a patch size or the total
            stride of the model fits.
        stages: Grow in steps instead: a number, 2 or more, of evenly spaced sizes, the first of which is ``start`` and
            the last full (EfficientNetV2 has 4, with ``grow_from=0`` and ``full_from=0.75``), or the sizes themselves
            instead of ``start``, rising: shares in (0, 1] or pixels of the shorter side. The growth's part of the run
            is shared out evenly among all but the last.
        antialias: Average over all pixels when shrinking.
        scale_regularization: Share of the regularisation at the smallest size, in [0, 1], growing linearly with the
            side to all of it at the full size: how much ``MixupCallback`` and other tricks on batches do, and the
            probability of ``nn.Dropout``. None: leave it alone.
        by: ``"step"``: grow from batch to batch; ``"epoch"``: one size in each epoch.
        fill_batch: Make batches larger while images are small, so that a step has about the same number of pixels, and
            multiply the learning rate to match. The batch size changes between epochs and fits the largest size of
            each. Needs ``max_epochs`` and one training loader over a map-style dataset; schedulers of
            ``configure_optimizers`` that count on ``estimated_stepping_batches`` take all epochs to be as long as the
            first, tricks of this package know better.
        rule: How the learning rate follows the batch size: ``"linear"``, ``"sqrt"``, or ``"auto"``: the root for the
            Adam family, else linear.
        in_loader: ``"auto"``: let the loader make small images where it can; True: refuse where it cannot; False:
            resize on the device only.
        inputs: Where the images ``(N, ..., H, W)``, floating point or uint8, stand in the batch: an index, key,
            attribute or path (a tuple of these), or a list of such places.
        maps: Where maps of labels for each pixel stand, to be resized alike ("nearest-exact").
        refresh_batches: How many recent batches give BatchNorm its statistics before a validation; they are kept on the
            device at full size. 0: leave BatchNorm alone. Where the loader makes small images, up to 32 samples of each
            are loaded again.
        probe: Try the model on the sizes to come before the first step.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the length of the run is unknown, if the batch has no such parts, if
            the model does not take the sizes, or if the loader cannot do what was asked of it.

    Source:
        Tan & Le, arXiv:2104.00298 (growth, regularisation); Touvron et al., arXiv:1906.06423 (statistics depend on the
        size).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ProgressiveResizing(start=0.5, multiple=32)])
    """

    batch_order = BatchOrder.RESIZE
    order = ValueOrder.FACTOR

    def __init__(
        self,
        start: float = 0.5,
        grow_from: float = 0.3,
        full_from: float = 0.8,
        multiple: int = 4,
        stages: int | list[float] | None = None,
        antialias: bool = True,
        scale_regularization: float | None = None,
        by: Literal["step", "epoch"] = "step",
        fill_batch: bool = False,
        rule: Rule = "auto",
        in_loader: Literal["auto"] | bool = "auto",
        inputs: Place | list[Place] = 0,
        maps: Place | list[Place] | None = None,
        refresh_batches: int = 4,
        probe: bool = True,
    ) -> None:
        super().__init__()
        check_number("start", start, 0, 1, above=True, below=True)
        check_number("grow_from", grow_from, 0, 1)
        check_number("full_from", full_from, grow_from, 1)
        check_number("multiple", multiple, 1, whole=True)
        check_number("scale_regularization", scale_regularization, 0, 1, optional=True)
        check_number("refresh_batches", refresh_batches, 0, whole=True)
        for name, value, allowed in (
            ("by", by, ("step", "epoch")),
            ("rule", rule, ("auto", "linear", "sqrt")),
            ("in_loader", in_loader, ("auto", True, False)),
        ):
            if value not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {value!r}.")
        self.growth = Growth(start, grow_from, full_from, checked_stages(stages), int(multiple))
        self.antialias, self.scale_regularization, self.by = bool(antialias), scale_regularization, by
        self.fill_batch, self.rule, self.in_loader = bool(fill_batch), rule, in_loader
        self.inputs, self.maps = _places("inputs", inputs), () if maps is None else _places("maps", maps)
        self.refresh_batches, self.probe = int(refresh_batches), bool(probe)
        self._maker = _Sizes(self, any_loader=not fill_batch)
        self.grips = (self._maker,)

    def begin(self) -> None:
        """Begin a run."""
        super().begin()
        self._loader: Any = None
        self._settings: SizeSettings | None = None  # while the loader makes the images small
        self._fixed: Size | None = None  # the full size, where small images may come from the loader
        self._sampled: Size | None = None  # the same, where batches are filled
        self._full: Size | None = None  # of the last batch
        self._evaluated: list[Any] = []  # datasets
        self._epochs = self._batches = 0
        self._optimizers: tuple[str, ...] = ()
        self._factors: list[float] = []
        self._regularization: Regularization | None = None
        self._recent: deque[Any] = deque(maxlen=1)
        self._statistics = Statistics()
        self._probed, self._said = False, set[str]()

    @property
    def state_key(self) -> str:
        """Distinct for each place in the batch."""
        return self._generate_state_key(inputs=repr(self.inputs))

    # The loader, before the first epoch and between epochs

    def see_evaluation_loader(self, trainer: Trainer, loader: Any) -> None:
        """Keep away from what validation shares."""
        self._evaluated.append(getattr(loader, "dataset", None))
        if self._settings is not None and (kind := self._settings.shared_with(self._evaluated[-1])):
            self._resize_on_device_only(shared(kind))

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Let the loader make the images as small as the epoch allows."""
        if loader is not self._loader:
            self._fixed = None
        if loader is not self._loader or (self._settings is not None and self._maker.batcher is None):
            self._give_back()
            self._loader = loader
            if self.fill_batch or self.in_loader:
                with same_randomness(trainer):
                    self._meet(trainer, loader)
        if self._settings is not None:
            self._settings.set_size(self.growth.size(self._end_of_epoch(trainer, epoch), self._settings.full))

    def _meet(self, trainer: Trainer, loader: Any) -> None:
        if self._maker.batcher is not None:
            self._settle(trainer)
        if self.fill_batch:
            self._sampled = _size(self._images(take_batch(loader, [0]), self.inputs[0], "inputs"))
        if not self.in_loader:
            return
        try:
            places, smallest = (*self.inputs, *self.maps), lambda full: self.growth.sizes(full)[0]
            self._settings = ask_for_sizes(self._maker, trainer, loader, places, smallest, self._evaluated)
            self._fixed = self._settings.full
        except UnknownSizeError as error:
            self._resize_on_device_only(str(error))

    def _resize_on_device_only(self, reason: str) -> None:
        self._give_back()
        self._recent.clear()
        if self.in_loader is True:
            raise MisconfigurationException(
                f"ProgressiveResizing(in_loader=True): the loader cannot make small images: {reason}. Use "
                '`in_loader="auto"` to resize on the device only.'
            )
        self._say(
            f"ProgressiveResizing resizes images on the device only, which does not relieve the loader: {reason}.",
            rank_zero_info,
        )

    def _give_back(self) -> None:
        """Let the loader make full images."""
        if self._settings is not None:
            self._settings.restore()
        self._settings = None

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        """Fill the batch with as many small images as have the pixels of full ones."""
        if self._sampled is None or not self._epochs:
            return batch_size
        progress = (epoch + (self.by == "step")) / self._epochs
        return filled_batch(batch_size, self._sampled, self.growth.size(progress, self._sampled))

    # The place in the run

    def _settle(self, trainer: Trainer) -> None:
        """Settle the length of the run."""
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else 0
        total = run_length(trainer).batches
        if self.by == "epoch" and not self.fill_batch and total is not None and batches_in_epoch(trainer, 0):
            epochs = 0
            while total > 0:  # `max_steps` may end the run before `max_epochs`
                total -= batches_in_epoch(trainer, epochs) or total
                epochs += 1
        self._epochs, self._batches = epochs, total or 0
        if not (epochs if self.fill_batch or self.by == "epoch" else total is not None):
            needs = "`max_epochs`" if self.fill_batch or self.by == "epoch" else "the length of the run"
            way_out = (
                "Give `Trainer(max_epochs=...)`."
                if self.fill_batch or self.by == "epoch"
                else 'Give `Trainer(max_steps=...)`, or `max_epochs` and `by="epoch"`.'
            )
            raise MisconfigurationException(
                f"ProgressiveResizing lets images grow over the run and needs {needs}, which is unknown here. {way_out}"
            )

    def _progress(self, trainer: Trainer, begins_epoch: bool = False) -> float:
        """Return the fraction of the run that is over before the next batch."""
        epoch = trainer.current_epoch
        if self.by == "epoch":
            return epoch / self._epochs
        if not self.fill_batch:
            return batch_number(trainer) / max(1, self._batches)
        # Epochs have different lengths, so that batches do not tell how much of the data was seen.
        batch = 0 if begins_epoch else trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return (epoch + batch / (batches_in_epoch(trainer, epoch) or 1)) / self._epochs

    def _end_of_epoch(self, trainer: Trainer, epoch: int) -> float:
        """Return the fraction of the run before the last batch of an epoch, or a little more."""
        if self.by == "epoch" or self.fill_batch:
            return (epoch + (self.by == "step")) / self._epochs
        batches = sum(batches_in_epoch(trainer, earlier) or 0 for earlier in range(epoch + 1))
        return (batches - 1) / max(1, self._batches)

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the length of the run and the regularisation."""
        self._settle(trainer)
        super().on_train_start(trainer, pl_module)
        self._optimizers = tuple(type(optimizer).__name__ for optimizer in raw_optimizers(trainer))
        steps = run_length(trainer).steps
        if self.fill_batch and steps is not None and 0 <= trainer.max_steps <= steps:
            rank_zero_warn(
                "ProgressiveResizing(fill_batch=True) counts in epochs: `max_steps` may end the run before the images "
                "are full. Give `max_epochs` only."
            )
        if self.scale_regularization is not None:
            self._regularization = Regularization(trainer, pl_module, leave_out=self)
            if not self._regularization.has_parts:
                rank_zero_warn(
                    "ProgressiveResizing(scale_regularization=...) found nothing to scale: no `nn.Dropout`, and no "
                    "other trick on batches such as MixupCallback."
                )
        self._prepare(trainer, self._progress(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the batch pipeline, and the driver where the rate changes."""
        super().setup(trainer, pl_module, stage)
        self._recent = deque(maxlen=self.refresh_batches or 1)
        if stage == "fit" and self.fill_batch:
            Driver.of(trainer).join(self)

    def settle_groups(self, pl_module: LightningModule) -> None:
        """No groups of their own."""

    def rests(self, optimizer: torch.optim.Optimizer) -> bool:
        """No optimizer rests."""
        return False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the loader, the learning rate and the regularisation."""
        super().on_train_epoch_start(trainer, pl_module)
        self._prepare(trainer, self._progress(trainer, begins_epoch=True))

    def _prepare(self, trainer: Trainer, progress: float) -> None:
        """Set what belongs to the next batch's size."""
        own = loader_batch_size(trainer) if self.fill_batch else None
        if own:
            ratio = self.batch_size_in_epoch(trainer.current_epoch, own) / own
            self._factors = [scaling_factor(ratio, self.rule, name) for name in self._optimizers]
        if self._regularization is None or self.scale_regularization is None:
            return
        share = self.scale_regularization if progress < self.growth.full_from else 1.0
        if self._full is not None:
            side, smallest = (min(self.growth.size(place, self._full)) for place in (progress, 0.0))
            share = regularization(side, smallest, min(self._full), self.scale_regularization)
        self._regularization.scale(share)

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Resize images and maps."""
        images = self._images(batch, self.inputs[0], "inputs")
        self._full = full = self._fixed or _size(images)
        progress = self._progress(trainer)
        if self.probe and not self._probed:
            self._probed = True
            self._try_sizes(trainer, pl_module, batch, full, self.growth.sizes(full, progress))
        size = self.growth.size(progress, full)
        if size == full:
            self._recent.clear()
        elif self.refresh_batches:
            samples = self._settings and self._maker.samples_of_batch()[:SAMPLES_TO_REFRESH]
            self._recent.append(batch if samples is None else samples)
        return self._resized(batch, size, progress)

    def _resized(self, batch: Any, size: Size, progress: float | None = None) -> Any:
        """Return a batch whose first images have a size; others have theirs, which may be different."""
        first = _size(self._images(batch, self.inputs[0], "inputs"))
        changed = batch
        for place in self.inputs:
            images, new = self._images(batch, place, "inputs"), size
            own = _size(images)
            if self._fixed is None and own != first:
                share = size[0] / first[0]
                new = self.growth.size(progress, own) if progress is not None else _times(own, (share, share))
            changed = replace_part(changed, place, resize_images(images, new, self.antialias))
        for place in self.maps:
            maps = self._images(batch, place, "maps")
            own = _size(maps)
            new = size if own == first else _times(own, (size[0] / first[0], size[1] / first[1]))
            changed = replace_part(changed, place, resize_maps(maps, new))
        return changed

    def _try_sizes(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, full: Size, sizes: Sequence[Size]
    ) -> None:
        """Refuse a model that does not take the sizes to come."""
        smaller = [size for size in sizes if size != full]
        if not smaller:
            return
        # Two neighbours show what the model wants sides to be multiples of.
        chosen = sorted({smaller[i] for i in (0, min(1, len(smaller) - 1), len(smaller) // 2, -1)})
        try:
            with rehearsal(trainer, pl_module) as (_, step):

                def failure(size: Size) -> Exception | None:
                    try:
                        step(rest_of_pipeline(trainer, self, self._resized(batch, size)))
                    except Exception as error:
                        return error
                    return None

                tried = ((size, failure(size)) for size in chosen)
                wrong, error = next((one for one in tried if one[1] is not None), (full, None))
                if error is None or failure(full) is not None:  # then the first step will say what is wrong
                    return
        except NoCopyError as reason:
            self._say(f"ProgressiveResizing does not try the model on small images: {reason}.", rank_zero_info)
            return
        raise MisconfigurationException(
            f"ProgressiveResizing: {type(pl_module).__name__} takes images of {full[0]} × {full[1]} pixels, but not of "
            f"{wrong[0]} × {wrong[1]} ({error}). Make it take any size (timm's vision transformers: "
            "`dynamic_img_size=True`; convolutional networks: `nn.AdaptiveAvgPool2d` before the classifier), or give "
            "sizes that it takes, with `start=`, `stages=` or a `multiple=` of its patch size or total stride."
        ) from error

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Multiply the rate as the batch is larger."""
        if "lr" not in values or not self._factors or self._factors[optimizer] == 1:
            return {}
        return {"lr": values["lr"] * self._factors[optimizer]}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the regularisation of the next batch."""
        if self.scale_regularization is not None:
            self._prepare(trainer, self._progress(trainer))

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give BatchNorm the statistics of full images."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._recent or not norms_of(pl_module):
            return
        try:
            recent = list(self._recent)
            if self._settings is not None:
                small = self.growth.size(self._end_of_epoch(trainer, trainer.current_epoch), self._settings.full)
                recent = full_batches(trainer, self._loader, self._settings, small, recent)
            batches = [rest_of_pipeline(trainer, self, batch) for batch in recent]
            self._statistics = swap_statistics(pl_module, fresh_statistics(trainer, pl_module, batches))
        except Exception as error:
            self._say(
                "ProgressiveResizing could not give BatchNorm the statistics of full images, so that validation has "
                f"those of small ones until the images are full: {error}.",
                rank_zero_warn,
            )
        self._recent.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give BatchNorm the training's statistics back."""
        swap_statistics(pl_module, self._statistics)
        self._statistics = {}

    # The end

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back."""
        super().undo(trainer, pl_module)
        Driver.of(trainer).leave(self)
        self._give_back()
        self._loader = None
        if self._regularization is not None:
            self._regularization.put_back()
        swap_statistics(pl_module, self._statistics)
        self._regularization, self._statistics, self._evaluated = None, {}, []
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the counted steps and the size of full images."""
        return {**super().state_dict(), "full": self._full and list(self._full)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        super().load_state_dict(state_dict)
        self._full = state_dict["full"] and (int(state_dict["full"][0]), int(state_dict["full"][1]))

    def _images(self, batch: Any, place: Place, argument: str) -> Tensor:
        part = self.part_of(batch, place, argument)
        found = f"the shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        if not isinstance(part, Tensor) or part.ndim < 3:
            raise MisconfigurationException(
                f"ProgressiveResizing({argument}={place!r}) expected a tensor (N, ..., H, W), but found {found}. Name "
                "the right place."
            )
        if argument == "inputs" and not (part.is_floating_point() or part.dtype == torch.uint8):
            raise MisconfigurationException(
                f"ProgressiveResizing({argument}={place!r}) resizes floating-point or uint8 images, but found "
                f"{part.dtype}. Name the right place; maps of labels go to `maps=`."
            )
        return part

    def _say(self, message: str, speak: Any) -> None:
        if message not in self._said:
            self._said.add(message)
            speak(message)


class _Sizes(LoaderGrip):
    trick: ProgressiveResizing

    def see_evaluation_loader(self, trainer: Trainer, loader: Any) -> None:
        self.trick.see_evaluation_loader(trainer, loader)

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        self.trick.change_loader(trainer, loader, epoch)

    def batch_size_in_epoch(self, epoch: int, batch_size: int) -> int:
        return self.trick.batch_size_in_epoch(epoch, batch_size)


def _places(name: str, places: Any) -> tuple[Place, ...]:
    several: list[Place] = list(places) if isinstance(places, list) else [places]
    if not several:
        raise ValueError(f"Expected `{name}` to name at least one place in the batch, but got [].")
    for place in several:
        check_place(name, place)
    if len({path_of(place) for place in several}) < len(several):
        raise ValueError(f"Expected `{name}` to name different places, but got {places!r}.")
    return tuple(several)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def _times(size: Size, shares: tuple[float, float]) -> Size:
    return max(1, round(size[0] * shares[0])), max(1, round(size[1] * shares[1]))
