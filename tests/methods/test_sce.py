"""SCE: by hand, against fp64, and where mergekit's differs."""

import numpy as np
import pytest
import torch
from registered import mergekits

from personae import kernels, sce
from personae.methods.merge.sce import least_apart, select

TASK_VECTORS = torch.tensor(
    [
        [4.0, 1.0, -2.0, 0.0],
        [-2.0, 1.0, 2.0, 1.0],
    ]
)  # variances 9, 0, 4, 1/4: of three that are not 0 a fraction of 0.7 is two


def merge(task_vectors: torch.Tensor, select_topk: float) -> torch.Tensor:
    return sce(task_vectors, select_topk=select_topk)


def test_by_hand():
    # Selected: 4 0 -2 0 and -2 0 2 0. Squares 20 and 8: weights 5/7 and 2/7. Sums 2 and 0 (that
    # counts as +): 4 of the first alone, 2 of the second alone.
    assert merge(TASK_VECTORS, 0.7).tolist() == [4.0, 0.0, 2.0, 0.0]
    # All: squares 21 and 10. The second entry agrees: (21 + 10) / 31.
    torch.testing.assert_close(merge(TASK_VECTORS, 1.0), torch.tensor([4.0, 1.0, 2.0, 1.0]))
    assert not merge(TASK_VECTORS, 0.0).any()
    assert not merge(TASK_VECTORS, 0.3).any()  # int(3 · 0.3)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_against_fp64(share: float):
    stack = torch.randn(4, 60, 70, generator=torch.Generator().manual_seed(0)) * 0.01
    stack[:, :3] = stack[0, :3]  # rows on which all agree
    exact = stack.double().flatten(1).numpy()
    variance = exact.var(axis=0)
    variance[variance < 1e-20] = 0
    kept = int(share * np.count_nonzero(variance))
    if share < 1:
        exact[:, np.argsort(-variance)[kept:]] = 0
    weights = (exact**2).sum(axis=1, keepdims=True)
    weights /= weights.sum()
    agree = np.sign(exact) == np.where(exact.sum(axis=0) >= 0, 1, -1)
    divisor = (weights * agree).sum(axis=0)
    expected = (weights * agree * exact).sum(axis=0) / np.where(divisor == 0, 1, divisor)
    merged = merge(stack, share).double().numpy().ravel()
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-9)


def test_small_task_vectors_weigh_the_same_in_mergekit():
    # Of 1e-4 and 3e-4 weights are 1/10 and 9/10; there, mean squares below 1e-6 weigh 1/2.
    stack = torch.tensor([[1e-4], [3e-4]])
    torch.testing.assert_close(merge(stack, 1.0), torch.tensor([2.8e-4]))
    torch.testing.assert_close(mergekits("sce")(stack), torch.tensor([2e-4]))


@pytest.mark.parametrize("experts", [1, 2, 3, 7])
def test_what_is_selected_is_what_deviations_say(experts: int):
    """Entries whose deviation is the threshold itself, to the last bit, and all others."""
    draw = np.random.default_rng(experts)
    deltas = draw.normal(scale=1e-3, size=(experts, 500)).astype(np.float32)
    found = np.empty(500, np.float32)
    kernels.deviations(deltas, found)
    for threshold in [*found[:50], np.float32(np.inf)]:
        kept = deltas.copy()
        select(kept, least_apart(float(threshold), experts))
        assert np.array_equal(kept, np.where(found >= threshold, deltas, 0))
