"""Breadcrumbs: by hand, against a sort in fp64, and where counts are cut short."""

from typing import Any

import numpy as np
import pytest
import torch
from registered import merged_as_model, mergekits, method_of

from personae import BreadcrumbsTIES
from personae.methods import MERGE_METHODS

#                     of ten entries 2 are too large (gamma 0.2), of the others the 3 largest kept
TASK_VECTORS = torch.tensor(
    [
        [9.0, -8.0, 7.0, 6.0, -5.0, 4.0, 3.0, 2.0, 1.0, 0.5],  # ->  0 0  7  6 -5  0  0 0 0 0
        [1.0, 2.0, -3.0, 6.5, 5.5, -4.5, 9.0, -8.0, 0.5, 0.0],  # -> 0 0  0 6.5 5.5 -4.5 0 0 0 0
    ]
)
SETTINGS: dict[str, Any] = {"density": 0.3, "gamma": 0.2}


def merge(method: str, task_vectors: torch.Tensor, **settings: Any) -> torch.Tensor:
    return method_of(MERGE_METHODS[method], **settings)(task_vectors, name="w")


def test_by_hand():
    # Weighted 1 and 2: 6 + 13, -5 + 11.
    merged = merge("breadcrumbs", TASK_VECTORS, weight=(1.0, 2.0), scale=0.5, **SETTINGS)
    assert merged.tolist() == [0, 0, 3.5, 9.5, 3, -4.5, 0, 0, 0, 0]
    # Signs + + + + -; means of what agrees: 7, (6 + 6.5) / 2, 5.5, -4.5.
    merged = merge("breadcrumbs_ties", TASK_VECTORS, **SETTINGS)
    assert merged.tolist() == [0, 0, 7, 6.25, 5.5, -4.5, 0, 0, 0, 0]
    settings: dict[str, Any] = {"weight": 1.0, **SETTINGS}
    merged = mergekits("breadcrumbs_ties", **settings)(TASK_VECTORS)
    assert merged.tolist() == [0, 0, 7, 12.5, 5.5, -4.5, 0, 0, 0, 0]


def test_density_goes_before_gamma_and_ties_are_kept():
    # 9 of 10 are kept: only one can be left out, whatever gamma.
    merged = merge("breadcrumbs", TASK_VECTORS[:1], density=0.9, gamma=0.5, scale=1.0)
    assert merged.tolist() == [0.0, *TASK_VECTORS[0, 1:].tolist()]
    whole = merge("breadcrumbs", TASK_VECTORS[:1], density=1.0, gamma=0.5, scale=1.0)
    assert torch.equal(whole, TASK_VECTORS[0])
    # One of 3 3 3 1 is left out and one kept: which of the three, nobody knows.
    tied = torch.tensor([[3.0, -3.0, 3.0, 1.0]])
    merged = merge("breadcrumbs", tied, density=0.25, gamma=0.25, scale=1.0)
    assert merged.tolist() == [3.0, -3.0, 3.0, 0.0]
    assert merge("breadcrumbs", torch.tensor([[5.0]]), scale=1.0).tolist() == [5.0]


@pytest.mark.parametrize("density", [0.05, 0.6])
@pytest.mark.parametrize("gamma", [0.0, 0.03])
def test_against_a_sort(density: float, gamma: float):
    stack = torch.randn(3, 170, 230, generator=torch.Generator().manual_seed(0)).exp()
    stack -= 1
    exact, entries = stack.double().flatten(1).numpy(), 170 * 230
    dropped, kept = int(gamma * entries), int(density * entries)
    left = np.zeros_like(exact)
    for row, out in zip(exact, left, strict=True):
        order = np.argsort(-np.abs(row))[dropped : dropped + kept]
        out[order] = row[order]
    merged = merge("breadcrumbs", stack, density=density, gamma=gamma, scale=1.0)
    np.testing.assert_allclose(
        merged.double().numpy().ravel(), left.sum(axis=0), rtol=1e-5, atol=1e-6
    )


def test_bounds_are_those_of_each_tensor():
    stacks = [TASK_VECTORS, 1000 * TASK_VECTORS]
    small, large = merged_as_model(method_of(MERGE_METHODS["breadcrumbs"], **SETTINGS), stacks)
    torch.testing.assert_close(large, 1000 * small)
    assert BreadcrumbsTIES().passes_over == "tensor"
