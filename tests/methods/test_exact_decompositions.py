"""Methods on whole matrices at real sizes, against the published formulas in fp64 by LAPACK.

Toy sizes cannot see what goes wrong here: whitening as many vectors as a side has divides by
singular values of about 1/m, and a decomposition that is content with the energy of a truncation
is off by several per cent in what single directions make of it.

Eight experts of one matrix of 768 × 3072, as of an MLP of BERT or CLIP, rounded to bf16. Each
method meets one kind of spectrum here, and the others, and 768 × 768 as of attention, where slow
tests are asked for.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from personae.methods import MERGE_METHODS, build, lookup

EXPERTS, ROWS, COLUMNS = 8, 768, 3072
SPECTRA = ["gaussian", "power", "low_rank"]
both_shapes = pytest.mark.parametrize(
    "columns", [COLUMNS, pytest.param(ROWS, marks=pytest.mark.slow)]
)


def spectra(quick: str) -> pytest.MarkDecorator:
    """All kinds of spectra, of which only one is quick enough for every run."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in SPECTRA if name != quick]
    return pytest.mark.parametrize("spectrum", [quick, *slow])


@cache
def family(
    spectrum: str, rows: int = ROWS, columns: int = COLUMNS, experts: int = EXPERTS
) -> Tensor:
    """Task vectors of bf16 values, with singular values of one kind."""
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


def svd(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U and σ of the triangle L in A = L Q, which are A's and come three times as fast."""
    u, values, _ = torch.linalg.svd(torch.linalg.qr(wide.mT, mode="r").R.mT)
    return u, values, u.mT @ wide / values[:, None]


def polar(wide: Tensor) -> Tensor:
    u, _, vh = svd(wide)
    return u @ vh


def merged_of(name: str, task_vectors: Tensor, **settings: Any) -> Tensor:
    method = build(lookup(MERGE_METHODS, name), settings)
    return method(task_vectors, name="h.0.mlp.weight").double()


def off(merged: Tensor, expected: Tensor) -> float:
    return float((merged - expected).norm() / expected.norm())


@both_shapes
@spectra("low_rank")
def test_tsv_m(spectrum: str, columns: int):
    """U⊥ Σ̃ V⊥ᵀ of ⌊min(m, d) / N⌋ triplets each (methods.md 9.1)."""
    k = ROWS // EXPERTS
    parts = [
        (u[:, :k], s[:k], vh[:k]) for u, s, vh in map(svd, family(spectrum, ROWS, columns).double())
    ]
    left = polar(torch.cat([u for u, _, _ in parts], dim=1))
    right = polar(torch.cat([vh for _, _, vh in parts]))
    expected = (left * torch.cat([s for _, s, _ in parts])) @ right
    assert off(merged_of("tsv_m", family(spectrum, ROWS, columns)), expected) < 1e-5


@both_shapes
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_iso_c(spectrum: str, columns: int):
    """mean(σ) U Vᵀ of the sum (9.2)."""
    u, s, vh = svd(family(spectrum, ROWS, columns).double().sum(dim=0))
    assert off(merged_of("iso_c", family(spectrum, ROWS, columns)), s.mean() * u @ vh) < 1e-5


@both_shapes
@spectra("power")
def test_iso_cts(spectrum: str, columns: int):
    """Common directions of the sum and (side - k) / N of each task, all of one value (9.2)."""
    matrices = family(spectrum, ROWS, columns).double()
    each = round(0.2 * ROWS / EXPERTS)
    common = ROWS - EXPERTS * each
    u, s, vh = svd(matrices.sum(dim=0))
    lefts, sizes, rights = [u[:, :common]], [s[:common]], [vh[:common]]
    for matrix in matrices:
        u, s, vh = svd(matrix - lefts[0] @ (lefts[0].T @ matrix))
        lefts.append(u[:, :each])
        sizes.append(s[:each])
        rights.append(vh[:each])
    flat = torch.cat(sizes).mean()
    expected = flat * polar(torch.cat(lefts, dim=1)) @ polar(torch.cat(rights))
    assert off(merged_of("iso_cts", family(spectrum, ROWS, columns)), expected) < 1e-5


@both_shapes
@spectra("gaussian")
def test_cart(spectrum: str, columns: int):
    """τ̄ + λ Σ SVD_k(τ_n − τ̄) (9.5)."""
    matrices = family(spectrum, ROWS, columns).double()
    mean, expected = matrices.mean(dim=0), matrices.mean(dim=0)
    k = int(0.16 * ROWS)
    for matrix in matrices:
        u, s, vh = svd(matrix - mean)
        expected = expected + 1.5 * (u[:, :k] * s[:k]) @ vh[:k]
    merged = merged_of("cart", family(spectrum, ROWS, columns), rank_fraction=0.16, scale=1.5)
    assert off(merged, expected) < 1e-5


def check_drm(stack: Tensor, merged: Tensor, density: float) -> None:
    """Entries of U Σ_t V_tᵀ, pruned by rows of unit length, elected and averaged (section 5).

    What prunes and elects is a step: of millions of entries, one that lies on it to the rounding of
    fp32 may fall either way. All others are the formula's.
    """
    matrices = stack.double()
    u, s, _ = svd(torch.cat(list(matrices), dim=1))
    u = u[:, s > 0.01 * s[0]]
    entries = u.T @ matrices
    unit = (entries / entries.norm(dim=2, keepdim=True)).abs()
    pruned = unit.numel() - round(density * unit.numel())
    entries = entries * (unit > unit.flatten().kthvalue(pruned).values)
    signs = entries.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agreeing = (entries * signs).clamp(min=0)
    expected = signs * agreeing.sum(dim=0) / (agreeing > 0).sum(dim=0).clamp(min=1)
    found = u.T @ merged
    assert off(u @ found, merged) < 1e-5  # nothing outside the basis
    fell = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert fell.sum() <= 1e-5 * fell.numel()
    assert off(found * ~fell, expected * ~fell) < 1e-5


@spectra("low_rank")
def test_drm_h(spectrum: str):
    task_vectors = family(spectrum)
    check_drm(task_vectors, merged_of("drm", task_vectors, density=0.2), 0.2)


@pytest.mark.slow
def test_drm_h_of_two_beyond_a_side_of_1024():
    """Directions of nearly one σ: in fp32, Gram matrices turned them into each other."""
    task_vectors = family("low_rank", 1536, 1536, experts=2)
    check_drm(task_vectors, merged_of("drm", task_vectors, density=0.2), 0.2)


@pytest.mark.parametrize(
    ("spectrum", "rows", "columns"),
    [
        ("low_rank", 192, 1152),
        *[pytest.param(name, ROWS, COLUMNS, marks=pytest.mark.slow) for name in SPECTRA],
    ],
)
def test_drm_v(spectrum: str, rows: int, columns: int):
    """On top of each other: a side of 3072, and of 1152, both beyond 1024."""
    task_vectors = family(spectrum, rows, columns)
    merged = merged_of("drm", task_vectors, direction="vertical", density=0.2)
    check_drm(task_vectors.mT, merged.T, 0.2)
