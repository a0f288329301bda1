"""Geometric median: known ones, the condition that marks it, and an expert that is far off."""

from typing import Any

import pytest
import torch
from matrices import gaussian
from torch import Tensor

from personae import GeometricMedian, merge_state_dicts
from personae.errors import MethodError


def median(task_vectors: Tensor, **settings: Any) -> Tensor:
    return GeometricMedian(**{"tol": 1e-12, "max_iter": 10_000} | settings)(task_vectors)


def test_known_points():
    # On a line it is the median; of a square's corners their middle; of a triangle with an angle
    # of 120 degrees or more that corner.
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0]])
    torch.testing.assert_close(median(line), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-5)
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
    torch.testing.assert_close(median(square), torch.tensor([1.0, 1.0]))
    flat = torch.tensor([[-2.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    torch.testing.assert_close(median(flat), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-5)
    # The point of Fermat of an equilateral triangle is its middle.
    half = 3**0.5 / 2
    triangle = torch.tensor([[1.0, 0.0], [-0.5, half], [-0.5, -half]])
    torch.testing.assert_close(median(triangle), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, (1.0, 2.0, 0.5, 1.5)])
@pytest.mark.parametrize("shape", [(5, 7), (768, 768)])
def test_unit_pulls_sum_to_zero(weight: Any, shape: tuple[int, int]):
    """What marks the minimum of Σ w_n ‖τ - τ_n‖, in fp64."""
    task_vectors = gaussian(4, *shape) + 3
    found = median(task_vectors, weight=weight).double()
    away = task_vectors.double() - found
    weights = torch.tensor([1.0] * 4 if weight == 1.0 else list(weight), dtype=torch.float64)
    lengths = away.flatten(1).norm(dim=1)
    pull = (away * (weights / lengths)[:, None, None]).sum(dim=0)
    assert float(pull.norm()) < 1e-3


def test_an_expert_far_off_pulls_no_more_than_another():
    near = gaussian(4, 6, 6)
    far = torch.cat([near, 1e4 * torch.ones(1, 6, 6)])
    assert float((median(far) - near.mean(dim=0)).norm()) < 10


def test_from_a_copy_it_goes_on():
    """The mean, where it begins, is an expert's own place that is not the median."""
    points = torch.tensor([[0.0], [-3.0], [-3.0], [-3.0], [9.0]])
    assert points.mean() == 0
    torch.testing.assert_close(median(points), torch.tensor([-3.0]), rtol=0, atol=1e-4)


def test_the_base_has_no_part():
    base, tuned = gaussian(1, 4, 4)[0], gaussian(3, 4, 4, seed=1)
    models = [{"w": base + vector} for vector in tuned]
    method = GeometricMedian(tol=1e-12, max_iter=10_000)
    merged = merge_state_dicts({"w": base}, models, method)
    zeros = merge_state_dicts({"w": torch.zeros(4, 4)}, models, method)
    torch.testing.assert_close(merged["w"], zeros["w"], rtol=0, atol=1e-5)


def test_weights_that_are_all_zero():
    with pytest.raises(MethodError, match="all weights are 0"):
        GeometricMedian(weight=0.0)(gaussian(2, 3, 3))
