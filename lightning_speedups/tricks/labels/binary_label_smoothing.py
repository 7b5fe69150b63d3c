"""Label smoothing (Szegedy et al., arXiv:1512.00567) where each label is a yes or no of its own: yes gets 1 − ε/2, no
gets ε/2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_speedups.tensors.labels import MixedLabels
from lightning_speedups.tricks.labels.base import Reduction, Smoothing


def smooth_binary(targets: Tensor, smoothing: float | Tensor) -> Tensor:
    """Move targets towards one half: ``t (1 − ε) + ε / 2``.

    Args:
        targets: Probabilities of yes, ``(N, C, ...)``; with a number as ε any shape.
        smoothing: ε in [0, 1), a number or a tensor without dimensions; or one for each class, ``(C,)``.

    Example:
        >>> smooth_binary(torch.tensor([[1.0, 0.0, 0.5]]), 0.2)
        tensor([[0.9000, 0.1000, 0.5000]])
        >>> smooth_binary(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 0.2]))
        tensor([[1.0000, 0.1000]])
    """
    if isinstance(smoothing, Tensor) and smoothing.ndim:
        smoothing = smoothing.view(-1, *[1] * (targets.ndim - 2))
    return targets * (1 - smoothing) + smoothing / 2


class BinaryLabelSmoothing(Smoothing):
    """Binary cross-entropy of logits with smoothed labels, for several yes-or-no labels at once (multi-label).

    Equal to ``F.binary_cross_entropy_with_logits`` on targets ``t (1 − ε) + ε / 2``: the two classes of each label are
    yes and no; but a score of −∞ whose label is a plain no costs nothing, where torch's loss is NaN. Labels that
    ``MixupCallback`` mixed are read as the shares of yes, and half-precision scores give a float32 loss. Unlike
    ``LabelSmoothingLoss`` it cannot tell targets that are smoothed already: one between 0 and 1 may as well be mixed,
    and that must be smoothed like the two that it came from. So it smooths everything, once; for a teacher's
    probabilities take ``smoothing=0``.

    When not to use it: with targets that are smoothed already, with many rare labels (ε/2 should stay well below a
    label's frequency: give each its own ε), or when calibrated probabilities are the product. It saves no time by
    itself: it can buy accuracy, and so epochs.

    Args:
        smoothing: ε in [0, 1). Or one for each class, ``(C,)``, along the second dimension of the scores.
        weight: Factor on each element's loss, broadcastable to the scores as in torch.
        pos_weight: Factor on the part of yes, 0 or more, broadcastable to the scores as in torch.
        reduction: ``"mean"`` (over all elements, as in torch), ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If an argument is out of range, or scores and targets do not fit together. Targets outside [0, 1]
            are found on a CPU only: elsewhere the device would have to be waited for in each step.

    Source:
        arXiv:1512.00567, section 7; when it helps: Müller et al., arXiv:1906.02629.

    Example:
        >>> scores, labels = torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1, 0, 1]])
        >>> BinaryLabelSmoothing(0.1)(scores, labels)
        tensor(0.4278)
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        smoothing: float | Sequence[float] | Tensor = 0.1,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(smoothing, reduction)
        for name, values in (("weight", weight), ("pos_weight", pos_weight)):
            if values is not None and not (isinstance(values, Tensor) and bool((values >= 0).all())):
                raise ValueError(f"Expected `{name}` to be a tensor of numbers >= 0, or None, but got {values}.")
            self.register_buffer(name, values)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            input: Scores (logits), ``(N, C, ...)``; with a number as ``smoothing`` any shape.
            target: 0 or 1, or anything between, shaped like ``input``; of any number type, plain or mixed by
                ``MixupCallback``.

        Returns:
            float32 (float64 for float64 scores): a scalar, or shaped like ``input`` with ``reduction="none"``.
        """
        input = input.to(torch.promote_types(input.dtype, torch.float32))
        _check_target(input, target)
        if isinstance(target, MixedLabels):
            target = F.one_hot(target.long(), 2)[..., 1]
        target = smooth_binary(target.to(input.dtype), self.epsilon(input))
        largest = torch.finfo(input.dtype).max / 2
        input = input.clamp(-largest, largest)  # torch multiplies it by 1 - target, and 0 times infinity is NaN
        weight, pos_weight = (part if part is None else part.to(input.dtype) for part in (self.weight, self.pos_weight))
        return F.binary_cross_entropy_with_logits(
            input, target, weight, pos_weight=pos_weight, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"smoothing={self.smoothing}, reduction={self.reduction!r}"


def _check_target(input: Tensor, target: Tensor) -> None:
    """Refuse another shape; look at the values where that is free, on a CPU and in no graph."""
    if target.shape != input.shape:
        raise ValueError(
            f"Expected `target` of the shape of the scores, {tuple(input.shape)}, but got {tuple(target.shape)}. Class "
            "labels become yes or no for each class by `F.one_hot(target, C).float()`."
        )
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    rounding = torch.finfo(target.dtype).eps if target.is_floating_point() else 0.0
    if not ((target >= -rounding) & (target <= 1 + rounding)).all():
        raise ValueError(f"Expected `target` in [0, 1], but got values from {target.min():g} to {target.max():g}.")
