"""DELLA: ranks, probabilities and masks by hand, in expectation, and at density 1 as TIES."""

from typing import Any

import numpy as np
import pytest
import torch
from registered import method_of

from drawn_masks import drawn_numbers
from personae import DELLA
from personae.errors import MethodError
from personae.methods import MERGE_METHODS, Site, _deltas, build


def merge(method: str, task_vectors: torch.Tensor, **settings: Any) -> torch.Tensor:
    """One tensor named w alone."""
    return method_of(MERGE_METHODS[method], **settings)(task_vectors, name="w")


def kept_of(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Of 65536 numbers, how many keep each entry: by its mean rank, in fp64."""
    magnitudes = np.abs(row)
    below = (magnitudes[None] < magnitudes[:, None]).sum(axis=1)
    same = (magnitudes[None] == magnitudes[:, None]).sum(axis=1)
    rank = below + (same - 1) / 2
    return np.rint(65536 * (density + epsilon * (rank / (len(row) - 1) - 0.5)))


def expected(task_vectors: torch.Tensor, density: float, epsilon: float, seed: int) -> np.ndarray:
    """What is left of each expert, rescaled, in fp64."""
    left = np.zeros(task_vectors.shape)
    for n, matrix in enumerate(task_vectors.double().numpy()):
        numbers = drawn_numbers(0, matrix.size, seed=seed, name="w", expert=n)
        for row, drawn, out in zip(matrix, numbers.reshape(matrix.shape), left[n], strict=True):
            kept = kept_of(row, density, epsilon)
            out[:] = np.where(drawn < kept, row * 65536 / kept, 0)
    return left


def test_by_hand(monkeypatch: pytest.MonkeyPatch):
    # Magnitudes 3 1 2 0 have ranks 3 1 2 0, and 5 5 1 0 ranks 2.5 2.5 1 0: of density 1/2 and
    # epsilon 3/8 probabilities 1/2 + 3/8 (rank / 3 - 1/2), in eighths 5.5 3.5 4.5 2.5 and
    # 5 5 3.5 2.5. Numbers of 4 and 2 eighths keep the entries whose probability is above.
    numbers = np.array([4, 2, 4, 2, 4, 4, 4, 2], np.uint16) * 8192
    monkeypatch.setattr("personae.methods._dropping.Draws", lambda **_: _Given(numbers))
    monkeypatch.setattr("personae.kernels.drop_by_rank", _drop_by_rank)
    stack = torch.tensor([[[3.0, -1.0, 2.0, 0.0], [5.0, -5.0, 1.0, 0.0]]])
    merged = merge("della", stack, density=0.5, epsilon=0.375)
    rows = [[3 * 8 / 5.5, -8 / 3.5, 2 * 8 / 4.5, 0.0], [5 * 8 / 5, -5 * 8 / 5, 0.0, 0.0]]
    torch.testing.assert_close(merged, torch.tensor(rows))
    plain = merge("della", stack, density=0.5, epsilon=0.375, rescale=False, scale=2.0)
    assert plain.tolist() == [[6.0, -2.0, 4.0, 0.0], [10.0, -10.0, 0.0, 0.0]]


class _Given:
    """Numbers in place of drawn ones."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def at(self, start: int, count: int) -> tuple[np.ndarray, int]:
        return self.numbers[start : start + count], 0


def _drop_by_rank(
    entries: np.ndarray, numbers: np.ndarray, _: int, kept: np.ndarray, factors: np.ndarray
) -> None:
    length = (len(kept) + 1) // 2
    for row, drawn in zip(entries.reshape(-1, length), numbers.reshape(-1, length), strict=True):
        size = np.abs(row)
        place = [(size < one).sum() * 2 + (size == one).sum() - 1 for one in size]
        row *= np.where(drawn < kept[place], factors[place], 0)


@pytest.mark.parametrize("shape", [(30, 257), (5, 1000), (40, 3)])
@pytest.mark.parametrize("heaped", [False, True])
def test_what_is_kept_is_what_ranks_and_numbers_say(shape: tuple[int, int], heaped: bool):
    """Random values of many octaves; or few values, most of them tied."""
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(3, *shape, generator=generator)
    stack = stack.mul(2).round() if heaped else stack.exp() * stack.sign()
    merged = merge("della_linear", stack, density=0.4, epsilon=0.3, seed=5, weight=(1.0, -2.0, 0.5))
    left = expected(stack, 0.4, 0.3, 5)
    wanted = left[0] - 2 * left[1] + 0.5 * left[2]
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-5, atol=1e-6 * np.abs(left).max())
    signs = np.sign(left.sum(axis=0))
    agreeing = np.maximum(left * signs, 0)
    wanted = signs * agreeing.sum(axis=0) / np.maximum((agreeing > 0).sum(axis=0), 1)
    merged = merge("della", stack, density=0.4, epsilon=0.3, seed=5)
    sure = np.abs(left.sum(axis=0)) > 1e-5 * np.abs(left).max()  # no sign is a matter of rounding
    np.testing.assert_allclose(merged.numpy()[sure], wanted[sure], rtol=1e-5)


