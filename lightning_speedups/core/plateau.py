"""When a metric stands still, or is where it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_speedups.core.arguments import check_choice, check_number, make_plain

Mode = Literal["min", "max"]


def is_reached(value: float | Tensor, target: float, mode: Mode) -> bool:
    """Tell whether a metric is at its target, in the metric's own precision; NaN never is.

    Args:
        value: The metric, a floating-point tensor or a number.
        target: The value to reach.
        mode: ``"max"``: at least the target; ``"min"``: at most.

    Example:
        >>> is_reached(0.91, 0.9, "max"), is_reached(0.91, 0.9, "min"), is_reached(float("nan"), 0.9, "max")
        (True, False, False)
        >>> import torch
        >>> is_reached(torch.tensor(0.9), 0.9, "max")
        True
    """
    if isinstance(value, Tensor):
        value = value.cpu()  # where torch takes the target in the tensor's precision
    return bool(value >= target if mode == "max" else value <= target)


@dataclass(frozen=True)
class Plateau:
    """A logged metric that has not improved for some time.

    Attributes:
        monitor: Name of the metric.
        mode: Whether it shall become ``"min"`` or ``"max"``.
        patience: How many times in a row it must not have improved, 1 or more.
        min_delta: What counts as an improvement, 0 or more.

    Raises:
        ValueError: If one of them is out of range.

    Example:
        >>> plateau, best, waited = Plateau("val_loss", patience=2), float("inf"), 0
        >>> for value in (3.0, 2.0, 2.5, 2.0):
        ...     best, waited, is_due = plateau.seen(value, best, waited)
        ...     print(best, waited, is_due)
        3.0 0 False
        2.0 0 False
        2.0 1 False
        2.0 2 True
    """

    monitor: str
    mode: Mode = "min"
    patience: int = 1
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"Expected `monitor` to be the name of a metric, but got {self.monitor!r}.")
        check_choice("mode", self.mode, get_args(Mode))
        check_number("patience", self.patience, 1, whole=True)
        check_number("min_delta", self.min_delta, 0)

    def seen(self, value: float, best: float, waited: int) -> tuple[float, int, bool]:
        """Return what one more value makes of the best one, of the waiting, and whether that has been long enough.

        Args:
            value: The metric; NaN is no improvement.
            best: The best one so far; of a metric that shall grow, its negative. Infinity before the first.
            waited: How many times in a row it has not improved.
        """
        value = value if self.mode == "min" else -value
        best, waited = (value, 0) if value < best - self.min_delta else (best, waited + 1)
        return best, waited, waited >= self.patience
