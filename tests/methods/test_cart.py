"""CART: by hand, against LAPACK, and where it is averaging."""

from typing import Any

import pytest
import torch
from matrices import adapters, diagonal, gaussian, leading, merge_factors, products
from torch import Tensor

from personae import CART


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return CART(**settings)(task_vectors, name=name)


def test_hand_worked():
    # Mean diag(3, 2), deviations diag(4, -1), diag(-2, 4), diag(-2, -3); at rank 1
    # diag(4, 0), diag(0, 4), diag(0, -3), in sum diag(4, 1): diag(3, 2) + 0.5 diag(4, 1).
    task_vectors = diagonal([7.0, 1.0], [1.0, 6.0], [1.0, -1.0])
    expected = diagonal([5.0, 2.5])[0]
    torch.testing.assert_close(merge(task_vectors, rank_fraction=0.5, scale=0.5), expected)


@pytest.mark.parametrize("shape", [(10, 10), (10, 25), (25, 10)])
def test_equals_lapack(shape: tuple[int, int]):
    task_vectors = gaussian(4, *shape)
    matrices = task_vectors.double().numpy()
    mean = matrices.mean(axis=0)
    expected = mean.copy()
    for matrix in matrices:
        u, values, vh = leading(matrix - mean, 3)
        expected += 0.7 * (u * values) @ vh
    merged = merge(task_vectors, rank_fraction=0.3, scale=0.7)
    torch.testing.assert_close(merged, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("experts", "rank_fraction"), [(4, 1.0), (2, 0.3), (1, 0.3)])
def test_averaging(experts: int, rank_fraction: float):
    """Property 12 at full rank; two deviations are opposite, one is 0."""
    task_vectors = gaussian(experts, 10, 12)
    merged = merge(task_vectors, rank_fraction=rank_fraction)
    torch.testing.assert_close(merged, task_vectors.mean(dim=0), rtol=0, atol=1e-5)


def test_relative_to_anything():
    """Vectors relative to base or average give one model."""
    task_vectors, shift = gaussian(3, 10, 12), gaussian(10, 12, seed=5)
    merged = merge(task_vectors, rank_fraction=0.3)
    shifted = merge(task_vectors - shift, rank_fraction=0.3)
    torch.testing.assert_close(shifted + shift, merged, rtol=0, atol=1e-4)


def test_other_tensors_are_averaged():
    task_vectors = gaussian(3, 4, 4)
    settings: dict[str, Any] = {"rank_fraction": 0.5, "scale": 2.0}
    mean = task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors, "text_projection.weight", **settings), mean)
    assert torch.equal(merge(task_vectors[:, 0], "bias", **settings), mean[0])
    assert torch.equal(merge(task_vectors, "wte.weight", **settings), mean)
    whole = merge(task_vectors, "wte.weight", tensors="matrices", **settings)
    assert torch.equal(whole, merge(task_vectors, **settings))


@pytest.mark.parametrize(
    ("experts", "rank_fraction", "scale"), [(8, 0.12, 2.0), (14, 0.16, 1.5), (20, 0.32, 1.9)]
)
def test_the_authors_choices_by_number_of_tasks(experts: int, rank_fraction: float, scale: float):
    task_vectors = gaussian(experts, 30, 40)
    chosen = merge(task_vectors, rank_fraction=rank_fraction, scale=scale)
    assert torch.equal(merge(task_vectors), chosen)
    assert not torch.equal(merge(task_vectors, scale=scale + 0.1), chosen)


def test_a_rank_is_at_least_one():
    task_vectors = gaussian(4, 6, 7)
    least = merge(task_vectors, rank_fraction=0.01)
    assert torch.equal(least, merge(task_vectors, rank_fraction=1 / 6))
    assert not torch.equal(least, merge(task_vectors, rank_fraction=2 / 6))


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (40, 7)])
def test_adapters_as_factors(shape: tuple[int, int]):
    factors = adapters(3, *shape, rank=3)
    merged = merge_factors("cart", factors, rank_fraction=0.2)
    expected = merge(products(factors), rank_fraction=0.2)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
