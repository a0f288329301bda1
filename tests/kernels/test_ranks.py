"""Ranks of magnitudes in rows: counted in bins where these tell them apart, else sorted."""

import numpy as np
import pytest
from numpy import ndarray

from personae import kernels


def twice_mean_ranks(rows: ndarray) -> ndarray:
    """Twice the mean rank of every entry in its row, by sorting magnitudes."""
    found = np.empty(rows.shape, np.int64)
    for row, own in zip(np.abs(rows), found, strict=True):
        ordered = np.sort(row)
        below = np.searchsorted(ordered, row, "left")
        own[:] = below + np.searchsorted(ordered, row, "right") - 1
    return found


def ranks_of(rows: ndarray) -> ndarray:
    """The same by the loop: all is kept, times 1 + twice the mean rank."""
    length = rows.shape[1]
    kept = np.full(2 * length - 1, 65536, np.int32)
    factors = np.arange(1, 2 * length, dtype=np.float32)
    entries = rows.flatten()
    kernels.drop_by_rank(entries, np.array([1, 2, 3, 5], np.uint64), 0, kept, factors)
    return np.rint(np.float64(entries.reshape(rows.shape)) / rows - 1).astype(np.int64)


def rows_of(kind: str, length: int) -> ndarray:
    draw = np.random.default_rng(length)
    shape = (4, length)
    signs = draw.choice([-1.0, 1.0], shape)
    if kind == "few values":  # each in a bin of its own
        found = draw.integers(1, 9, shape)
    elif kind == "neighbours":  # in one octave, thousands of keys to a bin
        found = 1 + draw.integers(0, 2**23, shape) * 2.0**-23
    elif kind == "far apart":  # all octaves: most lie below the bins
        found = 2.0 ** draw.uniform(-110, 110, shape)
    elif kind == "equal":
        found = np.full(shape, 0.75)
    else:  # a few in bins that hold unlike keys, most in others
        found = draw.integers(1, 9, shape) + (draw.random(shape) < 0.2) * draw.random(shape)
    return (signs * found).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 65, 700, 3000])
@pytest.mark.parametrize("kind", ["few values", "neighbours", "far apart", "equal", "mixed"])
def test_ranks_are_those_of_sorting(kind: str, length: int):
    rows = rows_of(kind, length)
    assert np.array_equal(ranks_of(rows), twice_mean_ranks(rows))


def test_by_hand():
    # Magnitudes 1 2 2 8: the two that are equal are of rank 1 and 2, 1.5 on average.
    assert ranks_of(np.array([[2.0, -1.0, 8.0, -2.0]], np.float32)).tolist() == [[3, 0, 6, 3]]


def test_rows_that_follow_each_other_need_not_be_alike():
    """After one of which most had to be sorted the next ones are, whatever they are."""
    parts = [rows_of(kind, 300) for kind in ("mixed", "neighbours", "few values", "equal")]
    rows = np.concatenate(parts)
    assert np.array_equal(ranks_of(rows), twice_mean_ranks(rows))
