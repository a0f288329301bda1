"""Iso-C: by hand, against LAPACK, its spectrum, and sums without full rank."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import adapters, diagonal, gaussian, merge_factors, polar, products
from torch import Tensor

from personae import IsoC


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return IsoC(**settings)(task_vectors, name=name)


def test_hand_worked():
    # The sum diag(6, -2) has singular values 6 and 2, mean 4, and U Vᵀ = diag(1, -1).
    task_vectors = diagonal([6.0, 1.0], [0.0, -3.0])
    torch.testing.assert_close(merge(task_vectors), diagonal([4.0, -4.0])[0])
    torch.testing.assert_close(merge(task_vectors, scale=1.5), diagonal([6.0, -6.0])[0])
    # Without full rank: 6 and 2 spread over three directions, or over the two there are; nothing
    # in the third direction either way.
    task_vectors = diagonal([6.0, 0.0, 1.0], [0.0, 2.0, -1.0])
    spread = 8 / 3
    torch.testing.assert_close(merge(task_vectors), diagonal([spread, spread, 0.0])[0])
    own = merge(task_vectors, average_over="rank")
    torch.testing.assert_close(own, diagonal([4.0, 4.0, 0.0])[0])


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9)])
def test_equals_lapack(shape: tuple[int, int]):
    task_vectors = gaussian(3, *shape)
    total = task_vectors.double().sum(dim=0).numpy()
    mean = np.linalg.svd(total, compute_uv=False).mean()
    expected = torch.from_numpy(1.5 * mean * polar(total)).float()
    torch.testing.assert_close(merge(task_vectors, scale=1.5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 20])
def test_flat_spectrum_with_the_nuclear_norm_of_the_sum(rank: int):
    """Property 14, with full rank and without."""
    task_vectors = products(adapters(2, 30, 40, rank))
    directions = min(2 * rank, 30)
    values = torch.linalg.svdvals(merge(task_vectors, average_over="rank").double())
    expected = torch.linalg.svdvals(task_vectors.double().sum(dim=0))
    assert float(values.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert float(values[0]) == pytest.approx(float(values[directions - 1]), rel=1e-5)
    assert float(values[directions:].sum()) == pytest.approx(0, abs=1e-4)


def test_rounding_is_no_direction():
    """What centred vectors sum to is rounding; its directions must not be scaled up."""
    vectors = gaussian(5, 8, 12)
    vectors -= vectors.mean(dim=0)
    assert vectors.sum(dim=0).any()
    assert torch.equal(merge(vectors), torch.zeros(8, 12))


def test_other_tensors_are_averaged():
    task_vectors = gaussian(2, 4, 4)
    mean = 2 * task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors, "text_projection.weight", scale=2.0), mean)
    assert torch.equal(merge(task_vectors[:, 0], "bias", scale=2.0), mean[0])
    assert torch.equal(merge(task_vectors, "wte.weight", scale=2.0, tensors="linear"), mean)
    assert not torch.equal(merge(task_vectors, "wte.weight", scale=2.0), mean)


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (40, 7)])
def test_adapters_as_factors(shape: tuple[int, int]):
    factors = adapters(3, *shape, rank=3)
    torch.testing.assert_close(
        merge_factors("iso_c", factors), merge(products(factors)), rtol=1e-4, atol=1e-4
    )
