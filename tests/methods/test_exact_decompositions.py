"""Methods on whole matrices at real sizes, against the published formulas in fp64 by LAPACK.

Toy sizes cannot see what goes wrong here: whitening as many vectors as a side has divides by
singular values of about 1/m, and a decomposition that is content with the energy of a truncation
is off by several per cent in what single directions make of it.
"""

from functools import cache
from typing import Any

import pytest
import torch
from gather import merge_model
from torch import Tensor

SHAPES = [(768, 768), (384, 1536)]
SPECTRA = ["power", "low_rank", "gaussian"]


@cache
def family(spectrum: str, rows: int, columns: int, experts: int = 3) -> Tensor:
    """bf16 task vectors with singular values of one kind."""
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found: list[Tensor] = []
    for _ in range(experts):
        if spectrum == "gaussian":
            matrix = noise(rows, columns)
        elif spectrum == "power":
            left, _ = torch.linalg.qr(noise(rows, rows))
            right, _ = torch.linalg.qr(noise(columns, rows))
            matrix = (left * torch.arange(1, rows + 1) ** -0.7) @ right.T
        else:
            matrix = noise(rows, 30) @ noise(30, columns) + 0.05 * noise(rows, columns)
        found.append((0.02 * matrix / matrix.std()).bfloat16().float())
    return torch.stack(found)


@cache
def decomposed(spectrum: str, rows: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [svd(matrix) for matrix in family(spectrum, rows, columns).double()]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Tensor) -> Tensor:
    u, _, vh = svd(matrix)
    return u @ vh


def off(name: str, task_vectors: Tensor, expected: Tensor, **settings: Any) -> float:
    """Relative distance of a merge from what the formula gives."""
    merged = merge_model(name, {"h.0.mlp.weight": task_vectors}, settings)[0].double()
    return float((merged - expected).norm() / expected.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m(spectrum: str, shape: tuple[int, int]):
    """U⊥ Σ̃ V⊥ᵀ of ⌊min(m, d) / N⌋ triplets each (methods.md 9.1)."""
    k = min(shape) // 3
    parts = [(u[:, :k], s[:k], vh[:k]) for u, s, vh in decomposed(spectrum, *shape)]
    left = polar(torch.cat([u for u, _, _ in parts], dim=1))
    right = polar(torch.cat([vh for _, _, vh in parts]))
    expected = (left * torch.cat([s for _, s, _ in parts])) @ right
    assert off("tsv_m", family(spectrum, *shape), expected) < 2e-4


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_iso_c(spectrum: str):
    """mean(σ) U Vᵀ of the sum (9.2)."""
    task_vectors = family(spectrum, 384, 1536)
    total = task_vectors.double().sum(dim=0)
    expected = polar(total) * torch.linalg.svdvals(total).mean()
    assert off("iso_c", task_vectors, expected) < 1e-5


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_iso_cts(spectrum: str):
    """Common directions of the sum and (side - k) / N of each task, all of one value (9.2)."""
    task_vectors = family(spectrum, 384, 1536)
    matrices = task_vectors.double()
    each = round(0.2 * 384 / 3)
    common = 384 - 3 * each
    u, s, vh = svd(matrices.sum(dim=0))
    lefts, sizes, rights = [u[:, :common]], [s[:common]], [vh[:common]]
    for matrix in matrices:
        rest = matrix - lefts[0] @ (lefts[0].T @ matrix)
        u, s, vh = svd(rest)
        lefts.append(u[:, :each])
        sizes.append(s[:each])
        rights.append(vh[:each])
    flat = torch.cat(sizes).mean()
    expected = flat * polar(torch.cat(lefts, dim=1)) @ polar(torch.cat(rights))
    assert off("iso_cts", task_vectors, expected) < 2e-4


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_cart(spectrum: str, shape: tuple[int, int]):
    """τ̄ + λ Σ SVD_k(τ_n − τ̄) (9.5)."""
    matrices = family(spectrum, *shape).double()
    mean, expected = matrices.mean(dim=0), matrices.mean(dim=0)
    k = int(0.16 * min(shape))
    for matrix in matrices:
        u, s, vh = svd(matrix - mean)
        expected = expected + 1.5 * (u[:, :k] * s[:k]) @ vh[:k]
    settings = {"rank_fraction": 0.16, "scale": 1.5}
    assert off("cart", family(spectrum, *shape), expected, **settings) < 2e-4


def test_drm():
    """Above side 1024 too, where strong directions lie over noise of nearly one singular value."""
    task_vectors = family("low_rank", 1100, 700, experts=2)
    matrices = task_vectors.double()
    u, s, _ = svd(torch.cat(list(matrices), dim=1))
    u = u[:, s > 0.01 * s[0]]
    entries = u.T @ matrices
    unit = entries / entries.norm(dim=2, keepdim=True)
    kept = round(0.5 * unit.numel())
    threshold = unit.abs().flatten().topk(kept).values[-1]
    entries = entries * (unit.abs() >= threshold)
    signs = entries.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agreeing = (entries * signs).clamp(min=0)
    count = (agreeing > 0).sum(dim=0).clamp(min=1)
    expected = u @ (signs * agreeing.sum(dim=0) / count)
    settings = {"direction": "horizontal", "density": 0.5}
    assert off("drm", task_vectors, expected, **settings) < 6e-3
