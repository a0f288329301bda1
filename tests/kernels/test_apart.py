"""Deviations over experts, counted together with the squares of what may be selected."""

import numpy as np
import pytest

from personae import kernels


def test_by_hand():
    # Deviations over the two experts: 3, 0 (passed over), 1, 2. Looked at closely: from 1 up to 2.
    deltas = np.array([[6.0, 5.0, 1.0, 4.0], [0.0, 5.0, -1.0, 0.0]], np.float32)
    low, high = (int(np.float32(each).view(np.uint32)) for each in (1.0, 2.0))
    counts = np.zeros((3, 2 + 4))
    kernels.count_apart(deltas, low, high, 21, counts)
    # Three that differ, of which 3 and 2 are above: squares 36 + 16 and 0. In the first of four
    # bins lies 1, of squares 1 and 1.
    assert counts.tolist() == [[3, 2, 1, 0, 0, 0], [0, 52, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("entries", [1, 7, 1024, 5000])
def test_against_fp64(experts: int, entries: int):
    draw = np.random.default_rng(entries + experts)
    deltas = draw.normal(scale=1e-3, size=(experts, entries)).astype(np.float32)
    deltas[:, ::5] = deltas[0, ::5]  # of these nobody differs
    found = np.empty(entries, np.float32)
    kernels.deviations(deltas, found)
    patterns = found.view(np.uint32).astype(np.int64)
    low = int(np.quantile(patterns, 0.4))
    high, shift = low + (37 << 12), 12
    counts = np.zeros((1 + experts, 2 + 37))
    kernels.count_apart(deltas.copy(), low, high, shift, counts)

    assert counts[0, 0] == np.count_nonzero(found)
    assert counts[0, 1] == np.count_nonzero(patterns >= high)
    squares = deltas.astype(np.float64) ** 2
    np.testing.assert_allclose(counts[1:, 1], squares[:, patterns >= high].sum(axis=1), rtol=1e-12)
    for place in range(37):
        start = low + (place << shift)
        inside = (patterns >= max(start, 1)) & (patterns < start + (1 << shift))
        assert counts[0, 2 + place] == np.count_nonzero(inside)
        np.testing.assert_allclose(
            counts[1:, 2 + place], squares[:, inside].sum(axis=1), rtol=1e-12
        )
