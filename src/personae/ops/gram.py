"""Singular triplets from the eigenvectors of A Aᵀ, on the small side of A."""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD

EPS = torch.finfo(torch.float32).eps
ENERGY_TOLERANCE = 1e-3
"""Relative captured energy (Σσ²) that a solver may miss, by its own estimate."""
FP32_FLOOR = 1e-4
"""λ_k / λ_1 of A Aᵀ beneath which fp32 (eps 1.2e-7) blurs direction k by more than about 1e-3."""
CHUNK = 1 << 10
"""Rows of a tall matrix in fp64 at a time."""


def by_eigenvectors(wide: Float[Tensor, "small large"], rank: int) -> SVD:
    """The `rank` leading triplets, as exact as the conditioning of A Aᵀ lets them be."""
    energies, vectors = dominant(wide, rank)
    if energies[-1] < FP32_FLOOR * energies[0]:
        return rayleigh_ritz(vectors, wide.T @ vectors)
    return _with_right_vectors(wide, vectors)


def dominant(rows: Float[Tensor, "small large"], rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenpairs, descending, of rows·rowsᵀ, in the precision they need."""
    values, vectors = torch.linalg.eigh(_gram(rows))
    if values[-rank] < FP32_FLOOR * values[-1]:
        del values, vectors
        values, vectors = torch.linalg.eigh(exact_gram(rows))
    return values[-rank:].flip(0).float(), vectors[:, -rank:].flip(1).float()


def estimated_gain(values: Tensor, residuals: Tensor, outside: float) -> float:
    """Estimate the relative energy that the directions left out would add to Ritz values.

    A Ritz value θ coupled by residual r to a direction of energy μ is [[θ, r], [r, μ]]:
    its larger eigenvalue exceeds θ by √(h² + r²) − h, h = (θ − μ)/2.

    Args:
        values: Ritz values θ.
        residuals: Norm r of the residual of each.
        outside: μ, a typical energy of a direction left out.
    """
    half_gap = ((values - outside) / 2).clamp(min=0).double()
    gains = torch.hypot(half_gap, residuals.double()) - half_gap
    return float(gains.sum() / values.double().sum())


def rayleigh_ritz(basis: Float[Tensor, "small k"], image: Float[Tensor, "large k"]) -> SVD:
    """SVD of A restricted to the span of orthonormal `basis`, from `image` = Aᵀ basis."""
    q, r = torch.linalg.qr(image)
    u, values, vh = torch.linalg.svd(r.T)
    return SVD(basis @ u, values, vh @ q.T)


def _gram(rows: Float[Tensor, "small large"]) -> Float[Tensor, "small small"]:
    """rows·rowsᵀ in three quarters of the operations: one corner is the mirror of another."""
    half = len(rows) // 2
    product = rows.new_empty(len(rows), len(rows))
    torch.mm(rows[:half], rows[:half].T, out=product[:half, :half])
    torch.mm(rows[half:], rows.T, out=product[half:])
    product[:half, half:] = product[half:, :half].T
    return product


def exact_gram(rows: Float[Tensor, "small large"]) -> Float[Tensor, "small small"]:
    """The same in fp64. Of a tall matrix, seen from its other side, by chunks of its rows.

    They are summed as the product sums them by itself, so that all of it is in fp64 at no time.
    """
    if not rows.T.is_contiguous():
        return _gram(rows.double())
    product = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    half = len(rows) // 2
    for columns in rows.split(CHUNK, dim=1):
        exact = columns.double()
        product[:half, :half].addmm_(exact[:half], exact[:half].T)
        product[half:].addmm_(exact[half:], exact.T)
    product[:half, half:] = product[half:, :half].T
    return product


def _with_right_vectors(wide: Tensor, vectors: Float[Tensor, "small k"]) -> SVD:
    """Complete well-conditioned left vectors.

    Aᵀu / σ is orthonormal to about 1e-3, and one Newton–Schulz step squares that, for a fraction
    of the time of a QR and a small SVD.
    """
    image = wide.T @ vectors
    values, order = image.norm(dim=0).sort(descending=True, stable=True)
    right = image[:, order] / values
    right = torch.addmm(right, right, right.T @ right, beta=1.5, alpha=-0.5)
    return SVD(vectors[:, order], values, right.T)
