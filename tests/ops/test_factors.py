"""Products of thin factors against LAPACK's SVD of the product in fp64."""

import pytest
import torch

from personae.ops.factors import (
    balanced,
    energies,
    product_energies,
    smallest_rank,
    truncated_product,
)
from personae.ops.svd import truncated_svd

SHAPES = [(30, 20, 5), (20, 30, 5), (6, 40, 9), (9, 9, 9)]


def factors(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns, inner = shape
    draw = torch.Generator().manual_seed(sum(shape))
    left = torch.randn(rows, inner, generator=draw) * torch.logspace(0, -3, inner)
    return left, torch.randn(inner, columns, generator=draw)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_truncated_as_lapack_does(shape):
    left, right = factors(shape)
    u, values, vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    for rank in (1, 3, min(shape)):
        wanted = (u[:, :rank] * values[:rank]) @ vh[:rank]
        b, a = truncated_product(left, right, rank)
        assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
        torch.testing.assert_close(b.double() @ a.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))  # balanced
    found = product_energies(left, right)
    torch.testing.assert_close(found[: min(shape)], values.square()[: min(shape)][: len(found)])


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 7)])
def test_energies_are_the_squares_of_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(energies(matrix), torch.linalg.svdvals(matrix.double()).square())


def test_the_smallest_rank_by_hand():
    squares = torch.tensor([8.0, 4.0, 3.0, 1.0, 0.0])  # sums 8, 12, 15, 16, 16 of 16
    shares = {0.5: 1, 0.51: 2, 0.75: 2, 0.76: 3, 15 / 16: 3, 0.95: 4, 1.0: 4}
    assert {share: smallest_rank(squares, share) for share in shares} == shares
    assert smallest_rank(torch.zeros(3), 0.5) == 0


def test_balanced_factors_of_a_decomposition():
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    left, right = balanced(truncated_svd(matrix, 8))
    torch.testing.assert_close(left @ right, matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
