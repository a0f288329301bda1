"""DC-Merge: by hand, and against its formula in fp64 with LAPACK."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import adapters, diagonal, gaussian, merge_factors, polar, products
from torch import Tensor

from personae import DCMerge


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return DCMerge(**settings)(task_vectors, name=name)


def smoothed(values: np.ndarray, smoothing: str, rho: float) -> np.ndarray:
    if smoothing == "none":
        return values
    ratio = 1.0 if smoothing == "average" else min(rho, values[0] / values[-1])
    shares = np.linspace(ratio, 1, len(values))
    return values.sum() * shares / shares.sum()


def naive(
    task_vectors: Tensor,
    density: float,
    rank: int | None = None,
    smoothing: str = "none",
    rho: float = 5.0,
) -> Tensor:
    """The formula as it is written, an entry at a time where it is about entries."""
    vectors = task_vectors.double().numpy()
    experts, k = len(vectors), rank or min(vectors.shape[1:]) // len(vectors)
    lefts, rights, cut = [], [], []
    for vector in vectors:
        u, s, vh = np.linalg.svd(vector, full_matrices=False)
        lefts.append(u[:, :k])
        rights.append(vh[:k])
        cut.append((u[:, :k] * smoothed(s[:k], smoothing, rho)) @ vh[:k])
    left, right = polar(np.concatenate(lefts, axis=1)), polar(np.concatenate(rights))
    coordinates = []
    for vector in cut:
        own = left.T @ vector @ right.T
        least = np.sort(np.abs(own), axis=None)[-max(1, int(density * own.size))]
        coordinates.append(np.where(np.abs(own) >= least, own, 0))
    merged = np.zeros_like(coordinates[0])
    for row, column in np.argwhere(np.any(coordinates, axis=0)):
        entries = [own[row, column] for own in coordinates]
        agree = [e for e in entries if np.sign(e) == np.sign(sum(entries)) != 0]
        if row // k == column // k and agree:
            merged[row, column] = np.mean(agree)
    assert experts * k == len(merged)
    return torch.from_numpy(left @ merged @ right).float()


def test_hand_worked():
    # Each has one direction of two: (4, 0) and (0, 6) along the axes, which are orthogonal; so
    # M_1 has 4 in the first corner and M_2 has 6 in the last, and the sum comes out.
    task_vectors = diagonal([4.0, 1.0], [2.0, -6.0])
    torch.testing.assert_close(merge(task_vectors, density=0.25), diagonal([4.0, -6.0])[0])
    torch.testing.assert_close(
        merge(task_vectors, density=0.25, scale=0.5), diagonal([2.0, -3.0])[0]
    )


def test_smoothing_by_hand():
    # One expert with values 6, 3, 1: their mean is 10/3; falling evenly from a ratio of 4, the
    # shares are 4, 2.5 and 1 of 7.5; a ratio of 9 is more than the 6 there is.
    task_vectors = diagonal([6.0, 3.0, 1.0])
    mean = 10 / 3
    expected = diagonal([mean, mean, mean])[0]
    torch.testing.assert_close(merge(task_vectors, density=1.0, smoothing="average"), expected)
    linear = merge(task_vectors, density=1.0, smoothing="linear", rho=4.0)
    torch.testing.assert_close(linear, diagonal([40 / 7.5, 25 / 7.5, 10 / 7.5])[0])
    capped = merge(task_vectors, density=1.0, smoothing="linear", rho=9.0)
    torch.testing.assert_close(capped, diagonal([60 / 10.5, 35 / 10.5, 10 / 10.5])[0])


CASES: list[dict[str, Any]] = [
    {"density": 0.05},
    {"density": 1.0},
    {"density": 0.1, "rank": 2},
    {"density": 0.1, "smoothing": "average"},
    {"density": 0.1, "smoothing": "linear", "rho": 2.0},
]


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_equals_the_formula(shape: tuple[int, int], settings: dict[str, Any]):
    task_vectors = gaussian(3, *shape)
    expected = naive(task_vectors, **settings)
    torch.testing.assert_close(merge(task_vectors, **settings), expected, rtol=1e-4, atol=1e-5)


def test_equals_the_formula_at_the_size_of_a_layer():
    task_vectors = gaussian(3, 768, 768)
    expected = naive(task_vectors, density=1e-3)
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1e-4)


def test_signs_of_singular_vectors_and_turned_spaces_do_not_matter():
    task_vectors = gaussian(3, 12, 15)
    turn = torch.linalg.qr(gaussian(1, 15, 15)[0])[0]
    expected = merge(task_vectors, density=0.1) @ turn
    torch.testing.assert_close(merge(task_vectors @ turn, density=0.1), expected, atol=1e-4, rtol=0)


def test_other_tensors_are_averaged():
    task_vectors = gaussian(2, 4, 4)
    mean = 2 * task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors, "text_projection.weight", scale=2.0), mean)
    assert torch.equal(merge(task_vectors[:, 0], "bias", scale=2.0), mean[0])
    assert torch.equal(merge(gaussian(3, 2, 9)), gaussian(3, 2, 9).mean(dim=0))


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (40, 7)])
def test_adapters_as_factors(shape: tuple[int, int]):
    factors = adapters(3, *shape, rank=3)
    torch.testing.assert_close(
        merge_factors("dc_merge", factors), merge(products(factors)), rtol=1e-4, atol=1e-4
    )
