"""Truncated SVD: only the leading triplets, at the price of a few matrix products.

Solvers, cheapest first (`benchmarks/svd.py` measures what the thresholds rest on):

* `randomised`: block Lanczos on A Aᵀ from a Gaussian block (arXiv 1504.05477), with blocks much
  smaller than the rank (arXiv 2508.06486). The basis grows while the residual says that energy is
  missed; past a share of the small side the next solver takes over.
* `gram`: eigenvectors of A Aᵀ on the small side, in fp64 where squares in fp32 drown small values.
* `full`: LAPACK's reduced SVD.

The first two find a subspace and end with QR and a small SVD of A projected on it (Rayleigh–Ritz):
both factors are orthonormal to fp32 whatever the conditioning. `gram` spares that where the
spectrum kept is well conditioned.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD
from personae.errors import MethodError

Solver = Literal["auto", "randomised", "gram", "full"]
Signs = Literal["largest_positive", "solver"]
_EPS = torch.finfo(torch.float32).eps

ENERGY_TOLERANCE = 1e-3
"""Relative captured energy (Σσ²) the randomised solver may miss, by its own estimate."""
MISSED_PER_STEP = 8.0
"""Energy missed / estimated gain of one more step: 1 to 5 on power-law and Gaussian spectra."""
KRYLOV_LIMIT = 0.75
"""Basis / small side at which the randomised solver gives up: Gaussian noise at rank 0.3 fits."""
KRYLOV_COLUMNS = 2.25
"""Basis / rank where the check usually holds: 2 for σ_i ∝ i^-0.5, 2.5 to 5 for Gaussian noise."""
KRYLOV_OVERHEAD = 1.5
"""Time of an operation in its narrow products over one in the wide products of `gram`."""
SMALLEST_FOR_KRYLOV = 256
"""Small side below which either takes milliseconds and the more exact is the better one."""
BLOCKS_PER_RANK = 8
"""Rank / Lanczos block: smaller blocks converge on fewer columns but read A more often."""
TALLEST_FOR_KRYLOV = 8
"""Large / small side above which reading A at every step costs more than forming A Aᵀ once."""
SMALLEST_BLOCK = 16
"""Columns beneath which a product is bound by reading A."""
PROBE_BLOCK = 80
"""Columns tried first where `gram` is faster: deltas of rank 64 show for a few % of its time."""
GRAM_FP32_FLOOR = 1e-4
"""λ_k / λ_1 of A Aᵀ beneath which fp32 (eps 1.2e-7) blurs direction k by more than about 1e-3."""


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    solver: Solver = "auto",
    rank_tolerance: float | None = None,
    signs: Signs = "largest_positive",
    seed: int = 0,
) -> SVD:
    """The `rank` leading singular triplets of a matrix, or fewer where its numerical rank is lower.

    Args:
        matrix: Any floating dtype, finite; computed in fp32, never modified.
        rank: Triplets wanted, at least 0; more than min(out, in) means all.
        solver: `auto` chooses by shape and rank; `randomised` ends as `gram` if its check fails.
        rank_tolerance: Singular values ≤ this · σ₁ are dropped; None: max(out, in) · eps of fp32.
        signs: `largest_positive` applies `fix_signs`; `solver` keeps what came out.
        seed: Start of the randomised solver; the global generator is neither read nor moved.

    Returns:
        Factors in fp32, k ≤ rank of them; k = 0 for an all-zero matrix. Same input and number of
        threads, same bytes.

    Raises:
        MethodError: If `rank` is negative.
    """
    if rank < 0:
        raise MethodError(f"truncated_svd: rank is {rank}, expected 0 or more.")
    matrix = matrix.detach().float()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rank = min(rank, wide.shape[0])
    peak = float(matrix.abs().max()) if rank else 0.0
    if peak == 0:
        rows, columns = matrix.shape
        return SVD(matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(0, columns))
    wide = wide / peak  # squares of very small or large deltas would leave the range of fp32
    u, values, vh = _solve(wide, rank, solver, seed)
    u, vh = (u, vh) if wide.shape == matrix.shape else (vh.T, u.T)
    return _finish(SVD(u, values * peak, vh), matrix.shape, rank_tolerance, signs)


def fix_signs(svd: SVD) -> SVD:
    """Flip triplets: each left vector's entry of largest magnitude (ties: the first) is positive.

    Args:
        svd: Factors of any rank, 0 included.

    Returns:
        The same decomposition; u and vh flipped together.
    """
    u, values, vh = svd
    if not values.numel():
        return svd
    flip = largest_positive(u)
    return SVD(u * flip, values, vh * flip[:, None])


def largest_positive(columns: Float[Tensor, "out rank"]) -> Float[Tensor, " rank"]:
    """1 or -1 for each column: its entry of largest magnitude (ties: the first) made positive."""
    first = (columns.abs() == columns.abs().amax(dim=0)).byte().argmax(dim=0)
    return torch.where(columns.gather(0, first[None])[0] < 0, -1.0, 1.0)


def _solve(wide: Tensor, rank: int, solver: Solver, seed: int) -> SVD:
    """Run the solver asked for, or the fastest for this shape; the exact one if its check fails."""
    small, large = wide.shape
    if solver == "full":
        return _full(wide, rank)
    columns = KRYLOV_COLUMNS * rank
    krylov = 4 * small * large * columns + 4 * small * columns**2 + 9 * columns**3
    gram = 2 * small**2 * large + 9 * small**3  # eigh(n) takes as long as 9 n³ in products
    suits = small >= SMALLEST_FOR_KRYLOV and large <= TALLEST_FOR_KRYLOV * small
    found = None
    if solver == "randomised" or (solver == "auto" and suits and KRYLOV_OVERHEAD * krylov < gram):
        block = min(max(SMALLEST_BLOCK, rank // BLOCKS_PER_RANK), small)
        found = _krylov(wide, rank, seed, block, limit=int(KRYLOV_LIMIT * small))
    elif solver == "auto" and suits:
        found = _krylov(wide, rank, seed, PROBE_BLOCK, limit=PROBE_BLOCK)
    return _gram(wide, rank) if found is None else found


def _full(matrix: Tensor, rank: int) -> SVD:
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return SVD(u[:, :rank], values[:rank], vh[:rank])


def _gram(wide: Tensor, rank: int) -> SVD:
    energies, vectors = _dominant(wide, rank)
    image = wide.T @ vectors
    if energies[-1] < GRAM_FP32_FLOOR * energies[0]:
        return _rayleigh_ritz(vectors, image)
    # Well conditioned: Aᵀu / σ is orthonormal to about 1e-3, and one Newton–Schulz step squares
    # that, for a fraction of the time of a QR and a small SVD.
    values, order = image.norm(dim=0).sort(descending=True, stable=True)
    right = image[:, order] / values
    right = torch.addmm(right, right, right.T @ right, beta=1.5, alpha=-0.5)
    return SVD(vectors[:, order], values, right.T)


def _dominant(rows: Float[Tensor, "small large"], rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenpairs, descending, of rows·rowsᵀ, in the precision they need."""
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    if values[-rank] < GRAM_FP32_FLOOR * values[-1]:
        exact = rows.double()
        values, vectors = torch.linalg.eigh(exact @ exact.T)
    return values[-rank:].flip(0).float(), vectors[:, -rank:].flip(1).float()


