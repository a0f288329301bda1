"""Magnitude pruning: by hand, and PEFT's own."""

import pytest
import torch
from matrices import gaussian
from peft.utils.merge_utils import magnitude_prune as pefts
from registered import merged_as_model

from personae import MagnitudePrune


def test_hand_worked():
    task_vectors = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, -2.0, 3.0, -4.0]])
    half = MagnitudePrune(density=0.5)
    assert half(task_vectors).tolist() == [4.0, -3.0, 3.0, -4.0]
    weighted = MagnitudePrune(density=(0.5, 0.25), weight=(2.0, 1.0), scale=0.5)
    assert weighted(task_vectors).tolist() == [4.0, -3.0, 0.0, -2.0]


@pytest.mark.parametrize("shape", [(6, 7), (768, 768)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_equals_peft(shape: tuple[int, int], density: float):
    task_vectors, weights = gaussian(3, *shape), (0.5, -1.0, 2.0)
    if density == 1.0:
        expected = (task_vectors * torch.tensor(weights)[:, None, None]).sum(dim=0)
    else:
        expected = pefts(list(task_vectors), torch.tensor(weights), density)
    merged = MagnitudePrune(density=density, weight=weights)(task_vectors)
    torch.testing.assert_close(merged, expected)


def test_a_fraction_of_the_model_or_of_each_tensor():
    stacks = [torch.tensor([[8.0, 7.0]]), torch.tensor([[2.0, 1.0]])]
    own = merged_as_model(MagnitudePrune(density=0.5), stacks)
    assert [tensor.tolist() for tensor in own] == [[8.0, 0.0], [2.0, 0.0]]
    whole = merged_as_model(MagnitudePrune(density=0.5, scope="model"), stacks)
    assert [tensor.tolist() for tensor in whole] == [[8.0, 7.0], [0.0, 0.0]]
