"""How the learning rate follows the batch size (Goyal et al., arXiv:1706.02677; √k for Adam: Malladi et al.,
arXiv:2205.10287).
"""

from __future__ import annotations

import math
from typing import Literal

Rule = Literal["auto", "linear", "sqrt"]


def scaling_factor(ratio: float, rule: Rule, optimizer_name: str) -> float:
    """Return how much the learning rate grows when the batch does.

    Args:
        ratio: Effective batch size over base batch size, above 0.
        rule: ``"linear"``: the ratio; ``"sqrt"``: its root; ``"auto"``: the root for optimizers of the Adam family.
        optimizer_name: Class name of the optimizer.

    Example:
        >>> scaling_factor(4.0, "auto", "SGD"), scaling_factor(4.0, "auto", "AdamW")
        (4.0, 2.0)
    """
    if rule == "auto":
        # Adam, AdamW, NAdam, Adagrad, Adadelta, Adafactor, LAMB: those that divide by a second moment.
        rule = "sqrt" if any(part in optimizer_name.lower() for part in ("ada", "lamb")) else "linear"
    return math.sqrt(ratio) if rule == "sqrt" else ratio
