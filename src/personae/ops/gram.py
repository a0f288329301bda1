"""Singular triplets from eigenvectors of A Aᵀ, on the small side of A.

`by_eigenvectors` asks LAPACK for all of them. `by_filter` finds the leading ones by subspace
iteration with Chebyshev polynomials (Zhou, Saad, Tiago and Chelikowsky 2006): nearly all products.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD

EPS = torch.finfo(torch.float32).eps
ENERGY_TOLERANCE = 1e-3
"""Relative captured energy (Σσ²) that a solver may miss, by its own estimate."""
FP32_FLOOR = 1e-4
"""λ_k / λ_1 of A Aᵀ beneath which fp32 (eps 1.2e-7) blurs direction k by more than about 1e-3."""
FILTER_COLUMNS = 1.25
"""Columns iterated / rank: more converge in fewer steps, each of which costs more."""
FILTER_DEGREE = 3
"""One filter of it leaves 1e-4 to 6e-4 of the energy for σ_i ∝ i^-0.5."""
FILTERS = 2
"""Filters tried: the second is for slow spectra; past it an eigendecomposition costs no more."""
SKETCH_TAIL = 16
"""Columns of the sketch that tell how large the eigenvalues beyond it are."""
EDGE_SAFETY = 0.75
"""Factor on that: an edge too low only damps less, one too high damps what is wanted."""
MISSED_PER_GAIN = 2.0
"""Energy missed / estimated gain: 1.1 to 1.6 on power laws and Gaussian noise."""


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
        exact = rows.double()
        values, vectors = torch.linalg.eigh(_gram(exact))
    return values[-rank:].flip(0).float(), vectors[:, -rank:].flip(1).float()


def filter_columns(rank: int, small: int) -> int:
    """Columns that `by_filter` iterates."""
    return min(int(FILTER_COLUMNS * rank) + 1, small)


def by_filter(wide: Float[Tensor, "small large"], rank: int, seed: int) -> SVD | None:
    """The `rank` leading triplets within `ENERGY_TOLERANCE`; None if fp32 squares do not show them.

    A Gaussian sketch of A Aᵀ tells where its lesser eigenvalues lie, a polynomial damps these, and
    Rayleigh–Ritz takes what is left apart; its last value is a better bound for another filter.
    Where the filters do not get there, LAPACK's eigenvectors do.
    """
    product = _gram(wide)
    small = len(product)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: one start for every device
    start = torch.randn(small, filter_columns(rank, small), generator=generator)
    basis, r = torch.linalg.qr(product @ start.to(wide.device))
    # What is new in the last columns has about the norm of the eigenvalues they did not reach.
    unreached = r.diagonal()[-SKETCH_TAIL:].square().mean() / max(small - len(r), 1)
    edge = float(unreached.sqrt()) * EDGE_SAFETY
    for _ in range(FILTERS):
        basis = _filtered(product, basis, edge)
        image = product @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        edge = float(values[0])
        values, rotation = values[-rank:].flip(0), rotation[:, -rank:].flip(1)
        vectors = basis @ rotation
        residuals = torch.addcmul(image @ rotation, vectors, values, value=-1).norm(dim=0)
        gain = estimated_gain(values, residuals, edge)
        steep = bool(values[-1] < FP32_FLOOR * values[0])
        if gain * MISSED_PER_GAIN <= ENERGY_TOLERANCE:
            if steep:
                return rayleigh_ritz(vectors, wide.T @ vectors)
            return _with_right_vectors(wide, vectors)
        if steep:
            return None
    return _with_right_vectors(wide, torch.linalg.eigh(product)[1][:, -rank:].flip(1))


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


def _filtered(
    product: Float[Tensor, "small small"], basis: Float[Tensor, "small k"], edge: float
) -> Float[Tensor, "small k"]:
    """An orthonormal basis of p(A Aᵀ)·basis, p the Chebyshev polynomial that is small on [0, edge].

    p is taken factor by factor, and the basis made orthonormal after each: as a whole it would
    grow so far at the largest eigenvalue that fp32 would see no other.
    """
    for step in range(FILTER_DEGREE):
        root = edge * (1 + math.cos((step + 0.5) * math.pi / FILTER_DEGREE)) / 2
        basis = torch.linalg.qr(torch.addmm(basis, product, basis, beta=-root))[0]
    return basis
