"""Core space: by hand, against the published steps, and rules that depend on no basis."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matrices import Factors, adapters, gaussian, leading, merge_factors, polar, products

from personae import TIES, TSVM, CoreSpace, IsoC
from personae.methods import build

SHAPES = [(40, 50), (50, 40), (40, 7), (7, 40)]


def cores(factors: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The published steps: SVD of all B side by side and of all A on top of each other."""
    lefts = [left.double().numpy() for left, _ in factors]
    rights = [right.double().numpy() for _, right in factors]
    u = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)[0]
    vh = np.linalg.svd(np.concatenate(rights), full_matrices=False)[2]
    stack = [u.T @ left @ right @ vh.T for left, right in zip(lefts, rights, strict=True)]
    return u, np.stack(stack), vh


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


def ties(stack: np.ndarray, density: float) -> np.ndarray:
    """Trim each core apart, elect by mass, average what agrees (methods.md 4.3)."""
    flat = stack.reshape(len(stack), -1)
    k = int(density * flat.shape[1])
    flat = flat * (np.abs(flat) >= np.sort(np.abs(flat), axis=1)[:, [-k]])
    agreeing = flat * (np.sign(flat) == np.sign(flat.sum(axis=0)))
    count = np.maximum(np.count_nonzero(agreeing, axis=0), 1)
    return (agreeing.sum(axis=0) / count).reshape(stack.shape[1:])


def tsv_m(stack: np.ndarray) -> np.ndarray:
    """U⊥ Σ̃ V⊥ᵀ of ⌊side / N⌋ triplets of each core (9.1)."""
    parts = [leading(core, min(core.shape) // len(stack)) for core in stack]
    left = polar(np.concatenate([u for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([vh for _, _, vh in parts]))
    return (left * np.concatenate([values for _, values, _ in parts])) @ right


def iso(core: np.ndarray) -> np.ndarray:
    """One value, the mean, for all singular directions (9.2) that it has: TIES empties rows."""
    u, values, vh = np.linalg.svd(core, full_matrices=False)
    return u @ np.diag(values.mean() * (values > 1e-10 * values[0])) @ vh


PUBLISHED = [
    ({"rule": "task_arithmetic"}, lambda stack: stack.sum(axis=0)),
    ({"rule": "ties", "density": 0.3}, lambda stack: ties(stack, 0.3)),
    ({"rule": "ties", "isotropic": True}, lambda stack: iso(ties(stack, 0.2))),
    ({"rule": "tsv_m"}, tsv_m),
    ({"rule": "tsv_m", "isotropic": True}, lambda stack: iso(tsv_m(stack))),  # their README's
    ({"rule": "iso_c"}, lambda stack: iso(stack.sum(axis=0))),
    ({"rule": "task_arithmetic", "isotropic": True}, lambda stack: iso(stack.sum(axis=0))),
]


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("rank", [3, 14, 15, 30])
@pytest.mark.parametrize(("settings", "rule"), PUBLISHED)
def test_the_published_steps(
    settings: dict[str, Any],
    rule: Callable[[np.ndarray], np.ndarray],
    rank: int,
    shape: tuple[int, int],
):
    """Bases of the stacked factors, whether their ranks add up to less than the sides (9 and 42 of
    40 × 50: one side) or to more."""
    factors = adapters(3, *shape, rank=rank)
    u, stack, vh = cores(factors)
    expected = torch.from_numpy(0.7 * u @ rule(stack) @ vh)
    merged = merge_factors("core_space", factors, **settings, scale=0.7)
    assert (merged - expected).norm() < 1e-5 * expected.norm()


def test_ranks_may_differ():
    factors = [adapters(1, 40, 50, rank=rank, seed=rank)[0] for rank in (2, 7, 40)]
    u, stack, vh = cores(factors)
    expected = torch.from_numpy(u @ ties(stack, 0.2) @ vh)
    merged = merge_factors("core_space", factors, rule="ties")
    assert (merged - expected).norm() < 1e-5 * expected.norm()


def test_iso_c_does_not_depend_on_the_basis():
    factors = adapters(3, 40, 50, rank=3)
    expected = IsoC(average_over="rank")(products(factors))
    merged = merge_factors("core_space", factors, rule="iso_c")
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_tsv_m_shares_the_directions_of_the_core():
    """Nothing is cut off: N · rank directions of the core, a rank for each of N experts."""
    factors = adapters(3, 12, 50, rank=3)
    merged = merge_factors("core_space", factors, rule="tsv_m")
    expected = TSVM()(products(factors))  # k = 12 / 3 = 4: nothing either
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["task_arithmetic", "tsv_m", "iso_c"])
def test_dense_task_vectors(rule: str):
    factors = adapters(3, 40, 50, rank=3)
    merged = build(CoreSpace, {"rule": rule})(products(factors))
    expected = merge_factors("core_space", factors, rule=rule)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_ties_on_dense_task_vectors_keeps_a_fraction_of_the_core():
    """Whatever the bases, a core has 9 · 9 entries, and not 40 · 50: 0.2 of them are 16."""
    factors = adapters(1, 40, 50, rank=9)
    merged = CoreSpace(rule="ties")(products(factors))
    # The core is diagonal in the bases of the task vector itself: all nine values are kept.
    torch.testing.assert_close(merged, products(factors)[0], rtol=1e-4, atol=1e-4)


def test_vectors_take_the_rule_as_they_are():
    biases = gaussian(3, 11)
    merged = CoreSpace(rule="task_arithmetic")(biases, name="bias")
    assert torch.equal(merged, biases.sum(dim=0))
    merged = CoreSpace(rule="ties", density=0.5)(biases, name="bias")
    assert torch.equal(merged, TIES(density=0.5)(biases))
    merged = CoreSpace(scale=2.0)(biases, name="bias")
    assert torch.equal(merged, 2 * biases.mean(dim=0))
