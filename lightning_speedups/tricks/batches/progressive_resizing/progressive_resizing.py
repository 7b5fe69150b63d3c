"""Small images first, full ones at the end (fastai's practice in DAWNBench; Tan & Le, arXiv:2104.00298; Touvron et al.,
arXiv:1906.06423).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import WarningCache, rank_zero_warn

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.copies import NoCopyError
from lightning_speedups.attach.rehearsal import Statistics, swap_statistics
from lightning_speedups.attach.run_length import ShorterRun
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch import Place
from lightning_speedups.core.batch_scaling import Rule
from lightning_speedups.core.resizing import Growth, Size, checked_stages
from lightning_speedups.tricks.batches.progressive_resizing.filled_batches import FilledBatches
from lightning_speedups.tricks.batches.progressive_resizing.full_size_statistics import give_statistics
from lightning_speedups.tricks.batches.progressive_resizing.growth import SizesOverRun
from lightning_speedups.tricks.batches.progressive_resizing.image_places import ImagePlaces
from lightning_speedups.tricks.batches.progressive_resizing.loader_sizes import LoaderSizes
from lightning_speedups.tricks.batches.progressive_resizing.regularization import Regularization
from lightning_speedups.tricks.batches.progressive_resizing.size_trial import ANY_SIZE, try_sizes


@dataclass
class FullSize:
    """What a checkpoint holds.

    Attributes:
        full: Height and width of the last batch's full images, in pixels.
    """

    full: list[int] | None = None


@dataclass
class Run:
    """What else belongs to a run.

    Attributes:
        is_tried: Whether the sizes were tried.
        said: The messages that the user has had.
        recent: Each gives one of the last batches with small images, as it comes to the trick with full ones.
        statistics: BatchNorm's own, while it has others.
    """

    is_tried: bool = False
    said: WarningCache = field(default_factory=WarningCache)
    recent: list[Callable[[], Any]] = field(default_factory=list)
    statistics: Statistics = field(default_factory=dict)


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
    model, goes without both, and a message says so.

    In eight epochs of CIFAR-10 (``benchmarks/smaller_batches.py``, eight seeds) it took 0.74 of the time (0.65 to 0.82)
    and cost 0.4 points (95 %: 0.8 to none). Growing from 0.3 to 0.8 of the run it took 0.65 and cost 1.3, and training
    in three quarters of the epochs took 0.75 and cost 2.3. With ``fill_batch`` it was slower and cost 1.2 (two seeds).

    When not to use it: small objects, or segmentation of fine detail; images that are tiny already; detection (boxes
    are not moved); models for one size only (timm's ViTs take others with ``dynamic_img_size=True``); short runs, where
    the small size costs more accuracy than time is won; a loader that is the bottleneck and that it cannot change.

    Args:
        start: Side at the start as a share of the full one, in (0, 1]; 1: they are full from the start.
        grow_from: Fraction of the run, in [0, 1], at which growth begins.
        full_from: Fraction of the run, in [``grow_from``, 1], from which on images are full.
        multiple: Sides are multiples of this, 1 or more, in pixels, except the full one; a patch size or the total
            stride of the model fits.
        stages: Grow in steps instead: a number of evenly spaced sizes, the first of which is ``start`` and the last
            full (EfficientNetV2 has 4, with ``grow_from=0`` and ``full_from=0.75``; 1: they are full from the start),
            or the sizes themselves instead of ``start``, rising: shares in (0, 1] or pixels of the shorter side. The
            growth's part of the run is shared out evenly among all but the last.
        antialias: Average over all pixels when shrinking.
        scale_regularization: Share of the regularisation at the smallest size, in [0, 1], growing linearly with the
            side to all of it at the full size: how much ``MixupCallback`` and other tricks on batches do, and the
            probability of ``nn.Dropout``. None: leave it alone.
        by: ``"step"``: grow from batch to batch; ``"epoch"``: one size in each epoch, which needs ``max_epochs``.
        fill_batch: Make batches larger while images are small, so that a step has about the same number of pixels, and
            multiply the learning rate to match. The batch size changes between epochs and fits the largest size of
            each. Needs ``max_epochs`` and one training loader over a map-style dataset; where a per-step scheduler of
            the module's own counts on epochs of the full length, as ``trainer.estimated_stepping_batches`` does, a
            warning names the true number of steps; tricks of this package know it.
        rule: How the learning rate follows the batch size: ``"linear"``, ``"sqrt"``, or ``"auto"``: the root for the
            Adam family, else linear.
        in_loader: ``"auto"``: let the loader make small images where it can; True: refuse where it cannot; False:
            resize on the device only.
        inputs: Where the images ``(N, ..., H, W)``, floating point or uint8, stand in the batch: an index, key,
            attribute or path (a tuple of these), or a list of such places, all of one size.
        maps: Where maps of labels for each pixel stand, to be resized alike ("nearest-exact"): one place, or a list of
            them, of the images' size.
        refresh_batches: How many recent batches give BatchNorm its statistics before a validation; they are kept on the
            device at full size. 0: leave BatchNorm alone. Where the loader makes small images, up to 32 samples of each
            are loaded again.
        probe: Try the model on the sizes to come before the first step.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the length of the run is unknown, if the batch has no such parts, if
            images have their channels last, if the model does not take the sizes, or if the loader cannot do what was
            asked of it.

    Source:
        Tan & Le, arXiv:2104.00298 (growth, regularisation); Touvron et al., arXiv:1906.06423 (statistics depend on the
        size).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ProgressiveResizing(start=0.5, multiple=32)])
    """

    batch_order = BatchOrder.RESIZE
    saved_as, run_as = FullSize, Run
    saved: FullSize
    run: Run

    def __init__(
        self,
        start: float = 0.5,
        grow_from: float = 0.25,
        full_from: float = 0.55,
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
        check_number("start", start, 0, 1, above=True)
        check_number("grow_from", grow_from, 0, 1)
        check_number("full_from", full_from, grow_from, 1)
        check_number("multiple", multiple, 1, whole=True)
        check_number("scale_regularization", scale_regularization, 0, 1, optional=True)
        check_number("refresh_batches", refresh_batches, 0, whole=True)
        check_choice("by", by, ("step", "epoch"))
        check_choice("rule", rule, get_args(Rule))
        check_choice("in_loader", in_loader, ("auto", True, False))
        growth = Growth(start, grow_from, full_from, checked_stages(stages), int(multiple))
        self.refresh_batches, self.probe = int(refresh_batches), bool(probe)
        self.images = ImagePlaces(self, inputs, maps, bool(antialias))
        self.pixels = {"inputs": self.images.inputs, "maps": self.images.maps}
        self.sizes = SizesOverRun(self, growth, "epoch" if by == "epoch" else "sample" if fill_batch else "batch")
        self.loader = LoaderSizes(self, self.sizes, (*self.images.inputs, *self.images.maps), in_loader is True)
        self.grips = (self.sizes,)
        if fill_batch:
            self.grips += (FilledBatches(self, self.sizes, self.images.size_in, rule), ShorterRun(self))
        if in_loader:
            self.grips += (self.loader,)
        if scale_regularization is not None:
            self.grips += (Regularization(self, self.sizes, scale_regularization),)

    @property
    def state_key(self) -> str:
        """Distinct for each place in the batch."""
        return self._generate_state_key(inputs=repr(self.images.inputs))

    def left_behind(self, trainer: Trainer, batch: Any, *more: Size) -> tuple[dict[Place, Any], dict[Place, Any]]:
        """Return maps, of full size or the images', and points in pixels that it was not given, by places."""
        maps, points = super().left_behind(trainer, batch, self.full_size(batch), *more)
        return maps, {place: one for place, one in points.items() if (one > 1).any()}

    def look(self, trainer: Trainer, batch: Any) -> None:
        """Warn of images that cannot be smaller, else of what does not go with them."""
        full = self.full_size(batch)
        if self.sizes.growth.sizes(full) == [full]:
            reason = "are full from the start, by `start`, `full_from`, `stages` or `multiple`"
            rank_zero_warn(f"{self.name} finds nothing to do: images of {full[0]} × {full[1]} pixels {reason}.")
        else:
            super().look(trainer, batch)

    def full_size(self, batch: Any) -> Size:
        """Return the size that a batch's images have when they are full."""
        return self.loader.full or self.images.size_in(batch)

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Resize images and maps."""
        full = self.full_size(batch)
        self.saved.full = list(full)
        if self.probe and not self.run.is_tried:
            self.run.is_tried = True
            to_come = self.sizes.to_come(trainer, full)
            try:
                try_sizes(trainer, self, full, to_come, partial(self.images.resized, batch))
            except NoCopyError as error:
                self.run.said.info(
                    f"{self.name} cannot try beforehand whether the model takes images of other sizes: {error}. If "
                    f"shapes do not fit in the first step, it does not. {ANY_SIZE}"
                )
        size = self.sizes.now(trainer, full)
        resized = self.images.resized(batch, size)
        if size == full:
            self.run.recent.clear()
        elif self.refresh_batches:
            recent = [*self.run.recent, self.loader.at_full_size(trainer, batch)]
            self.run.recent = recent[-self.refresh_batches :]
        return resized

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give BatchNorm the statistics of full images."""
        super().on_validation_start(trainer, pl_module)
        try:
            self.run.statistics = give_statistics(trainer, self, self.run.recent)
        except Exception as error:
            self.run.said.warn(
                f"{self.name} could not give BatchNorm the statistics of full images, so that validation has those of "
                f"small ones until the images are full: {str(error) or repr(error)}."
            )
        self.run.recent.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give BatchNorm the training's statistics back."""
        super().on_validation_end(trainer, pl_module)
        swap_statistics(pl_module, self.run.statistics)
        self.run.statistics = {}

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back."""
        swap_statistics(pl_module, self.run.statistics)
        super().undo(trainer, pl_module)
