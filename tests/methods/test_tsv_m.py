"""TSV-M: by hand, against LAPACK step by step, and where directions coincide."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import adapters, diagonal, gaussian, leading, merge_factors, polar, products
from torch import Tensor

from personae import TSVM


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return TSVM(**settings)(task_vectors, name=name)


def naive(task_vectors: Tensor, scale: float = 1.0) -> np.ndarray:
    """The published steps: fill Ũ, σ̃, Ṽ share by share, then two more decompositions."""
    matrices = task_vectors.double().numpy()
    rank = min(matrices[0].shape) // len(matrices)
    parts = [leading(matrix, rank) for matrix in matrices]
    left = polar(np.concatenate([u for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([vh for _, _, vh in parts]))
    return scale * left @ np.diag(np.concatenate([s for _, s, _ in parts])) @ right


def test_hand_worked_orthogonal_tasks():
    # Two experts, two directions: one each. The leading ones are e1 with 4 and e2 with 3.
    task_vectors = diagonal([4.0, 1.0], [2.0, 3.0])
    torch.testing.assert_close(merge(task_vectors), diagonal([4.0, 3.0])[0])
    torch.testing.assert_close(merge(task_vectors, scale=0.5), diagonal([2.0, 1.5])[0])


def test_hand_worked_whitening():
    # 5 e eᵀ and 10 u uᵀ with e = (1, 0), u = (0.6, 0.8). Their bisector is (2, 1)/√5; the nearest
    # orthonormal pair lies 45° to either side of it: (3, -1)/√10 and (1, 3)/√10. Hence
    # 5/10 [[9, -3], [-3, 1]] + 10/10 [[1, 3], [3, 9]] = [[5.5, 1.5], [1.5, 9.5]].
    u = torch.tensor([0.6, 0.8])
    task_vectors = torch.stack([torch.tensor([[5.0, 0.0], [0.0, 0.0]]), 10 * torch.outer(u, u)])
    torch.testing.assert_close(merge(task_vectors), torch.tensor([[5.5, 1.5], [1.5, 9.5]]))


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9), (70, 300)])
@pytest.mark.parametrize("experts", [2, 3])
def test_equals_the_published_steps(shape: tuple[int, int], experts: int):
    task_vectors = gaussian(experts, *shape)
    expected = torch.from_numpy(naive(task_vectors, scale=1.5)).float()
    torch.testing.assert_close(merge(task_vectors, scale=1.5), expected, rtol=1e-3, atol=1e-3)


def test_orthogonal_subspaces_add_up():
    """Property 13: the sum of the truncated deltas."""
    left, _ = torch.linalg.qr(gaussian(12, 12).double())
    right, _ = torch.linalg.qr(gaussian(16, 12, seed=1).double())
    task_vectors = torch.stack(
        [
            (left[:, n : n + 4] * torch.tensor([9.0, 8.0, 7.0, 6.0])) @ right[:, n : n + 4].T
            for n in (0, 4, 8)
        ]
    ).float()  # k = 12 / 3 = 4: nothing is cut off
    torch.testing.assert_close(merge(task_vectors), task_vectors.sum(dim=0), rtol=0, atol=1e-5)


def test_copies_give_back_their_leading_part():
    """No direction is made up: three times the same [U U U]/√3 sums to one."""
    task_vectors = gaussian(9, 12).repeat(3, 1, 1)
    u, values, vh = leading(task_vectors[0].double().numpy(), 3)
    expected = torch.from_numpy(u * values @ vh).float()
    torch.testing.assert_close(merge(task_vectors), expected, rtol=0, atol=1e-5)


def test_one_expert_is_itself():
    task_vectors = gaussian(1, 6, 9)
    torch.testing.assert_close(merge(task_vectors), task_vectors[0], rtol=0, atol=1e-5)


def test_tensors_that_are_averaged():
    task_vectors = gaussian(2, 4, 4)
    mean = task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors, "text_projection.weight"), mean)
    embedding = "token_embedding.weight"
    assert not torch.equal(merge(task_vectors, embedding), mean)
    assert torch.equal(merge(task_vectors, embedding, tensors="linear"), mean)
    assert torch.equal(merge(task_vectors[:, 0], "bias", scale=2.0), 2 * mean[0])
    # More experts than rows: no direction for each.
    row = gaussian(2, 1, 5)
    assert torch.equal(merge(row), row.mean(dim=0))


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (40, 7)])
def test_adapters_as_factors(shape: tuple[int, int]):
    """k = 13 or 2 of the whole tensor: above the adapters' rank, or below it."""
    factors = adapters(3, *shape, rank=3)
    torch.testing.assert_close(
        merge_factors("tsv_m", factors), merge(products(factors)), rtol=1e-4, atol=1e-4
    )
