"""Iso-CTS: by hand, against LAPACK step by step, and adapters."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import adapters, diagonal, gaussian, leading, merge_factors, polar, products
from torch import Tensor

from personae import IsoC, IsoCTS
from personae.methods.merge.iso_cts import shares


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return IsoCTS(**settings)(task_vectors, name=name)


def naive(task_vectors: Tensor, fraction: float) -> np.ndarray:
    """The published steps, for sums of full rank."""
    matrices = task_vectors.double().numpy()
    directions, experts = min(matrices[0].shape), len(matrices)
    rest = round((directions - int(directions * fraction)) / experts) * experts
    common, values, vh = leading(matrices.sum(axis=0), directions - rest)
    lefts, sizes, rights = [common], [values], [vh]
    for matrix in matrices:
        u, values, vh = leading(matrix - common @ (common.T @ matrix), rest // experts)
        lefts.append(u)
        sizes.append(values)
        rights.append(vh)
    mean = np.concatenate(sizes).mean()
    return mean * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights))


def test_hand_worked():
    # Two experts, four directions, half of them common. Sum diag(12, 8, 1, 2): e1, e2 are common.
    # What is left, diag(3, -1) and diag(-2, 3) of e3, e4: e3 with 3, e4 with 3.
    # The mean of 12, 8, 3, 3 is 6.5 (Iso-C: of 12, 8, 1, 2).
    task_vectors = diagonal([8.0, 2.0, 3.0, -1.0], [4.0, 6.0, -2.0, 3.0])
    expected = diagonal([6.5, 6.5, 6.5, 6.5])[0]
    torch.testing.assert_close(merge(task_vectors, common_fraction=0.5), expected)
    merged = merge(task_vectors, common_fraction=0.5, scale=2.0)
    torch.testing.assert_close(merged, 2 * expected)


@pytest.mark.parametrize(
    ("directions", "experts", "expected"),
    [
        (768, 8, (616, 19)),  # 614 of 768 leave 154: 8 · 19 = 152 is nearest
        (10, 2, (8, 1)),
        (10, 3, (7, 1)),
        (4, 5, (4, 0)),
    ],
)
def test_shares(directions: int, experts: int, expected: tuple[int, int]):
    assert shares(directions, experts, 0.8) == expected


def test_shares_never_exceed_what_there_is():
    assert shares(10, 4, 0.0) == (2, 2)  # 10 / 4 rounds to 2
    assert shares(11, 4, 0.0) == (3, 2)  # 2.75 would round to 3, and 4 · 3 > 11
    assert shares(10, 4, 1.0) == (10, 0)


@pytest.mark.parametrize("shape", [(20, 20), (20, 33), (33, 20)])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 1.0])
def test_equals_the_published_steps(shape: tuple[int, int], fraction: float):
    task_vectors = gaussian(3, *shape)
    expected = torch.from_numpy(naive(task_vectors, fraction)).float()
    merged = merge(task_vectors, common_fraction=fraction)
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


def test_adapters_whose_sum_spans_all_of_them_merge_as_by_iso_c():
    task_vectors = products(adapters(3, 30, 40, rank=2))  # rank 6 of the sum, 24 common directions
    expected = IsoC()(task_vectors)
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1e-4)


def test_other_tensors_are_averaged():
    task_vectors = gaussian(2, 4, 4)
    mean = 2 * task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors, "text_projection.weight", scale=2.0), mean)
    assert torch.equal(merge(task_vectors[:, 0], "bias", scale=2.0), mean[0])
    assert torch.equal(merge(task_vectors, "wte.weight", scale=2.0, tensors="linear"), mean)


@pytest.mark.parametrize("fraction", [0.1, 0.8])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (40, 7)])
def test_adapters_as_factors(shape: tuple[int, int], fraction: float):
    factors = adapters(3, *shape, rank=3)
    merged = merge_factors("iso_cts", factors, common_fraction=fraction)
    expected = merge(products(factors), common_fraction=fraction)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
