"""WUDI: by hand, against autograd on the loss as it is written, and its corners."""

from typing import Any

import pytest
import torch
from matrices import gaussian
from torch import Tensor

from personae import WUDI
from personae.methods import MERGE_METHODS, Site, build


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return WUDI(**settings)(task_vectors, name=name)


def naive(task_vectors: Tensor, steps: int, learning_rate: float, squared: bool = True) -> Tensor:
    """Autograd on the loss, and Adam from its own paper, in fp64."""
    vectors = [vector for vector in task_vectors.double() if vector.any()]
    merged = task_vectors.double().sum(dim=0).requires_grad_()
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        loss = torch.zeros((), dtype=torch.float64)
        for vector in vectors:
            weight = vector.square().sum() if squared else vector.square().sum().sqrt()
            loss = loss + ((merged - vector) @ vector.T).square().sum() / weight
        (gradient,) = torch.autograd.grad(loss, merged)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        mean, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
        moved = merged - learning_rate * mean / (spread.sqrt() + 1e-8)
        merged = moved.detach().requires_grad_()
    return merged.detach().float()


def test_hand_worked():
    # One row: τ_1 = (2, 0), τ_2 = (2, 2), sum (4, 2). G = τᵀτ / ‖τ‖² is [[1, 0], [0, 0]] and
    # [[.5, .5], [.5, .5]]. Gradient 2 Σ (τ − τ_n) G_n = 2 [(2, 2) G_1 + (2, 0) G_2]
    # = 2 [(2, 0) + (1, 1)] = (6, 2). The first step of Adam moves each by the learning rate:
    # (4, 2) − 0.5 (1, 1).
    task_vectors = torch.tensor([[[2.0, 0.0]], [[2.0, 2.0]]])
    merged = merge(task_vectors, steps=1, learning_rate=0.5)
    torch.testing.assert_close(merged, torch.tensor([[3.5, 1.5]]))


def test_hand_worked_minimum():
    # Orthogonal rows do not interfere: the sum is the minimum, and Adam stays there.
    task_vectors = torch.tensor([[[3.0, 0.0]], [[0.0, 5.0]]])
    assert merge(task_vectors, learning_rate=0.1).tolist() == [[3.0, 5.0]]
    # Opposite ones: (τ − 2) · 4 / 4 + (τ + 2) · 4 / 4 = 0 at τ = 0, which is the sum.
    assert merge(torch.tensor([[[2.0]], [[-2.0]]]), learning_rate=0.1).tolist() == [[0.0]]
    # Copies: the minimum is the one, 2; from the sum, 6, it is reached.
    copies = torch.full((3, 1, 1), 2.0)
    merged = merge(copies, learning_rate=0.05, steps=500)
    torch.testing.assert_close(merged, torch.tensor([[2.0]]), rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 40)])  # Gram matrix, and rows themselves
@pytest.mark.parametrize("normalise", ["squared", "norm"])
def test_equals_autograd(shape: tuple[int, int], normalise: str):
    task_vectors = gaussian(3, *shape) * torch.tensor([1.0, 0.5, 2.0])[:, None, None]
    settings: dict[str, Any] = {"steps": 40, "learning_rate": 0.01}
    expected = naive(task_vectors, squared=normalise == "squared", **settings)
    merged = merge(task_vectors, normalise=normalise, **settings)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (merged - task_vectors.sum(dim=0)).abs().max() > 0.1  # it moved


def test_one_expert_and_experts_without_a_change():
    task_vectors = gaussian(3, 5, 7)
    task_vectors[1:] = 0
    assert torch.equal(merge(task_vectors, learning_rate=0.1), task_vectors[0])
    assert torch.equal(merge(task_vectors[:1], learning_rate=0.1), task_vectors[0])
    assert torch.equal(merge(torch.zeros(3, 5, 7)), torch.zeros(5, 7))
    task_vectors[1] = gaussian(5, 7, seed=2)
    two = merge(task_vectors[:2], learning_rate=0.1)
    assert torch.equal(merge(task_vectors, learning_rate=0.1), two)


def test_transposed_weights():
    """Stored (in, out): the same model as stored (out, in)."""
    method = MERGE_METHODS["wudi"]
    built = build(method, {"learning_rate": 0.01})
    task_vectors = gaussian(3, 5, 8)
    expected = built.apply(task_vectors, site=Site("a.weight", (5, 8)))
    stored = Site("a.weight", (8, 5), transposed=True)
    merged = built.apply(task_vectors.mT.contiguous(), site=stored)
    torch.testing.assert_close(merged.T, expected)


def test_which_tensors_move():
    task_vectors = gaussian(2, 4, 4)
    mean = task_vectors.mean(dim=0)
    assert torch.equal(merge(task_vectors[:, 0], "bias"), torch.zeros(4))
    assert torch.equal(merge(task_vectors, "wte.weight"), torch.zeros(4, 4))
    assert torch.equal(merge(task_vectors[:, 0], "bias", tensors="matrices"), mean[0])
    assert torch.equal(
        merge(task_vectors, "wte.weight", tensors="matrices"), merge(task_vectors, "a.weight")
    )
