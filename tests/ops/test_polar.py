"""The polar factor against LAPACK, and where a matrix has not full rank."""

import pytest
import torch

from personae.ops.polar import polar_factor, sum_tolerance


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hand_worked():
    # [[3, 4], [0, 0]] = 5 · e1 (0.6, 0.8)ᵀ: one direction, σ = 5.
    factor, values = polar_factor(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1e-6)
    torch.testing.assert_close(factor.float(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(values.float(), torch.tensor([5.0]))


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (1, 4)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_equals_lapack(shape: tuple[int, int], size: float):
    matrix = size * gaussian(*shape)
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    factor, found = polar_factor(matrix, 1e-6 * size)
    torch.testing.assert_close(factor, u @ vh, rtol=0, atol=1e-7)
    torch.testing.assert_close(found, values, rtol=1e-7, atol=0)


def test_ill_conditioned():
    """Singular values over six decades: every direction counts the same."""
    u, _ = torch.linalg.qr(gaussian(20, 20).double())
    v, _ = torch.linalg.qr(gaussian(50, 20, seed=2).double())
    values = torch.logspace(0, -6, 20, dtype=torch.float64)
    factor, found = polar_factor(u * values @ v.T, 1e-7)
    torch.testing.assert_close(factor, u @ v.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.float(), values.float())


def test_directions_beneath_the_tolerance_stay_zero():
    left, right = gaussian(20, 3), gaussian(3, 30, seed=2)
    product = left @ right  # rank 3, and rounding
    factor, values = polar_factor(product, sum_tolerance([product]))
    assert len(values) == 3
    singular_values = torch.linalg.svdvals(factor.double())
    assert singular_values[:3].sub(1).abs().max() < 1e-6
    assert singular_values[3:].max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (0, 4), (4, 0)])
def test_zero_and_empty(shape: tuple[int, int]):
    factor, values = polar_factor(torch.zeros(shape), 0.0)
    assert torch.equal(factor, torch.zeros(shape, dtype=torch.float64))
    assert values.tolist() == []
