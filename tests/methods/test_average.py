"""Weight averaging."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.errors import Faults, MethodError
from personae.methods import MERGE_METHODS, build, lookup
from personae.methods.merge.average import average


def test_hand_worked():
    # (1 + 4 + 1) / 3 = 2, (-2 + 0 + 8) / 3 = 2
    task_vectors = torch.tensor([[1.0, -2.0], [4.0, 0.0], [1.0, 8.0]])
    assert torch.equal(average(task_vectors), torch.tensor([2.0, 2.0]))


@given(
    hnp.arrays(np.float32, (2, 3, 5), elements=st.integers(-99, 99)).map(torch.from_numpy),
    hnp.arrays(np.float32, (3, 5), elements=st.integers(-99, 99)).map(torch.from_numpy),
)
def test_base_plus_average_is_the_mean_of_the_experts(experts: torch.Tensor, base: torch.Tensor):
    # Halves of small integers are exact.
    assert torch.equal(base + average(experts - base), (experts[0] + experts[1]) / 2)


def test_weights_by_hand():
    # (2·1 + 1·4 + 1·1) / 4 = 7/4, (2·-2 + 0 + 8) / 4 = 1; not divided: 7 and 4.
    task_vectors = torch.tensor([[1.0, -2.0], [4.0, 0.0], [1.0, 8.0]])
    weight = (2.0, 1.0, 1.0)
    assert average(task_vectors, weight=weight).tolist() == [1.75, 1.0]
    assert average(task_vectors, weight=weight, normalize=False).tolist() == [7.0, 4.0]


def test_weights_that_sum_to_nothing_are_refused_before_and_while_merging():
    weight = (0.1, 0.2, -0.3)  # 5.6e-17 in floating point
    text = re.escape("0.1, 0.2, -0.3 sum to 0. Change one, or set normalize to false.")
    faults = Faults()
    build(lookup(MERGE_METHODS, "linear"), {"weight": weight}).check_experts(
        3, faults, has_base=True
    )
    with pytest.raises(MethodError, match=text):
        faults.raise_if_any(MethodError)
    with pytest.raises(MethodError, match=text):
        average(torch.ones(3, 2), weight=weight)
    assert average(torch.ones(3, 2), weight=weight, normalize=False).abs().max() < 1e-7


def test_weights_that_would_scale_the_model_are_refused_without_a_base():
    built = build(lookup(MERGE_METHODS, "average"), {"weight": 0.6, "normalize": False})
    with_base, without = Faults(), Faults()
    built.check_experts(2, with_base, has_base=True)
    built.check_experts(2, without, has_base=False)
    assert not with_base.messages
    assert without.messages == [
        "average: normalize is false and the weights sum to 1.2, which would scale the whole "
        "model. Make them sum to 1, or scale task vectors alone with task_arithmetic."
    ]


def test_a_wrong_number_of_weights_is_told_before_their_sum():
    faults = Faults()
    build(lookup(MERGE_METHODS, "average"), {"weight": (1.0, -1.0)}).check_experts(
        3, faults, has_base=True
    )
    assert faults.messages == [
        "weight has 2 values for 3 experts. Give one an expert, or a single one for all."
    ]
