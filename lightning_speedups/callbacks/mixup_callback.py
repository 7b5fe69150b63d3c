"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899): train on blends of two samples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_speedups.attach.batches import Order, SeededBatchTrick, batch_number
from lightning_speedups.attach.trick import total_batches
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, get_part, replace_part
from lightning_speedups.core.labels import MixedLabels, Reads, soft_targets
from lightning_speedups.core.mixing import blend, complementary, cut_box, draw_lambda, kept_share, paste


def mix_inputs(
    inputs: Tensor,
    generator: torch.Generator,
    alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    per_element: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Blend each sample of a batch with a random partner, or paste a box of the partner into it.

    Args:
        inputs: ``(N, ...)``; CutMix cuts along the last two dimensions.
        generator: Source of randomness, on the CPU.
        alpha: Concentration of mixup's λ; 0 for no mixup.
        cutmix_alpha: Concentration of CutMix's λ; 0 for no CutMix.
        prob: Probability to mix at all.
        switch_prob: Probability of CutMix where both alphas are above 0.
        per_element: Draw everything for each sample instead of once for the batch.

    Returns:
        The mixed inputs, the partner of each sample, int64 ``(N,)``, and λ, float32 ``(N,)`` or ``(1,)``, the share
        that each sample kept of itself; all on the inputs' device. None when nothing was mixed.

    Example:
        >>> x, g = torch.arange(4.0).view(4, 1), torch.Generator().manual_seed(0)
        >>> mixed, partner, lam = mix_inputs(x, g, 1.0, 0.0, 1.0, 0.5, per_element=False)
        >>> torch.allclose(mixed, lam * x + (1 - lam) * x[partner])
        True
    """
    size = len(inputs)
    draws = size if per_element else 1
    partner = torch.randperm(size, generator=generator)
    mixes = torch.rand(draws, generator=generator) < prob
    share_of_cuts = switch_prob if alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    cuts = mixes & (torch.rand(draws, generator=generator) < share_of_cuts)
    blends = mixes & ~cuts
    if not mixes.any():
        return None
    lam, device = torch.ones(draws), inputs.device
    there = partner.to(device, non_blocking=True)
    mixed = inputs
    if blends.any():
        lam = torch.where(blends, draw_lambda(alpha, draws, generator), lam)
        mixed = blend(mixed, there, lam.to(device, non_blocking=True))
    if cuts.any():
        height, width = inputs.shape[-2:]
        kept = draw_lambda(cutmix_alpha, draws, generator)
        boxes = [
            cut_box(height, width, float(k), generator) if cut else (0, 0, 0, 0)
            for k, cut in zip(kept, cuts, strict=True)
        ]
        pasted = complementary(torch.tensor([kept_share(box, height, width) for box in boxes]))
        lam = torch.where(cuts, pasted, lam)
        mixed = paste(mixed, inputs, there, boxes)
    return mixed, there, lam.to(device, non_blocking=True)


class MixupCallback(SeededBatchTrick):
    """Mixes the samples of each training batch, and their labels, without a change to ``training_step``.

    ``training_step`` receives blended inputs and, with ``targets="labels"``, labels that are still an integer tensor:
    they index, compare, and enter metrics as the label with the larger share. Only ``F.cross_entropy``, ``F.nll_loss``,
    ``F.one_hot``, the modules built on them and ``LabelSmoothingLoss`` see the mixture. If nothing reads it in the
    first step, the run stops with an error rather than train on the wrong target. Targets that are floating point
    (regression, multi-label, one-hot) are mixed directly. With class weights take ``LabelSmoothingLoss``: torch divides
    the loss of mixed and of unmixed labels by different sums.

    When not to use it: in short runs (in imagenette's experience it pays from about 80 epochs on, and before that costs
    accuracy), with few classes and little overfitting, or where a blend of two inputs has no meaning. It saves no time
    in a step: it lets a long run go on improving.

    Args:
        alpha: Concentration of mixup's λ ~ Beta(alpha, alpha), 0 or more; 0 for no mixup.
        cutmix_alpha: The same for CutMix, which needs images ``(N, ..., H, W)``; 0 for no CutMix.
        prob: Probability, in [0, 1], that a batch (or sample) is mixed at all.
        switch_prob: Probability, in [0, 1], of CutMix where both alphas are above 0.
        per_element: Draw λ and method for each sample instead of once for the batch.
        targets: ``"labels"``: as above; ``"soft"``: hand over class probabilities, float32, ``(N, C, ...)``.
        num_classes: C, for ``targets="soft"`` with integer labels.
        stop_after: Fraction of the run, in [0, 1], after which batches stay unmixed.
        inputs: Where the inputs stand in the batch: index, key or attribute.
        labels: Where the labels stand in the batch: index, key or attribute.
        seed: Seed of the draws, which depend on it, the rank and the batch's number alone. None: the seed of torch's
            generator (what ``seed_everything`` sets), kept in checkpoints.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If the batch has no such parts, if nothing reads the mixture, or if ``training_step``
            fetches its own batches.

    Source:
        Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MixupCallback(alpha=0.2, stop_after=0.8)])
    """

    batch_order = Order.MIX

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
        inputs: Place = 0,
        labels: Place = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        check_number("alpha", alpha, 0)
        check_number("cutmix_alpha", cutmix_alpha, 0)
        if alpha == cutmix_alpha == 0:
            raise ValueError("Expected `alpha` or `cutmix_alpha` above 0, but got 0 for both, which mixes nothing.")
        check_number("prob", prob, 0, 1)
        check_number("switch_prob", switch_prob, 0, 1)
        check_number("stop_after", stop_after, 0, 1)
        if targets not in ("labels", "soft"):
            raise ValueError(f"Expected `targets` to be 'labels' or 'soft', but got {targets!r}.")
        check_number("num_classes", num_classes, 1, whole=True, optional=True)
        for name, place in (("inputs", inputs), ("labels", labels)):
            if not isinstance(place, (int, str)) or isinstance(place, bool):
                raise ValueError(f"Expected `{name}` to be an index, a key or an attribute name, but got {place!r}.")
        if inputs == labels:
            raise ValueError(
                f"Expected `inputs` and `labels` to be two places in the batch, but got {inputs!r} for both."
            )
        self.alpha, self.cutmix_alpha, self.prob, self.switch_prob = alpha, cutmix_alpha, prob, switch_prob
        self.per_element, self.targets, self.num_classes, self.stop_after = (
            per_element,
            targets,
            num_classes,
            stop_after,
        )
        self.inputs, self.labels = inputs, labels
        self._unread: Reads | None = None
        self._checked = False
        self._mixed_batches = float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the batch pipeline."""
        super().setup(trainer, pl_module, stage)
        self._checked, self._unread = False, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the last mixed step."""
        super().on_train_start(trainer, pl_module)
        self._mixed_batches = float("inf")
        if self.stop_after < 1.0:
            batches = total_batches(trainer)
            if batches is None:
                raise MisconfigurationException(
                    f"MixupCallback(stop_after={self.stop_after}) is a fraction of the run, but this run has no known"
                    " length. Give the Trainer `max_steps`, or leave `stop_after` at 1.0."
                )
            self._mixed_batches = self.stop_after * batches

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Mix inputs and labels."""
        inputs, labels = self._tensor(batch, self.inputs, "inputs"), self._tensor(batch, self.labels, "labels")
        if len(inputs) != len(labels):
            raise MisconfigurationException(
                f"MixupCallback expected as many inputs as labels, but got shapes {tuple(inputs.shape)} and "
                f"{tuple(labels.shape)}. Name their places in the batch with `inputs=` and `labels=`."
            )
        if self.cutmix_alpha > 0 and inputs.ndim < 3:
            raise MisconfigurationException(
                f"CutMix cuts a box out of images (N, ..., H, W), but the inputs have the shape {tuple(inputs.shape)}. "
                "Use `cutmix_alpha=0`."
            )
        if self.cutmix_alpha > 0 and labels.ndim > 2:
            raise MisconfigurationException(
                f"CutMix pastes parts of images, but labels of shape {tuple(labels.shape)} (one for each pixel) would "
                "have to be pasted alike, which MixupCallback does not do. Use `cutmix_alpha=0`."
            )
        mixture = None
        if batch_number(trainer) < self._mixed_batches:
            mixture = mix_inputs(
                inputs,
                self.generator(trainer),
                self.alpha,
                self.cutmix_alpha,
                self.prob,
                self.switch_prob,
                self.per_element,
            )
        if mixture is None:
            return replace_part(batch, self.labels, self._soft(labels)) if self._hands_over_soft(labels) else batch
        mixed, partner, lam = mixture
        targets: Tensor
        if labels.is_floating_point():
            targets = blend(labels, partner, lam)
        else:
            reads = Reads()
            targets = MixedLabels.mix(labels, labels[partner], lam, reads)
            if self.targets == "soft":
                targets = self._soft(targets)
            elif not self._checked:
                self._unread = reads
        return replace_part(replace_part(batch, self.inputs, mixed), self.labels, targets)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop a run whose loss does not see the mixture."""
        if self._unread is None:
            return
        if self._unread.count == 0 and pl_module.automatic_optimization and not outputs:
            self._unread = None  # training_step skipped the batch: the next one will tell
            return
        if self._unread.count == 0:
            raise MisconfigurationException(
                f"MixupCallback mixed the inputs, but nothing in {type(pl_module).__name__}.training_step read the"
                " mixed labels: its loss used the dominant labels only, which is the wrong target. Use F.cross_entropy,"
                " F.nll_loss, F.one_hot or LabelSmoothingLoss on the labels as they come, or"
                ' MixupCallback(targets="soft", num_classes=...) with a loss that takes class probabilities.'
            )
        self._checked, self._unread = True, None

    def _hands_over_soft(self, labels: Tensor) -> bool:
        return self.targets == "soft" and not labels.is_floating_point()

    def _soft(self, labels: Tensor) -> Tensor:
        assert self.num_classes is not None
        return soft_targets(labels, self.num_classes)[0]

    def _tensor(self, batch: Any, place: Place, argument: str) -> Tensor:
        try:
            part = get_part(batch, place)
        except LookupError as error:
            raise MisconfigurationException(
                f"MixupCallback({argument}={place!r}): {error.args[0]}. Name the right place."
            ) from error
        if not isinstance(part, Tensor) or part.ndim == 0:
            found = "a tensor without dimensions" if isinstance(part, Tensor) else type(part).__name__
            raise MisconfigurationException(
                f"MixupCallback({argument}={place!r}) expected a tensor with a batch dimension, but found {found}."
                " Name the right place."
            )
        if argument == "inputs" and not (part.is_floating_point() or part.dtype == torch.uint8):
            raise MisconfigurationException(
                f"MixupCallback({argument}={place!r}) blends floating-point or uint8 inputs, but found {part.dtype}."
                " Name the place of the inputs; codes such as token ids cannot be blended."
            )
        if part.dtype == torch.bool:
            raise MisconfigurationException(
                f"MixupCallback({argument}={place!r}) found bool labels. Make them integer class labels (`.long()`), or"
                " floating-point targets (`.float()`), which are mixed directly."
            )
        if argument == "labels" and self._hands_over_soft(part) and self.num_classes is None:
            raise MisconfigurationException(
                'MixupCallback(targets="soft") needs `num_classes` to turn integer labels into probabilities.'
            )
        return part
