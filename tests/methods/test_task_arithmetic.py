"""Task arithmetic: by hand, against PEFT, and where it is the average."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft.utils import merge_utils

from personae.methods.merge.average import average
from personae.methods.merge.task_arithmetic import task_arithmetic

stacks = hnp.arrays(np.float32, (4, 3, 5), elements=st.integers(-99, 99)).map(torch.from_numpy)


def test_hand_worked():
    # 0.5 · (1·1 + 2·4 - 1·1) = 4, 0.5 · (-2 + 2·0 - 8) = -5
    task_vectors = torch.tensor([[1.0, -2.0], [4.0, 0.0], [1.0, 8.0]])
    merged = task_arithmetic(task_vectors, weight=(1.0, 2.0, -1.0), scale=0.5)
    assert merged.tolist() == [4.0, -5.0]


@given(stacks)
def test_a_scale_of_one_over_experts_is_the_average(task_vectors: torch.Tensor):
    # A quarter is a power of two: exact.
    assert torch.equal(task_arithmetic(task_vectors, scale=0.25), average(task_vectors))


@given(stacks, st.sampled_from([0.3, 1.0, -2.0]))
def test_on_difference_vectors_it_adds_nothing(experts: torch.Tensor, scale: float):
    # Σ (θ_n - mean θ) = 0: merged is the mean, whatever the scale. Quarters are exact.
    difference_vectors = experts - experts.mean(dim=0)
    merged = task_arithmetic(difference_vectors, scale=scale)
    assert torch.equal(merged, torch.zeros_like(merged))


@given(stacks)
def test_one_expert_is_itself(task_vectors: torch.Tensor):
    assert torch.equal(task_arithmetic(task_vectors[:1]), task_vectors[0])


@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0), (0.3, -0.5, 2.0)])
def test_against_peft(weight: tuple[float, ...]):
    """No known difference: PEFT sums what is weighted, in one reduction."""
    task_vectors = torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(3))
    expected = merge_utils.task_arithmetic(list(task_vectors), torch.tensor(weight))
    torch.testing.assert_close(task_arithmetic(task_vectors, weight=weight), expected)
