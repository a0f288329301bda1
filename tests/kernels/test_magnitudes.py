"""Trimming and counting by magnitude, against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae import kernels
from personae.ops import select

rows = hnp.arrays(np.float32, st.integers(0, 70), elements=st.integers(-6, 6))


def test_trimming_by_hand():
    deltas = np.array([[3, -2, 1, -4], [0, 5, -5, 1]], np.float32)
    kernels.trim(deltas, np.array([1.5, 4.5], np.float32), np.array([1, -2], np.float32))
    assert deltas.tolist() == [[3, -2, 0, -4], [0, -10, 10, 0]]


@given(rows, st.integers(1, 6), st.integers(1, 6))
def test_counts_of_a_window(row: np.ndarray, low: int, width: int):
    ends = np.array([low, low + width], np.float32).view(np.uint32)
    window = select.Window(int(ends[0]), int(ends[1]))
    counts = np.ones(2 + window.bins, np.int64)
    kernels.count_magnitudes(row, window.low, window.high, window.shift, counts)
    magnitudes = np.abs(row)
    inside = magnitudes[(magnitudes >= low) & (magnitudes < low + width)]
    places = (inside.view(np.uint32) - ends[0]) >> window.shift
    assert counts[0] == 1 + len(row)
    assert counts[1] == 1 + (magnitudes >= low + width).sum()
    assert np.array_equal(counts[2:], 1 + np.bincount(places, minlength=window.bins))


def test_counts_of_everything_and_of_what_is_no_number():
    """Windows reach up to infinity; nothing is counted in a bin that is not there."""
    row = np.array([0, 1e-45, 3e38, np.inf, -np.nan, 1], np.float32)
    window = select.Window(0, select.TOP)
    counts = np.zeros(2 + window.bins, np.int64)
    kernels.count_magnitudes(row, window.low, window.high, window.shift, counts)
    assert counts[:2].tolist() == [6, 2]
    assert counts[2:].sum() == 4


@given(hnp.arrays(np.float32, 40, elements=st.floats(-4, 4, width=32)))
def test_samples_are_those_of_whole_tensors(row: np.ndarray):
    counts = np.zeros(select.SAMPLE_BINS, np.int64)
    kernels.sample(row, select.SAMPLE_FLOOR, select.SAMPLE_SHIFT, counts)
    patterns = np.maximum(np.abs(row).view(np.uint32).astype(np.int64), select.SAMPLE_FLOOR)
    places = (patterns - select.SAMPLE_FLOOR) >> select.SAMPLE_SHIFT
    expected = np.bincount(np.minimum(places, select.SAMPLE_BINS - 1), minlength=len(counts))
    assert np.array_equal(counts, expected)


def test_ties_are_counted_where_they_are_and_dropped_from_there():
    row = np.array([2, -2, 1, 3, 2, 0], np.float32)
    counts = np.zeros(2 + 2, np.int64)
    # Places 5 to 10, in bins of 3 from 6 on: 2 at 5 is before them, -2 at 6, 2 at 9.
    kernels.count_ties(row, np.float32(2), -1, 3, counts)
    assert counts.tolist() == [6, 1, 1, 1]
    kernels.drop_ties(row, np.float32(2), 1)
    assert row.tolist() == [2, 0, 1, 3, 0, 0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -2.0, 0.1)])
def test_sums_go_over_the_experts_in_order(weights: tuple[float, ...]):
    deltas = np.random.default_rng(0).standard_normal((3, 1001)).astype(np.float32)
    total = np.empty(1001, np.float32)
    kernels.weighted_sum(deltas, np.array(weights, np.float32), total)
    first, second, third = (row * np.float32(w) for row, w in zip(deltas, weights, strict=True))
    assert np.array_equal(total, (first + second) + third)
