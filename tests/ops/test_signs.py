"""Electing signs and merging what agrees, against a loop over positions in exact arithmetic."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.ops.signs import Ballot

integers = hnp.arrays(np.float32, (4, 9), elements=st.integers(-3, 3))
floats = st.floats(-(2.0**99), 2.0**99, width=32)
# Entries that nearly cancel: a number, its negative, and its neighbours.
near = hnp.arrays(np.float32, (2, 9), elements=floats).map(
    lambda a: np.concatenate([a, -np.nextafter(a, np.float32(1)), np.float32(1e-8) * a[:1]])
)


def ballot(rows: np.ndarray) -> Ballot:
    made = Ballot(*rows.shape)
    made.kept.copy_(torch.from_numpy(rows))
    return made


def merged_by(made: Ballot, elect: Any) -> list[float]:
    """The means of what agrees; nothing where no sign wins."""
    made.elect(elect)
    return made.merge("mean").tolist()


def reduced(column: list[float], won: int, reduce: str) -> float:
    agreeing = [v for v in column if sign(v) == won] or [0.0]
    how = {"mean": np.mean, "sum": np.sum, "max": lambda a: max(a, key=abs)}
    return float(how[reduce](agreeing))


def sign(value: Any) -> int:
    return (value > 0) - (value < 0)


@given(integers | near, st.sampled_from(["mass", "count"]), st.sampled_from([-1, 0, 1]))
def test_the_sign_is_that_of_the_exact_sum(rows: np.ndarray, elect: Any, majority: int):
    made = ballot(rows)
    votes = 0
    made.elect(elect)
    elected = made.majority_votes()
    made.give_undecided(majority)
    for p, column in enumerate(rows.T.tolist()):
        cast = [Fraction(v) if elect == "mass" else Fraction(sign(v)) for v in column]
        won = sign(sum(cast))
        votes += won
        wanted = won or (majority if any(column) else 0)
        assert int(made.signs[p]) == wanted
    assert elected == votes


@given(integers, st.sampled_from(["mass", "count"]), st.sampled_from(["mean", "sum", "max"]))
def test_what_agrees_is_merged(rows: np.ndarray, elect: Any, reduce: Any):
    made = ballot(rows)
    made.elect(elect)
    negative = iter(made.merged_alone(made.undecided, -1, reduce).tolist())
    made.give_undecided(1)
    merged = made.merge(reduce)
    for p, column in enumerate(rows.T.tolist()):
        won = sign(sum(v if elect == "mass" else sign(v) for v in column))
        assert float(merged[p]) == pytest.approx(reduced(column, won or 1, reduce), rel=1e-6)
        if any(column) and not won:
            assert next(negative) == pytest.approx(reduced(column, -1, reduce), rel=1e-6)
    assert not list(negative)


def test_a_ballot_is_filled_again():
    made = ballot(np.array([[1, -1], [1, -2]], np.float32))
    assert merged_by(made, "mass") == [1.0, -1.5]
    made.kept.copy_(torch.tensor([[0.0, 4.0], [0.0, -5.0]]))
    assert merged_by(made, "mass") == [0.0, -5.0]
    made.kept.copy_(torch.tensor([[7.0, 4.0], [-7.0, 4.0]]))  # the first is undecided
    assert merged_by(made, "mass") == [0.0, 4.0]


def test_more_experts_than_a_byte_counts():
    made = ballot(np.ones((300, 2), np.float32))
    assert merged_by(made, "count") == [1.0, 1.0]
