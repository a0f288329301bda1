"""ACE-Merging: by hand, and against the authors' formula in fp64 with LAPACK."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import gaussian
from torch import Tensor

from personae import ACEMerging
from personae.methods import MERGE_METHODS, Site, build


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return ACEMerging(**settings)(task_vectors, name=name)


def naive(
    task_vectors: Tensor, epsilon: float = 1e-2, threshold: float = 0.3, fraction: float = 0.3
) -> tuple[Tensor, bool]:
    """The formula as it is written, with an inverse; and whether norms are uneven."""
    vectors = [vector.double().numpy() for vector in task_vectors]
    size = vectors[0].shape[1]
    traces = np.array([np.trace(vector.T @ vector) for vector in vectors])
    logs = np.log(traces + 1e-12)
    uneven = logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > threshold
    sigmas, weighted, total = [], np.zeros_like(vectors[0]), np.zeros((size, size))
    for vector in vectors:
        centred = vector - vector.mean(axis=0, keepdims=True)
        sigma = centred.T @ centred
        trace = np.trace(sigma) + 1e-12
        divisor = trace if uneven else 1.0
        sigmas.append(sigma / divisor)
        own = sigma / divisor + epsilon / divisor * np.eye(size)
        weighted, total = weighted + centred @ own, total + own
    row = np.sum(sigmas, axis=0).mean(axis=0, keepdims=True)
    row = row / (traces.mean() + 1e-12) if uneven else row
    merged = weighted @ np.linalg.inv(total + row)
    if uneven:
        average = total / len(vectors)
        rest = sum(v @ (s - average) for v, s in zip(vectors, sigmas, strict=True))
        u, values, vh = np.linalg.svd(merged + rest, full_matrices=False)
        k = int(len(values) * fraction)
        merged = merged + values[:k].mean() * (u[:, :k] @ vh[:k])
    return torch.from_numpy(merged).float(), bool(uneven)


def test_hand_worked():
    # One expert, rows (2, 0) and (-2, 0): the mean row is 0, the covariance diag(8, 0), c the
    # mean of its rows, (4, 0). With ε = 1: (9, 0) along the one direction over 9 + 4.
    task_vectors = torch.tensor([[[2.0, 0.0], [-2.0, 0.0]]])
    merged = merge(task_vectors, epsilon=1.0)
    # [9 + 4, 0; 4, 1] is the matrix; (2·9, 0) times its inverse is (18 / 13, 0).
    torch.testing.assert_close(merged, torch.tensor([[18 / 13, 0.0], [-18 / 13, 0.0]]))


SCALES = {"even": [1.0, 1.1, 0.9], "uneven": [0.05, 0.6, 0.2]}


@pytest.mark.parametrize("shape", [(10, 10), (8, 14), (14, 8)])
@pytest.mark.parametrize("scales", SCALES)
def test_equals_the_formula(shape: tuple[int, int], scales: str):
    task_vectors = gaussian(3, *shape) * torch.tensor(SCALES[scales])[:, None, None]
    expected, uneven = naive(task_vectors)
    assert uneven == (scales == "uneven")
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1e-5)
    doubled = merge(task_vectors, scale=2.0, epsilon=0.5)
    torch.testing.assert_close(doubled, 2 * naive(task_vectors, 0.5)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms", [[3e-2, 2e-2, 1e-2], [3e-3, 2e-2, 9e-1]])
def test_equals_the_formula_at_the_size_of_a_layer(norms: list[float]):
    task_vectors = gaussian(3, 768, 768) / 768 * torch.tensor(norms)[:, None, None]
    expected, _ = naive(task_vectors)
    largest = float(expected.abs().max())
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1e-5 * largest)


def test_experts_without_a_change_have_no_part():
    task_vectors = gaussian(3, 6, 7)
    task_vectors[1] = 0
    expected, _ = naive(task_vectors[[0, 2]])
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merge(torch.zeros(2, 6, 7)), torch.zeros(6, 7))


def test_transposed_weights():
    """Stored (in, out): the same model as stored (out, in)."""
    built, task_vectors = build(MERGE_METHODS["ace_merging"], {}), gaussian(3, 5, 8)
    expected = built.apply(task_vectors, site=Site("a.weight", (5, 8)))
    stored = Site("a.weight", (8, 5), transposed=True)
    merged = built.apply(task_vectors.mT.contiguous(), site=stored)
    torch.testing.assert_close(merged.T, expected)


def test_other_tensors_are_averaged():
    task_vectors = gaussian(2, 4, 4)
    mean = 2 * task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors[:, 0], "bias", scale=2.0), mean[0])
    assert torch.equal(merge(task_vectors, "text_projection.weight", scale=2.0), mean)
