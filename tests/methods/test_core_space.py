"""Core space: by hand, against the published steps, and rules that depend on no basis."""

from typing import Any

import numpy as np
import pytest
import torch
from gather import merge_model
from matrices import Factors, adapters, gaussian, merge_factors, products
from torch import Tensor

SHAPES = [(40, 50), (50, 40), (40, 7), (7, 40)]


def cores(factors: Factors) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """The published steps: SVD of all B side by side and of all A on top of each other."""
    lefts = [left.double().numpy() for left, _ in factors]
    rights = [right.double().numpy() for _, right in factors]
    u = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)[0]
    vh = np.linalg.svd(np.concatenate(rights), full_matrices=False)[2]
    stack = [u.T @ left @ right @ vh.T for left, right in zip(lefts, rights, strict=True)]
    return u, torch.from_numpy(np.stack(stack)).float(), vh


def test_hand_worked():
    # B_1 = 2 e1, A_1 = 3 e3ᵀ, B_2 = e2, A_2 = e4ᵀ. The B side by side have U = (e1, e2), the A on
    # top of each other V = (e3, e4): cores [[6, 0], [0, 0]] and [[0, 0], [0, 1]], which no rule
    # but Iso-C changes, as they do not overlap.
    e = torch.eye(4)
    factors = [(2 * e[:3, :1], 3 * e[2:3]), (e[:3, 1:2], e[3:])]
    expected = torch.zeros(3, 4)
    expected[0, 2], expected[1, 3] = 6, 1
    for settings in ({"rule": "task_arithmetic"}, {"rule": "ties", "density": 1.0}, {}):
        torch.testing.assert_close(merge_factors("core_space", factors, **settings), expected)
    # Of the four entries of a core TIES keeps one at density 0.25, of each expert its own.
    merged = merge_factors("core_space", factors, rule="ties", density=0.25, scale=0.5)
    torch.testing.assert_close(merged, 0.5 * expected)
    # The mean singular value of diag(6, 1) is 3.5.
    merged = merge_factors("core_space", factors, rule="iso_c")
    torch.testing.assert_close(merged, 3.5 * expected.sign())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_lossless(shape: tuple[int, int]):
    factors = adapters(3, *shape, rank=3)
    merged = merge_factors("core_space", factors, rule="task_arithmetic", scale=0.3)
    expected = 0.3 * products(factors).sum(dim=0)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("rule", ["ties", "tsv_m", "iso_c"])
def test_rules_see_the_published_cores(shape: tuple[int, int], rule: str):
    factors = adapters(3, *shape, rank=3)
    u, stack, vh = cores(factors)
    inner: dict[str, Any] = {"density": 0.3, "scope": "tensor"} if rule == "ties" else {}
    core = merge_model(rule, [stack], inner)[0].double().numpy()
    expected = torch.from_numpy(u @ core @ vh).float()
    merged = merge_factors("core_space", factors, rule=rule, density=0.3)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_iso_c_does_not_depend_on_the_basis():
    factors = adapters(3, 40, 50, rank=3)
    expected = merge_model("iso_c", [products(factors)], {"average_over": "rank"})[0]
    merged = merge_factors("core_space", factors, rule="iso_c")
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_tsv_m_shares_the_directions_of_the_core():
    """Nothing is cut off: N · rank directions of the core, a rank for each of N experts."""
    factors = adapters(3, 12, 50, rank=3)
    merged = merge_factors("core_space", factors, rule="tsv_m")
    expected = merge_model("tsv_m", [products(factors)])[0]  # k = 12 / 3 = 4: nothing either
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["task_arithmetic", "tsv_m", "iso_c"])
def test_dense_task_vectors(rule: str):
    factors = adapters(3, 40, 50, rank=3)
    merged = merge_model("core_space", [products(factors)], {"rule": rule})[0]
    expected = merge_factors("core_space", factors, rule=rule)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_ties_on_dense_task_vectors_keeps_a_fraction_of_the_core():
    """Whatever the bases, a core has 9 · 9 entries, and not 40 · 50: 0.2 of them are 16."""
    factors = adapters(1, 40, 50, rank=9)
    merged = merge_model("core_space", [products(factors)], {"rule": "ties"})[0]
    # The core is diagonal in the bases of the task vector itself: all nine values are kept.
    torch.testing.assert_close(merged, products(factors)[0], rtol=1e-4, atol=1e-4)


def test_vectors_take_the_rule_as_they_are():
    biases = gaussian(3, 11)
    merged = merge_model("core_space", {"bias": biases}, {"rule": "task_arithmetic"})[0]
    assert torch.equal(merged, biases.sum(dim=0))
    merged = merge_model("core_space", {"bias": biases}, {"rule": "ties", "density": 0.5})[0]
    assert torch.equal(merged, merge_model("ties", [biases], {"density": 0.5})[0])
    merged = merge_model("core_space", {"bias": biases}, {"scale": 2.0})[0]
    assert torch.equal(merged, 2 * biases.mean(dim=0))
