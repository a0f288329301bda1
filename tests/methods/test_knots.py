"""KnOTS: by hand, against LAPACK and sorting over the whole model, and adapters."""

from typing import Any

import numpy as np
import pytest
import torch
from matrices import adapters, diagonal, gaussian, merge_factors, products
from registered import merged_as_model
from torch import Tensor

from personae import DARETIES, KnOTS
from personae.methods import MERGE_METHODS, Site, build


def merge(task_vectors: Tensor, name: str = "a.weight", **settings: Any) -> Tensor:
    return KnOTS(**settings)(task_vectors, name=name)


def naive_ties(model: list[np.ndarray], density: float) -> list[np.ndarray]:
    """Trim over everything at once, elect by mass, take the mean of what agrees."""
    flat = np.concatenate([stack.reshape(len(stack), -1) for stack in model], axis=1)
    k = int(density * flat.shape[1] + 1e-9)
    least = np.sort(np.abs(flat), axis=1)[:, -k][:, None]
    kept = np.where(np.abs(flat) >= least, flat, 0)
    agree = kept * np.sign(kept.sum(axis=0)) > 0
    merged = (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    ends = np.cumsum([stack[0].size for stack in model])[:-1]
    return [
        piece.reshape(stack[0].shape)
        for piece, stack in zip(np.split(merged, ends), model, strict=True)
    ]


def naive(model: list[Tensor], density: float) -> list[Tensor]:
    """The published steps: one SVD of all task vectors of a layer side by side, Σ on V, TIES."""
    bases, seen = [], []
    for stack in model:
        matrices = stack.double().numpy()
        if stack.ndim != 3:
            bases.append(None)
            seen.append(matrices)
            continue
        u, values, vh = np.linalg.svd(np.concatenate(list(matrices), axis=1), full_matrices=False)
        kept = values > 1e-5
        bases.append(u[:, kept])
        coordinates = values[kept, None] * vh[kept]
        seen.append(np.stack(np.split(coordinates, len(matrices), axis=1)))
    merged = naive_ties(seen, density)
    return [
        torch.from_numpy(value if basis is None else basis @ value).float()
        for basis, value in zip(bases, merged, strict=True)
    ]


def test_hand_worked():
    # Side by side the rows (3 0 4 0) and (0 1 0 -3) are orthogonal: U = 1, coordinates are the
    # task vectors themselves. All kept, (3 + 4) / 2 = 3.5; of 1 and -3 the negative wins.
    task_vectors = diagonal([3.0, 1.0], [4.0, -3.0])
    expected = diagonal([3.5, -3.0])[0]
    torch.testing.assert_close(merge(task_vectors, density=1.0), expected)
    torch.testing.assert_close(merge(task_vectors, density=1.0, scale=2.0), 2 * expected)
    # Outputs turned, the basis turns with them; TIES entry by entry would see other conflicts.
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    torch.testing.assert_close(merge(turn @ task_vectors, density=1.0), turn @ expected)
    # One coordinate of four kept of each: 3 and 4, 1 and -3, of which 3 and 4.
    torch.testing.assert_close(merge(task_vectors, density=0.25), diagonal([3.5, 0.0])[0])
    # Singular values: 5 and √10 = 3.16.
    cut = merge(task_vectors, density=1.0, singular_cutoff=3.5)
    torch.testing.assert_close(cut, diagonal([3.5, 0.0])[0])


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_whole_model_equals_the_published_steps(density: float):
    """Wide, tall beyond all columns, an adapter, a bias: one threshold for all coordinates."""
    model = [
        gaussian(3, 8, 11),
        2 * gaussian(3, 40, 6, seed=1),
        products(adapters(3, 30, 20, rank=2)),
        gaussian(3, 9, seed=2),
    ]
    names = ["a.weight", "b.weight", "c.weight", "c.bias"]
    merged = merged_as_model(KnOTS(density=density), dict(zip(names, model, strict=True)))
    for ours, expected in zip(merged, naive(model, density), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for stack, name in zip(model, names, strict=True):
        ours = merge(stack, name, density=density, scope="tensor")
        torch.testing.assert_close(ours, naive([stack], density)[0], rtol=1e-4, atol=1e-4)


def test_rounding_is_no_direction():
    """Large adapters: what fp32 adds to their products is above the cutoff, and dropped all the
    same, or it would count among the coordinates of which a fraction is kept."""
    task_vectors = 1e4 * products(adapters(3, 30, 20, rank=2))
    values = torch.linalg.svdvals(torch.cat(list(task_vectors), dim=1).double())
    assert values[6] > 1e-5
    expected = 1e4 * naive([task_vectors / 1e4], 0.2)[0]
    torch.testing.assert_close(merge(task_vectors), expected, rtol=1e-4, atol=1)


def test_random_coordinates_in_place_of_the_largest():
    """DARE-TIES on the coordinates: with U = 1 these are the task vectors, so it is DARE-TIES."""
    # Rows (8 0 0 9 0 0), (0 4 0 0 5 0), (0 0 1 0 0 2): orthogonal, of falling size.
    task_vectors = diagonal([8.0, 4.0, 1.0], [9.0, 5.0, 2.0])
    settings: dict[str, Any] = {"density": 0.5, "seed": 3}
    merged = merge(task_vectors, rule="dare_ties", **settings)
    expected = DARETIES(**settings)(task_vectors, name="a.weight")
    torch.testing.assert_close(merged, expected)
    settings["seed"] = 4
    assert not torch.equal(merged, merge(task_vectors, rule="dare_ties", **settings))


def test_one_expert_and_copies():
    task_vectors = gaussian(1, 6, 9)
    for experts in (1, 3):
        merged = merge(task_vectors.repeat(experts, 1, 1), density=1.0)
        torch.testing.assert_close(merged, task_vectors[0], rtol=0, atol=1e-5)


def test_transposed_weights():
    """Stored (in, out): the same model as stored (out, in)."""
    method = MERGE_METHODS["knots"]
    built, task_vectors = build(method, {"density": 0.5}), gaussian(3, 5, 8)
    stored = Site("a.weight", (8, 5), transposed=True)
    merged = built.apply(task_vectors.mT.contiguous(), site=stored)
    expected = built.apply(task_vectors, site=Site("a.weight", (5, 8)))
    torch.testing.assert_close(merged.T, expected)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (7, 40)])
def test_adapters_as_factors(shape: tuple[int, int], density: float):
    factors = adapters(3, *shape, rank=3)
    merged = merge_factors("knots", factors, density=density)
    expected = merge(products(factors), density=density)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
