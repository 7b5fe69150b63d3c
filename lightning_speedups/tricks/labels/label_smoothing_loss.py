"""Label smoothing (Szegedy et al., arXiv:1512.00567): the true class gets 1 − ε, and ε is spread evenly over all
classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.core.arguments import check_number
from lightning_speedups.tensors.labels import MixedLabels, label_weights, shielded, smooth_targets, soft_targets
from lightning_speedups.tricks.labels.base import Reduction, Smoothing


def smooth(targets: Tensor, smoothing: float | Tensor) -> Tensor:
    """Smooth probabilities that have not been smoothed yet.

    A target in which every class already has some probability has been smoothed before (or comes from a teacher) and is
    left as it is. With two classes that holds for mixed probabilities as well: there, mix labels, not probabilities.

    Args:
        targets: Class probabilities, ``(N, C, ...)``.
        smoothing: ε in [0, 1), or one for each class, ``(C,)``.

    Example:
        >>> smooth(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), 0.2)
        tensor([[0.9000, 0.1000],
                [0.9000, 0.1000]])
    """
    already = targets.amin(1, keepdim=True) > 0
    return torch.where(already, targets, smooth_targets(targets, targets.sum(1), smoothing))


class LabelSmoothingLoss(Smoothing):
    """Cross-entropy with smoothed labels, for class indices, class probabilities and mixed labels alike.

    Equal to ``torch.nn.CrossEntropyLoss(label_smoothing=ε)`` for class indices. With one ε for each class, a label is
    smoothed by the ε of its true class (a mixed one by both, each for its share): rare or noisy classes can be smoothed
    more, or less, than others. It differs where torch surprises:

    - The mean has one normaliser, the summed class weight of the targets (torch divides probabilities by N instead, so
      that the same data with class weights give another loss once they are mixed).
    - When every target is ignored the loss is 0, not NaN.
    - Half-precision scores give a float32 loss.
    - Probabilities that are already smoothed are not smoothed again.

    When not to use it: with a distillation loss on the same labels, or when calibrated probabilities are the product;
    the seed of many a poor result is an ε so large that the labels go flat. It costs nothing and saves no time by
    itself: it buys accuracy, and so epochs.

    Args:
        smoothing: ε in [0, 1); 0.1 is customary. Or one for each class, ``(C,)``.
        weight: Class weights, ``(C,)``.
        ignore_index: Targets with this class index count for nothing; class indices only.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If an argument is out of range, or scores and targets do not fit together.

    Source:
        arXiv:1512.00567, section 7; when it helps: Müller et al., arXiv:1906.02629.

    Example:
        >>> scores, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> LabelSmoothingLoss(0.1)(scores, labels)
        tensor(0.2951)
    """

    weight: Tensor | None

    def __init__(
        self,
        smoothing: float | Sequence[float] | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(smoothing, reduction)
        if weight is not None and not (isinstance(weight, Tensor) and weight.ndim == 1 and bool((weight >= 0).all())):
            raise ValueError(f"Expected `weight` to be a tensor (C,) of class weights >= 0, or None, but got {weight}.")
        self.ignore_index: int = check_number("ignore_index", ignore_index, whole=True)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            input: Scores (logits), ``(N, C, ...)`` or ``(C,)``.
            target: Class indices, ``(N, ...)`` or ``()``, plain or mixed by ``MixupCallback``; or probabilities, shaped
                like ``input``.

        Returns:
            float32 (float64 for float64 scores): a scalar, or ``(N, ...)`` with ``reduction="none"``.
        """
        if input.ndim == 1:
            loss: Tensor = self(input.unsqueeze(0), target.unsqueeze(0))
            return loss.squeeze(0)
        input = input.to(torch.promote_types(input.dtype, torch.float32))
        soft = target.is_floating_point()
        target = target.to(input.dtype) if soft else target.long()
        expected = input.shape if soft else (input.shape[0], *input.shape[2:])
        if target.shape != expected:
            last = " Scores with the classes last need `scores.movedim(-1, 1)`." * (target.shape == input.shape[:-1])
            raise ValueError(
                f"Expected `target` of shape {tuple(expected)} ({'probabilities' if soft else 'class indices'}) for "
                f"scores of shape {tuple(input.shape)}, but got {tuple(target.shape)}.{last}"
            )
        losses, counted = self._losses(input, target)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        total = counted.sum()
        return losses.sum() / torch.where(total > 0, total, 1)

    def _losses(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each target, and what they count in the mean."""
        weight = None if self.weight is None else self.weight.to(input.dtype)
        smoothing = self.epsilon(input)
        soft = target.is_floating_point()
        if not (soft or isinstance(target, MixedLabels) or isinstance(smoothing, Tensor)):
            losses = F.cross_entropy(
                input, target, weight, ignore_index=self.ignore_index, reduction="none", label_smoothing=smoothing
            )
            return losses, label_weights(target, weight, self.ignore_index)
        if soft:
            smoothed = smooth(target, smoothing)
        else:
            target, mass = soft_targets(target, input.shape[1], self.ignore_index)
            smoothed = smooth_targets(target, mass, smoothing)
        # One call of torch's for the whole loss: SubsetTraining reads and weighs each sample's there.
        losses = F.cross_entropy(shielded(input, smoothed), smoothed, weight, reduction="none")
        return losses, target if weight is None else target * weight.view(-1, *[1] * (input.ndim - 2))

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"smoothing={self.smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
