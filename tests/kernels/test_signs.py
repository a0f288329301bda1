"""Electing signs and merging what agrees, against a loop over positions in exact arithmetic."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae import kernels
from personae.methods._electing import Ballot

integers = hnp.arrays(np.float32, (4, 9), elements=st.integers(-3, 3))
floats = st.floats(-(2.0**99), 2.0**99, width=32)
# Entries that nearly cancel: a number, its negative, and its neighbours.
near = hnp.arrays(np.float32, (2, 9), elements=floats).map(
    lambda a: np.concatenate([a, -np.nextafter(a, np.float32(1)), np.float32(1e-8) * a[:1]])
)


def merged_by(rows: list[list[float]], elect: Any) -> list[float]:
    """The means of what agrees; nothing where no sign wins."""
    return Ballot(np.array(rows, np.float32), elect).merge("mean", 1.0).tolist()


def reduced(column: list[float], won: int, reduce: str) -> float:
    agreeing = [v for v in column if sign(v) == won] or [0.0]
    how = {"mean": np.mean, "sum": np.sum, "max": lambda a: max(a, key=abs)}
    return float(how[reduce](agreeing))


def sign(value: Any) -> int:
    return (value > 0) - (value < 0)


@given(integers | near, st.sampled_from(["mass", "count"]), st.sampled_from([-1, 0, 1]))
def test_the_sign_is_that_of_the_exact_sum(rows: np.ndarray, elect: Any, majority: int):
    ballot = Ballot(rows, elect)
    ballot.give_undecided(majority)
    votes = 0
    for p, column in enumerate(rows.T.tolist()):
        cast = [Fraction(v) if elect == "mass" else Fraction(sign(v)) for v in column]
        won = sign(sum(cast))
        votes += won
        assert int(ballot.signs[p]) == won or (majority if any(column) else 0)
        assert (p in ballot.undecided) == (any(column) and not won)
    assert ballot.majority == votes


@given(integers, st.sampled_from(["mass", "count"]), st.sampled_from(["mean", "sum", "max"]))
def test_what_agrees_is_merged(rows: np.ndarray, elect: Any, reduce: Any):
    ballot = Ballot(rows, elect)
    either = iter(ballot.merge_undecided(ballot.undecided, reduce, 2.0).T.tolist())
    ballot.give_undecided(1)
    merged = ballot.merge(reduce, 2.0)
    for p, column in enumerate(rows.T.tolist()):
        won = sign(sum(v if elect == "mass" else sign(v) for v in column))
        assert float(merged[p]) == pytest.approx(2 * reduced(column, won or 1, reduce), rel=1e-6)
        if any(column) and not won:
            expected = [2 * reduced(column, one, reduce) for one in (1, -1)]
            assert next(either) == pytest.approx(expected, rel=1e-6)
    assert not list(either)


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9, 1000])
def test_entries_of_any_number(entries: int):
    """Doubtful entries are looked for eight at a time."""
    rows = np.zeros((3, entries), np.float32)
    rows[0], rows[1] = 1, -1
    rows[2, ::3] = 1e-9
    ballot = Ballot(rows, "mass")
    expected = np.arange(entries) % 3 == 0
    assert np.array_equal(ballot.signs, expected)
    assert np.array_equal(ballot.undecided, np.flatnonzero(~expected))


def test_votes_at_the_ends_of_the_range():
    # The smallest number and its negative cancel; sums beyond fp32 are formed again in fp64.
    tiny, huge = 2.0**-149, 3e38
    rows = [[tiny, tiny, huge], [-tiny, 0, huge], [0, 0, -huge], [0, 0, -huge], [0, 0, -huge]]
    ballot = Ballot(np.array(rows, np.float32), "mass")
    assert ballot.signs.tolist() == [0.0, 1.0, -1.0]
    assert ballot.undecided.tolist() == [0]


def test_means_by_hand():
    assert merged_by([[1, -1], [1, -2]], "mass") == [1.0, -1.5]
    assert merged_by([[0, 4], [0, -5]], "mass") == [0.0, -5.0]
    assert merged_by([[7, 4], [-7, 4]], "mass") == [0.0, 4.0]  # the first is undecided


def test_more_experts_than_a_byte_counts():
    assert merged_by([[1, 1]] * 300, "count") == [1.0, 1.0]


def test_a_weighted_mean_by_hand():
    # Agreeing: 3 of weight 2 and 1 of weight 1/2, over 5/2; -4 of weight 2. Nobody: 0 over 1.
    kept = np.array([[3, -4, 0], [1, 2, 0]], np.float32)
    merged = np.empty(3, np.float32)
    signs = np.array([1, -1, 1], np.float32)
    kernels.weighted_mean_agreeing(kept, signs, np.array([2, 0.5], np.float32), merged)
    assert merged.tolist() == [np.float32(4) / np.float32(2.5), -2.0, 0.0]
