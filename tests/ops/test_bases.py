"""Joint bases against LAPACK, from either side."""

import pytest
import torch

from personae.ops.bases import joint_basis


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hand_worked():
    # [[0, 3, 0], [-1, 0, 0]]: e1 with 3, e2 with 1; both columns are made positive.
    matrices = [torch.tensor([[0.0, 3.0], [-1.0, 0.0]]), torch.tensor([[0.0], [0.0]])]
    basis, values = joint_basis(matrices)
    torch.testing.assert_close(basis, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(values, torch.tensor([3.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("widths", [(4, 5), (9, 3), (12, 12, 12), (1,)])
def test_equals_lapack(widths: tuple[int, ...]):
    matrices = [gaussian(12, width, seed=n) for n, width in enumerate(widths)]
    stack = torch.cat(matrices, dim=1).double()
    u, values, _ = torch.linalg.svd(stack, full_matrices=False)
    basis, found = joint_basis(matrices)
    torch.testing.assert_close(found, values)
    torch.testing.assert_close((basis * u).sum(dim=0).abs(), torch.ones_like(values))
    largest = basis.gather(0, basis.abs().argmax(dim=0)[None])
    assert (largest > 0).all()


def test_ill_conditioned_stack():
    """Seven decades by the Gram matrix: each vector to 1e-3, and orthonormal throughout."""
    u, _ = torch.linalg.qr(gaussian(15, 15).double())
    v, _ = torch.linalg.qr(gaussian(40, 15, seed=2).double())
    values = torch.logspace(0, -7, 15, dtype=torch.float64)
    basis, found = joint_basis((u * values @ v.T).split(20, dim=1))
    torch.testing.assert_close(
        (basis * u).sum(dim=0).abs(), torch.ones_like(values), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(basis.T @ basis, torch.eye(15, dtype=torch.float64))
    torch.testing.assert_close(found, values, rtol=1e-2, atol=0)


@pytest.mark.parametrize("columns", [2, 9])
def test_zero(columns: int):
    basis, values = joint_basis([torch.zeros(5, columns)])
    assert basis.isfinite().all()
    assert not values.any()
