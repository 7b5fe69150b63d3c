"""Matrices made nearly orthogonal by Newton–Schulz iterations, as Muon's updates are (Jordan, 2024).

An iteration multiplies X by a polynomial of its Gram matrix A = X·Xᵀ, which is small where X is wide. So several
iterations can be done on A alone before X itself is multiplied: fewer operations, and all of them exact in real
numbers. Rounding in A grows with every iteration until X is looked at again, so half precision does two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

# https://github.com/KellerJordan/Muon: steepest at zero, so that few iterations do; singular values end near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOST_STEPS = 5
"""Iterations beyond these do not come nearer to 1."""
EPS = 1e-7
SMALL = 128
"""Rows up to which a processor is as fast in float32."""
# Asked once: a compiled function cannot.
HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
"""Whether this processor multiplies in bfloat16."""
Scale = Literal["original", "match_rms_adamw"]


def orthogonalized(matrices: Tensor, steps: int = MOST_STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """Return matrices with the same singular vectors, and singular values near 1 (0.7 to 1.2 after five iterations).

    Args:
        matrices: ``(batch, rows, columns)``, of floating point.
        steps: Newton–Schulz iterations, 1 to 5.
        dtype: What is computed in; None: what is fast on the device.

    Returns:
        The same shape, in the type that was computed in; not a number, if a matrix is not finite, or its norm is none.

    Example:
        >>> stretched = torch.diag(torch.tensor([4.0, 2.0, 1.0])).unsqueeze(0)
        >>> [round(value, 2) for value in orthogonalized(stretched, dtype=torch.float64).diagonal(0, 1, 2)[0].tolist()]
        [0.82, 1.13, 0.7]
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x: Tensor = (matrices.mT if is_tall else matrices).to(
        dtype or fast_dtype(matrices.device.type, min(matrices.shape[1:]))
    )
    # A norm that overflows must not end as a step of zero.
    norm = x.norm(dim=(1, 2), keepdim=True).nan_to_num(math.nan, math.nan)
    x = x.div(norm.clamp_min(EPS))
    for together in iterations_together(x.size(1), x.size(2), steps, 5 if x.dtype.itemsize > 2 else 2):
        gram = x @ x.mT
        product = factor = _factor(gram)
        for _ in range(together - 1):
            gram = factor @ gram @ factor
            factor = _factor(gram)
            product = factor @ product
        x = product @ x
    return x.mT if is_tall else x


def _factor(gram: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def iterations_together(rows: int, columns: int, steps: int, most: int) -> Iterator[int]:
    """Return how many iterations are done on the Gram matrix before the matrix is multiplied, until all are done.

    Args:
        rows: Rows of a wide matrix.
        columns: Columns.
        steps: Iterations in all.
        most: Most that rounding allows at a time.

    Example:
        >>> list(iterations_together(64, 576, 5, 5)), list(iterations_together(64, 64, 3, 5))
        ([5], [1, 1, 1])
        >>> list(iterations_together(64, 576, 5, 2))
        [2, 2, 1]
    """
    while steps:
        # Operations of n of them, over rows²: twice X·Xᵀ's, and products of small matrices.
        together = min(range(1, min(steps, most) + 1), key=lambda n: (4 * columns + (8 * n - 6) * rows) / n)
        yield together
        steps -= together


def fast_dtype(device: str, rows: int) -> torch.dtype:
    """Return the type in which a kind of device multiplies matrices fast.

    That is bfloat16, but on processors without instructions for it, and for small matrices on any processor.

    Args:
        device: ``"cuda"``, ``"cpu"`` …
        rows: The matrix's shorter side.

    Example:
        >>> fast_dtype("cuda", 64), fast_dtype("cpu", 64)
        (torch.bfloat16, torch.float32)
    """
    is_fast = device != "cpu" or (HAS_BFLOAT16 and rows > SMALL)
    return torch.bfloat16 if is_fast else torch.float32


def update_scale(rows: int, columns: int, scale: Scale) -> float:
    """Return what an orthogonal update is multiplied by, beside the rate.

    Args:
        rows: Outputs of the matrix.
        columns: Inputs.
        scale: ``"original"``: √max(1, rows/columns). ``"match_rms_adamw"``: 0.2·√max(rows, columns), so that the
            update is as large as AdamW's and its rate can stay (Liu et al., arXiv:2502.16982).

    Example:
        >>> update_scale(400, 100, "original"), update_scale(400, 100, "match_rms_adamw")
        (2.0, 4.0)
    """
    if scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
