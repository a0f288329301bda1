"""NearSwap by hand, and what it needs."""

import pytest
import torch

from personae import NearSwap, merge_state_dicts, nearswap
from personae.errors import MethodError, PersonaeError


def test_by_hand():
    # Within 0.25 entries are the expert's; beyond, the base's and a step of 0.25.
    task_vector = torch.tensor([[0.125, -0.25, 1.0, -3.0, 0.0]])
    assert nearswap(task_vector, t=0.25).tolist() == [0.125, -0.25, 0.25, -0.25, 0.0]
    assert not nearswap(task_vector, t=0.0).any()


def test_it_goes_from_a_base_to_one_expert():
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([0.5, -2.0, 1.0])}
    merged = merge_state_dicts(base, [expert], NearSwap(t=1.0))
    assert merged["w"].tolist() == [0.5, -1.0, 1.0]
    with pytest.raises(MethodError, match="to one expert, and here are 2"):
        nearswap(torch.ones(2, 3))
    with pytest.raises(PersonaeError, match="nearswap needs a base"):
        merge_state_dicts(None, [expert], NearSwap())