def _rayleigh_ritz(basis: Float[Tensor, "small k"], image: Float[Tensor, "large k"]) -> SVD:
    """SVD of A restricted to the span of orthonormal `basis`, from `image` = Aᵀ basis."""
    q, r = torch.linalg.qr(image)
    u, values, vh = torch.linalg.svd(r.T)
    return SVD(basis @ u, values, vh @ q.T)


def _krylov(
    wide: Float[Tensor, "small large"], rank: int, seed: int, block: int, limit: int
) -> SVD | None:
    """Grow a block Lanczos basis of A Aᵀ until its check holds; None if it would pass `limit`.

    Basis vectors q and images Aᵀq are kept as rows: the part filled so far is contiguous.
    """
    small, large = wide.shape
    most = max(limit, block) // block * block
    basis, images = wide.new_empty(most, small), wide.new_empty(most, large)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: one start for every device
    sketch = wide @ torch.randn(large, block, generator=generator).to(wide.device)
    step, due, size = torch.linalg.qr(sketch)[0], 2 * rank, float(wide.norm())
    for filled in range(block, most + 1, block):
        basis[filled - block : filled] = step.T
        images[filled - block : filled] = image = step.T @ wide
        step, coupling = _orthonormalise(wide @ image.T, basis[:filled])
        enough = rank <= filled and min(due, most) <= filled
        settled = float(coupling.norm()) <= _EPS * size * size
        if enough or (settled and _spans_rows(wide, basis[:filled], images[:filled], size)):
            values, vectors = _dominant(images[:filled], min(rank, filled))
            gain = _gain(values, coupling @ vectors[-block:], image)
            if gain * MISSED_PER_STEP <= ENERGY_TOLERANCE:
                return _rayleigh_ritz(basis[:filled].T @ vectors, images[:filled].T @ vectors)
            due = filled * 5 // 4
    return None


def _spans_rows(wide: Tensor, basis: Tensor, images: Tensor, size: float) -> bool:
    """Whether A = QQᵀA up to fp32: a delta of low rank, nothing left to look for.

    `size` = ‖A‖, so size/√small ≤ σ₁ and what is left out lies below the default rank tolerance.
    """
    left_out = float(torch.addmm(wide, basis.T, images, alpha=-1).norm())
    return left_out <= _EPS * max(wide.shape) * size / wide.shape[0] ** 0.5


def _orthonormalise(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """QR of what `block` (columns) adds to `basis` (rows); once leaves rounding in its span."""
    step, first = torch.linalg.qr(block - basis.T @ (basis @ block))
    step, second = torch.linalg.qr(step - basis.T @ (basis @ step))
    return step, second @ first


def _gain(values: Tensor, residuals: Tensor, image: Tensor) -> float:
    """Estimate the relative energy one more Lanczos step would add to the Ritz values found.

    A Ritz value θ coupled by residual r to a direction of energy μ is [[θ, r], [r, μ]]:
    its larger eigenvalue exceeds θ by √(h² + r²) − h, h = (θ − μ)/2. μ: the last block's mean.
    """
    half_gap = ((values - image.square().sum(dim=1).mean()) / 2).clamp(min=0).double()
    gains = torch.hypot(half_gap, residuals.norm(dim=0).double()) - half_gap
    return float(gains.sum() / values.double().sum())


def _finish(svd: SVD, shape: tuple[int, ...], rank_tolerance: float | None, signs: Signs) -> SVD:
    """Drop what is below the numerical rank, cast, fix signs."""
    u, values, vh = svd
    if rank_tolerance is None:
        rank_tolerance = max(shape) * _EPS
    kept = int((values > rank_tolerance * values[:1]).sum())
    svd = SVD(*(part.float().contiguous() for part in (u[:, :kept], values[:kept], vh[:kept])))
    return fix_signs(svd) if signs == "largest_positive" else svd
