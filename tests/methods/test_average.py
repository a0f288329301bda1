"""Weight averaging."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
