"""Consensus: by hand, and against loops over entries."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from registered import merged_as_model

from personae import Consensus
from personae.errors import Faults
from personae.methods import MERGE_METHODS, build, lookup


def merge(task_vectors: torch.Tensor, **settings: Any) -> torch.Tensor:
    return Consensus(**settings)(task_vectors)


def test_hand_worked():
    task_vectors = torch.tensor(
        [
            [4.0, 1.0, 5.0, 2.0],
            [3.0, 1.0, 0.5, -2.0],
            [-1.0, 1.0, 0.5, 1.0],
        ]
    )  # sums: 6 3 6 1
    # |τ_n| against half of |sum - τ_n|:
    #   entry 0: 4 > 1, 3 > 1.5, 1 < 3.5                          2 marks
    #   entry 1: 1 > 1 for nobody                                  0 marks
    #   entry 2: 5 > 0.5, 0.5 < 2.75 twice                        1 mark
    #   entry 3: 2 > 0.5, 2 > 1.5, 1 > 0                          3 marks
    assert merge(task_vectors, threshold=0.5).tolist() == [6.0, 0.0, 0.0, 1.0]
    assert merge(task_vectors, threshold=0.5, at_least=1).tolist() == [6.0, 0.0, 6.0, 1.0]
    assert merge(task_vectors, threshold=0.5, at_least=3, scale=0.5).tolist() == [0, 0, 0, 0.5]
    # A threshold of 0.1 of its own lets the third expert mark entry 0 as well: 1 > 0.1 · 7.
    assert merge(task_vectors, threshold=(0.5, 0.5, 0.1), at_least=3).tolist()[0] == 6.0


def test_more_marks_than_experts_are_refused_beforehand():
    faults = Faults()
    entry = lookup(MERGE_METHODS, "consensus")
    for settings in ({}, {"at_least": 3}):
        build(entry, settings).check_experts(2, faults, has_base=True)
    assert faults.messages == [
        "consensus: at_least is 3, and there are 2 expert(s), so that no entry could be kept. "
        "Give at most 2."
    ]


def test_one_expert():
    task_vectors = torch.tensor([[3.0, 0.0, -2.0]])
    assert merge(task_vectors, at_least=1).tolist() == [3.0, 0.0, -2.0]


def test_multi_task_vector_of_ties():
    # Density 0.5 keeps 4 0 | 0 -3 | 5 0: signs + -, sums 9 -3. Marks at threshold 0.4:
    #   entry 0 (9): 4 > 2, 1 < 3.2, 5 > 1.6      2 marks
    #   entry 1 (-3): 2 < 2 no (0.4 · 5 = 2), 3 > 0, 1 < 1.6  1 mark
    task_vectors = torch.tensor([[4.0, 2.0], [1.0, -3.0], [5.0, 1.0]])
    settings = {"multi_task": "ties", "density": 0.5}
    assert merge(task_vectors, **settings).tolist() == [9.0, 0.0]
    # TIES trims over the whole model: a second tensor with larger entries leaves nothing here.
    large = torch.full((3, 2), 100.0)
    merged = merged_as_model(build(Consensus, settings), [task_vectors, large])
    assert merged[0].tolist() == [0.0, 0.0]


@given(
    hnp.arrays(np.float32, (4, 3, 5), elements=st.integers(-9, 9)).map(torch.from_numpy),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(1, 4),
)
def test_equals_loops(task_vectors: torch.Tensor, threshold: float, at_least: int):
    expected = torch.zeros(3, 5)
    for row in range(3):
        for column in range(5):
            values = task_vectors[:, row, column].tolist()
            total = sum(values)
            marks = sum(abs(value) > threshold * abs(total - value) for value in values)
            expected[row, column] = total if marks >= at_least else 0
    assert torch.equal(merge(task_vectors, threshold=threshold, at_least=at_least), expected)


@pytest.mark.parametrize("size", [1, 40])
def test_blocks_of_entries_are_free(size: int, monkeypatch: pytest.MonkeyPatch):
    task_vectors = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    whole = merge(task_vectors)
    monkeypatch.setattr("personae.methods._deltas.BLOCK", size)
    assert torch.equal(merge(task_vectors), whole)


def test_difference_vectors_sum_to_zero():
    task_vectors = torch.tensor([[3.0, -1.0], [-1.0, 2.0], [-2.0, -1.0]])
    assert torch.equal(merge(task_vectors), torch.zeros(2))