def test_a_vector_is_one_row_and_a_scalar_another():
    vector = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"density": 0.5, "epsilon": 0.4}
    merged = merge("della", vector, **settings)
    assert torch.equal(merged, merge("della", vector[:, None], **settings)[0])
    scalars = [merge("della", torch.ones(1), density=0.5, seed=seed) for seed in range(64)]
    assert {tensor.item() for tensor in scalars} == {0.0, 2.0}


def test_kept_fractions_by_rank_and_on_average():
    """Each of 100 places is drawn 20,000 times; its fraction is within five deviations."""
    density, epsilon, rows = 0.3, 0.4, 20_000
    row = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    stack = row.repeat(1, rows, 1)
    kept = merge("della_linear", stack, density=density, epsilon=epsilon, rescale=False) != 0
    fraction = kept.double().mean(dim=0)[row.argsort()]
    wanted = density + epsilon * (torch.arange(100.0).double() / 99 - 0.5)
    deviation = (wanted * (1 - wanted) / rows).sqrt()
    assert ((fraction - wanted).abs() < 5 * deviation).all()
    rescaled = merge("della_linear", stack, density=density, epsilon=epsilon).double()
    mean, spread = rescaled.mean(dim=0) / row, ((1 - wanted) / wanted / rows).sqrt()
    assert ((mean[row.argsort()] - 1).abs() < 5 * spread).all()


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_cut_into_blocks_and_rows_it_is_the_same(method: str, monkeypatch: pytest.MonkeyPatch):
    stack = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))
    built = build(MERGE_METHODS[method], {"epsilon": 0.2})
    statistics = {"majority": torch.tensor(1)}
    whole = built.apply(stack, statistics, Site("w", (30, 50)))
    monkeypatch.setattr(_deltas, "BLOCK", 120)
    parts = [
        built.apply(stack[:, n : n + 7], statistics, Site("w", (30, 50), 50 * n))
        for n in range(0, 30, 7)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_at_density_one_they_are_task_arithmetic_and_ties():
    stack = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    whole: dict[str, Any] = {"density": 1.0, "weight": (1.0, 2.0, -1.0), "scale": 0.5}
    weight: dict[str, Any] = {"weight": (1.0, 2.0, -1.0), "scale": 0.5}
    assert torch.equal(merge("della", stack, **whole), merge("ties", stack, **whole))
    assert torch.equal(
        merge("della_linear", stack, **whole), merge("task_arithmetic", stack, **weight)
    )


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_without_a_spread_it_is_dare(method: str):
    stack = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"density": 0.5, "seed": 3}
    dare = merge({"della": "dare_ties", "della_linear": "dare"}[method], stack, **settings)
    assert torch.equal(merge(method, stack, epsilon=0.0, **settings), dare)


def test_probabilities_beyond_certainty_are_refused():
    for density, epsilon, told in ((0.05, 0.2, "from -0.05 to 0.15"), (0.95, 0.2, "to 1.05")):
        with pytest.raises(MethodError, match=told):
            DELLA(density=density, epsilon=epsilon)(torch.ones(2, 3))
