"""What losses with label smoothing share: ε, one for all classes or one for each, and a factor that a schedule sets."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_speedups.core.arguments import check_choice, check_number, plain
from lightning_speedups.core.counts import counted

Reduction = Literal["none", "mean", "sum"]


def as_smoothing(smoothing: float | Sequence[float] | Tensor) -> float | Tensor:
    """Check ε and return it: a number as it is, one for each class as a new tensor ``(C,)`` of torch's default type.

    Args:
        smoothing: ε in [0, 1), or one for each class.

    Raises:
        ValueError: If it is neither, or if an ε is out of range.

    Example:
        >>> as_smoothing(0.1), as_smoothing([0.0, 0.5])
        (0.1, tensor([0.0000, 0.5000]))
    """
    if isinstance(plain(smoothing), Real):
        number: float = check_number("smoothing", smoothing, 0, 1, below=True)
        return number
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    numbers = smoothing.tolist() if hasattr(smoothing, "tolist") else smoothing
    if not isinstance(numbers, (list, tuple)) or not numbers:
        rule = "a number in [0, 1), or such numbers for all classes, (C,)"
        raise ValueError(f"Expected `smoothing` to be {rule}, but got {smoothing!r}.")
    for place, number in enumerate(numbers):
        check_number(f"smoothing[{place}]", number, 0, 1, below=True)
        check_number(f"smoothing[{place}]", torch.tensor(number, dtype=dtype).item(), 0, 1, below=True)  # as it is kept
    return torch.tensor(numbers, dtype=dtype)


class Smoothing(nn.Module):
    """Base of the losses that smooth labels.

    ``smoothing`` is ε as it was given; one for each class is a buffer that moves with the module and is no part of
    checkpoints. ``strength`` multiplies it while a schedule runs: None for 1, else a tensor without dimensions, as
    torch.compile would compile a number anew for each of its values.

    Args:
        smoothing: ε in [0, 1), or one for each class, ``(C,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    smoothing: float | Tensor
    strength: Tensor | None

    def __init__(self, smoothing: float | Sequence[float] | Tensor, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        self.reduction, self.strength = reduction, None
        checked = as_smoothing(smoothing)
        if isinstance(checked, Tensor):
            self.register_buffer("smoothing", checked, persistent=False)
        else:
            self.smoothing = checked

    @property
    def highest(self) -> float:
        """The largest ε, before any schedule."""
        return float(self.smoothing.max()) if isinstance(self.smoothing, Tensor) else self.smoothing

    def epsilon(self, scores: Tensor) -> float | Tensor:
        """Return ε as it now stands for these scores.

        Args:
            scores: ``(N, C, ...)``.

        Returns:
            The number that was given; or a tensor in the scores' precision and place, ``()`` while a schedule changes
            it, ``(C,)`` with one for each class.

        Raises:
            ValueError: If the scores have another number of classes.
        """
        smoothing = self.smoothing
        if isinstance(smoothing, Tensor):
            if scores.ndim < 2 or scores.shape[1] != len(smoothing):
                raise ValueError(
                    f"Expected scores of shape (N, {len(smoothing)}, ...) for a `smoothing` of "
                    f"{counted(len(smoothing), 'value')}, one for each class, but got {tuple(scores.shape)}."
                )
            smoothing = smoothing.to(scores)
        return smoothing if self.strength is None else smoothing * self.strength.to(scores)
