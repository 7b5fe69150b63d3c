"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899): train on blends of two samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.batches import BatchOrder, SeededBatchTrick, batch_number
from lightning_speedups.attach.run_length import run_length
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch import Place, check_places, get_part, is_map_of, is_sequence_of
from lightning_speedups.core.mixing import NO_BOX, Mixture, draw_mixture, mix_values
from lightning_speedups.tensors.labels import MixedLabels, mix_targets, soft_targets
from lightning_speedups.tensors.watching import Watch


@dataclass
class Mixing(Watch):
    """What belongs to a run.

    Attributes:
        mixed_batches: How many batches are mixed, from the first one on.
        has_warned: Whether the user was told of a step that does not, after others did.
    """

    mixed_batches: float = math.inf
    has_warned: bool = False


class MixupCallback(SeededBatchTrick):
    """Mixes the samples of each training batch, and their labels, without a change to ``training_step``.

    ``training_step`` receives blended inputs and, with ``targets="labels"``, labels that are still an integer tensor:
    they index, compare, and enter metrics as the label with the larger share. Only ``F.cross_entropy``, ``F.nll_loss``,
    ``F.one_hot``, the modules built on them and ``LabelSmoothingLoss`` see the mixture, and losses of numbers, such as
    ``F.binary_cross_entropy``, the blend of 0 and 1. If the loss of the first step depends on dominant labels, in whole
    or in part, the run stops with an error rather than train on the wrong target; if that of a later step does, it
    warns. Inside ``torch.compile``, and of labels that become numbers of Python's or NumPy's, it is only seen whether
    anything reads the mixture. Targets that are floating point (regression, multi-label, one-hot) are mixed directly.
    With class weights take ``LabelSmoothingLoss``: torch divides the loss of mixed and of unmixed labels by different
    sums.

    Targets of three dimensions or more are maps ``(N, ..., H, W)``, as in segmentation: mixup blends each pixel,
    CutMix pastes the same box, scaled to the map's own size, so that integer maps stay plain labels.

    Sequences of tokens ``(N, T)``, for features ``(N, T, F)`` such as spectrograms, are mixed place by place, and a
    place that is ignored in one of two counts for the other alone: a mixture reaches to the end of the longer one, so
    take a mask of padding from the mixed features, or leave it out. Inputs that are token ids cannot be mixed.

    What was done to the last training batch stands in ``last``, a
    [Mixture][lightning_speedups.core.mixing.Mixture], None before the first.

    When not to use it: in short runs (in imagenette's experience it pays from about 80 epochs on, and before that costs
    accuracy), with few classes and little overfitting, or where a blend of two inputs has no meaning. It saves no time
    in a step: it lets a long run go on improving.

    Args:
        alpha: Concentration of mixup's λ ~ Beta(alpha, alpha), 0 or more; 0 for no mixup.
        cutmix_alpha: The same for CutMix, which needs images ``(N, ..., H, W)``; 0 for no CutMix.
        prob: Probability, in [0, 1], that a batch (or sample) is mixed at all; multiplied by the attribute
            ``strength``, 1 unless another trick lets it grow.
        switch_prob: Probability, in [0, 1], of CutMix where both alphas are above 0.
        per_element: Draw λ and method for each sample instead of once for the batch.
        targets: ``"labels"``: as above; ``"soft"``: hand over class probabilities, float32, ``(N, C, ...)``.
        num_classes: C, for ``targets="soft"`` with integer labels.
        stop_after: Fraction of the run, in [0, 1], after which batches stay unmixed.
        inputs: Where the inputs stand in the batch: index, key or attribute, or a tuple of these, a path such as
            ``("views", 0)``. A list of places: several inputs, mixed alike; CutMix takes λ from the box in the first.
            (In YAML ``[a, b]`` is a path, ``[[a], [b]]`` are two places.)
        labels: Where the labels stand in the batch: index, key, attribute or path.
        log: Whether to log ``mixup/lam``, the mean share that samples keep of themselves, and ``mixup/cutmix``, the
            share of samples with a box, in each step; about 0.4 ms each.
        seed: Seed of the draws, which depend on it, the rank and the batch's number alone. None: the seed of torch's
            generator (what ``seed_everything`` sets), kept in checkpoints.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If the batch has no such parts, if the loss does not read the mixture, or if
            ``training_step`` fetches its own batches.

    Source:
        Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MixupCallback(alpha=0.2, stop_after=0.8)])
    """

    batch_order = BatchOrder.MIX
    pixels_argument = "inputs"
    run_as = Mixing
    run: Mixing

    def __init__(
        self,
        alpha: float = 0.2,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        per_element: bool = False,
        targets: Literal["labels", "soft"] = "labels",
        num_classes: int | None = None,
        stop_after: float = 1.0,
        inputs: Place | list[Place] = 0,
        labels: Place = 1,
        log: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        check_number("alpha", alpha, 0)
        check_number("cutmix_alpha", cutmix_alpha, 0)
        check_number("prob", prob, 0, 1)
        check_number("switch_prob", switch_prob, 0, 1)
        check_number("stop_after", stop_after, 0, 1)
        check_choice("targets", targets, ("labels", "soft"))
        check_number("num_classes", num_classes, 1, whole=True, optional=True)
        self._places = check_places("inputs", inputs, labels=labels)
        cuts = cutmix_alpha > 0 and prob > 0 and (switch_prob > 0 or alpha == 0)
        self.pixels = {"inputs": self._places, "labels": (labels,)} if cuts else {}
        self.alpha, self.cutmix_alpha, self.prob, self.switch_prob = alpha, cutmix_alpha, prob, switch_prob
        self.per_element, self.targets, self.num_classes = per_element, targets, num_classes
        self.stop_after, self.inputs, self.labels, self.logs = stop_after, inputs, labels, bool(log)
        self.last: Mixture | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the batch pipeline."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.last = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the last mixed step."""
        super().on_train_start(trainer, pl_module)
        if self.stop_after < 1.0:
            batches = run_length(trainer).batches
            if batches is None:
                what = "is a fraction of the run, but this run has no known length"
                way_out = "Give the Trainer `max_steps`, or leave `stop_after` at 1.0."
                raise self.refusal(what, way_out, stop_after=self.stop_after)
            self.run.mixed_batches = self.stop_after * batches

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Mix inputs and labels."""
        mixes = batch_number(trainer) < self.run.mixed_batches
        self.last = self.run.seen = None
        mixed, self.last = self.mix(batch, self.generator(trainer) if mixes else None)
        if self.last.method == "none":
            return mixed
        targets = get_part(mixed, self.labels)
        seen = self.run.begin(targets, trainer.current_epoch)
        return mixed if seen is targets else self.with_part(mixed, self.labels, seen, "labels")

    def mix(self, batch: Any, generator: torch.Generator | None) -> tuple[Any, Mixture]:
        """Mix a batch without a Trainer.

        Args:
            batch: What ``training_step`` would receive; it is left alone.
            generator: Source of randomness, on the CPU. None: mix nothing.

        Returns:
            The mixed batch, and what was done to it.

        Example:
            >>> batch = [torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])]
            >>> (inputs, labels), mixture = MixupCallback(0.4).mix(batch, torch.Generator().manual_seed(0))
            >>> labels.shape, mixture.method, mixture.lam.shape
            (torch.Size([4]), 'mixup', torch.Size([1]))
        """
        if self.alpha == self.cutmix_alpha == 0 and self.targets == "labels":
            return batch, Mixture("none")
        labels = self._labels(batch)
        inputs = [self._input(batch, place, labels) for place in self._places]
        mixture, first = Mixture("none"), inputs[0]
        if generator is not None:
            mixture = draw_mixture(
                first.shape,
                generator,
                alpha=self.alpha,
                cutmix_alpha=self.cutmix_alpha,
                prob=self.prob * self.strength,
                switch_prob=self.switch_prob,
                per_element=self.per_element,
                device=first.device,
            )
        targets = mix_targets(labels, mixture)
        if self.targets == "soft" and not labels.is_floating_point():
            if self.num_classes is None:
                what = "needs `num_classes` to turn integer labels into probabilities"
                raise self.refusal(what, "Give it.", targets="soft")
            try:
                targets = soft_targets(targets, self.num_classes)[0]
            except ValueError as error:
                what, way_out = f"takes labels below `num_classes`: {error}", "Ignored ones are -100 here."
                raise self.refusal(what[:-1], way_out, targets="soft", num_classes=self.num_classes) from error
        for place, part in zip(self._places, inputs, strict=True):
            if mixture.method != "none":
                batch = self.with_part(batch, place, mix_values(part, mixture), "inputs")
        return batch if targets is labels else self.with_part(batch, self.labels, targets, "labels"), mixture

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log what was mixed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.logs and self.last is not None:
            kept, boxes = self.last.lam, self.last.boxes
            cut = sum(box != NO_BOX for box in boxes) / len(boxes) if boxes else 0.0
            pl_module.log("mixup/lam", 1.0 if kept is None else kept.mean(), on_step=True, on_epoch=False)
            pl_module.log("mixup/cutmix", cut, on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop a run whose loss does not see the mixture."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        seen = self.run.end()
        if seen is None or (pl_module.automatic_optimization and not outputs):
            return  # nothing mixed, or training_step skipped the batch: the next one will tell
        fault = self.run.fault(seen, f"{type(pl_module).__name__}.training_step")
        if fault and not self.run.is_right:
            raise self.refusal(*fault, labels=self.labels)
        if fault and not self.run.has_warned:  # so late it is not for a trick to end the run
            self.run.has_warned = True
            rank_zero_warn(f"From epoch {trainer.current_epoch} on: {self.refusal(*fault, labels=self.labels)}")

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow nothing any more."""
        self.run.end()
        super().undo(trainer, pl_module)

    def _input(self, batch: Any, place: Place, labels: Tensor) -> Tensor:
        part = self.tensor_of(batch, place, "inputs")
        if not (part.is_floating_point() or part.dtype == torch.uint8):
            what = f"blends floating-point or uint8 inputs, but found {part.dtype}"
            way_out = (
                "Name the place of the inputs. Codes such as token ids cannot be blended: `LabelSmoothingLoss` is for "
                "these, too."
            )
            raise self.refusal(what, way_out, inputs=place)
        if self.cutmix_alpha > 0 and part.ndim < 3:
            what = f"cuts a box out of images (N, ..., H, W), but found the shape {tuple(part.shape)}"
            raise self.refusal(what, "Use `cutmix_alpha=0`.", inputs=place, cutmix_alpha=self.cutmix_alpha)
        if self.cutmix_alpha > 0 and is_sequence_of(part.shape, labels.shape) and not labels.is_floating_point():
            what = f"found labels of each place in a sequence, {tuple(labels.shape)} for inputs {tuple(part.shape)}"
            raise self.refusal(what, "Use `cutmix_alpha=0`.", labels=self.labels, cutmix_alpha=self.cutmix_alpha)
        if self.cutmix_alpha > 0 and labels.ndim > 2 and not is_map_of(part.shape, labels.shape):
            what = f"takes labels of three dimensions for maps of images {tuple(part.shape)}, not {tuple(labels.shape)}"
            raise self.refusal(what, "Use `cutmix_alpha=0`.", labels=self.labels, cutmix_alpha=self.cutmix_alpha)
        if len(part) != len(labels):
            shapes = f"{tuple(part.shape)} and {tuple(labels.shape)}"
            what = f"expected as many inputs as labels, but got shapes {shapes}"
            raise self.misplaced(what, batch, "", inputs=place)
        return part

    def _labels(self, batch: Any) -> Tensor:
        part = self.tensor_of(batch, self.labels, "labels")
        if part.dtype == torch.bool:
            way_out = "Make them integers (`.long()`), or floating point (`.float()`), which is mixed directly."
            raise self.refusal("found bool labels", way_out, labels=self.labels)
        if isinstance(part, MixedLabels):
            raise self.refusal("found labels that are mixed already", "Mix a batch once.", labels=self.labels)
        return part
