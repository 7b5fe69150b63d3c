"""Newton–Schulz against the singular value decomposition, and against one iteration after the other in float64."""

import math

import pytest
import torch
from torch.optim._muon import _adjust_lr

from lightning_speedups.core.orthogonal import (
    COEFFICIENTS,
    fast_dtype,
    iterations_together,
    orthogonalized,
    update_scale,
)

SHAPES = [(7, 7), (8, 72), (72, 8), (64, 27), (3, 500), (1, 5)]


def one_by_one(matrix, steps):
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def drawn(shape, batch=3, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_matrix_of_a_batch_goes_through_the_iterations_alone(shape, steps):
    matrices = drawn(shape)
    matrices[1] *= 1e-4
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 2e-4), (torch.bfloat16, 0.2)):
        found = orthogonalized(matrices, steps, dtype)
        assert found.dtype == dtype
        for result, matrix in zip(found, matrices, strict=True):
            expected = one_by_one(matrix, steps)
            assert (result.double() - expected).norm() <= near * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_to_one(shape):
    matrices = drawn(shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalized(matrices, 5, torch.float32) @ right.mT
    assert (values - values.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-3
    assert 0.65 < values.diagonal(dim1=1, dim2=2).min() <= values.diagonal(dim1=1, dim2=2).max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_a_low_rank_or_is_zero_stays_finite(dtype):
    low = drawn((64, 2)) @ drawn((2, 576), seed=1)
    low[2] = 0
    found = orthogonalized(low, 5, dtype)
    assert found.isfinite().all()
    assert not found[2].any()
    assert torch.linalg.svdvals(found.float()).max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_or_overflows_shows_in_its_own_matrix_and_tiny_values_rest(dtype):
    matrices = drawn((8, 72), batch=5)
    matrices[1, 0, 0] = math.nan
    matrices[2, 0, 0] = math.inf
    matrices[3] *= 1e20
    matrices[4] *= 1e-30
    found = orthogonalized(matrices, 5, dtype)
    assert found[1:4].isnan().all()
    torch.testing.assert_close(found[:1], orthogonalized(matrices[:1], 5, dtype))
    assert found[4].abs().max() < 1e-15


def test_wide_matrices_are_multiplied_once_and_square_ones_each_time():
    for rows, columns, steps, most in [(64, 576, 5, 5), (192, 192, 5, 5), (192, 576, 5, 2), (10, 20, 3, 5)]:
        ways = list(iterations_together(rows, columns, steps, most))
        assert sum(ways) == steps
        assert max(ways) <= most

        def operations(ways, rows=rows, columns=columns):
            return sum(4 * rows**2 * columns + (8 * n - 6) * rows**3 for n in ways)

        assert operations(ways) <= operations([1] * steps)


def test_what_is_computed_in_is_what_is_fast():
    assert fast_dtype("cuda", 8) == torch.bfloat16
    assert fast_dtype("cpu", 8) == torch.float32
    assert orthogonalized(drawn((8, 8))).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_scales_are_torchs(shape):
    for scale in ("original", "match_rms_adamw"):
        assert update_scale(*shape, scale) == pytest.approx(_adjust_lr(1.0, scale, shape))
    assert math.isclose(update_scale(*shape, "original"), max(1, shape[0] / shape[1]) ** 0.5)


@torch.no_grad()
def test_it_compiles_without_a_break():
    compiled = torch.compile(orthogonalized, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(drawn((8, 72))), orthogonalized(drawn((8, 72))))
