"""Truncated SVD: only the leading triplets, at the price of a few matrix products.

Solvers, of which `auto` takes the cheapest for the shape and rank (`benchmarks/svd.py` measures
what the thresholds rest on):

* `randomised`: block Lanczos (`ops/krylov.py`), for small ranks. Reads A at every step.
* `gram`: eigenvectors of A Aᵀ (`ops/gram.py`), in fp64 where squares in fp32 drown small values.
* `full`: LAPACK's reduced SVD.

The first stops once it estimates that at most `ENERGY_TOLERANCE` is missed; where a spectrum does
not let it, `gram` takes over. Both find a subspace of the small side; their factors end up
orthonormal to fp32 whatever the conditioning.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from personae._types import SVD
from personae.errors import MethodError
from personae.ops.gram import CHUNK, EPS, by_eigenvectors, exact_gram
from personae.ops.krylov import by_lanczos

Solver = Literal["auto", "randomised", "gram", "full"]
Signs = Literal["largest_positive", "solver"]

KRYLOV_LIMIT = 0.75
"""Basis / small side at which the randomised solver gives up: Gaussian noise at rank 0.3 fits."""
KRYLOV_COLUMNS = 2.25
"""Basis / rank where the check usually holds: 2 for σ_i ∝ i^-0.5, 2.5 to 5 for Gaussian noise."""
KRYLOV_OVERHEAD = 2.0
"""Time of an operation in its narrow products over one in the wide products of the others."""
SMALLEST_TO_APPROXIMATE = 256
"""Small side below which either takes milliseconds and the more exact is the better one."""
BLOCKS_PER_RANK = 8
"""Rank / Lanczos block: smaller blocks converge on fewer columns but read A more often."""
TALLEST_FOR_KRYLOV = 8
"""Large / small side above which reading A at every step costs more than forming A Aᵀ once."""
SMALLEST_BLOCK = 16
"""Columns beneath which a product is bound by reading A."""
PROBE_BLOCK = 80
"""Columns of a Lanczos block tried before other solvers: deltas of rank 64 show at once."""
PROBE_SHARE = 0.07
"""Cost of that block / cost of the solver, up to which it is tried."""


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    solver: Solver = "auto",
    rank_tolerance: float | None = None,
    signs: Signs = "largest_positive",
    seed: int = 0,
    overwrite: bool = False,
) -> SVD:
    """The `rank` leading singular triplets of a matrix, or fewer where its numerical rank is lower.

    Args:
        matrix: Any floating dtype, finite; computed in fp32.
        rank: Triplets wanted, at least 0; more than min(out, in) means all.
        solver: `auto` chooses by shape and rank; `randomised` ends as `gram` if its check fails.
        rank_tolerance: Singular values ≤ this · σ₁ are dropped; None: max(out, in) · eps of fp32.
        signs: `largest_positive` applies `fix_signs`; `solver` keeps what came out.
        seed: Start of the randomised solver; the global generator is neither read nor moved.
        overwrite: Whether the matrix, in fp32, may be scaled in place; else it is not modified.

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
    peak = largest_magnitude(matrix) if rank else 0.0
    if peak == 0:
        rows, columns = matrix.shape
        return SVD(matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(0, columns))
    # Squares of very small or large deltas would leave the range of fp32.
    wide = wide.div_(peak) if overwrite else wide / peak
    u, values, vh = _solve(wide, rank, solver, seed)
    u, vh = (u, vh) if wide.shape == matrix.shape else (vh.T, u.T)
    return _finish(SVD(u, values * peak, vh), matrix.shape, rank_tolerance, signs)


class Spectrum(NamedTuple):
    """The smaller side of a matrix, decomposed in fp64 by its Gram matrix.

    Attributes:
        side: The matrix over `peak`, transposed if it is taller than wide; fp64.
        vectors: Left singular vectors of `side`.
        values: Its singular values, ascending.
        peak: The matrix's largest magnitude: squares of tiny entries would vanish.
    """

    side: Float64[Tensor, "small large"]
    vectors: Float64[Tensor, "small small"]
    values: Float64[Tensor, " small"]
    peak: float


def exact_spectrum(matrix: Float[Tensor, "out in"]) -> Spectrum | None:
    """All singular values and the vectors of the smaller side; None of a matrix of zeros.

    Squares lose singular values beneath about 1e-7 of the largest: no less than what fp32 entries
    leave uncertain.
    """
    peak = largest_magnitude(matrix) if matrix.numel() else 0.0
    if peak == 0:
        return None
    exact = matrix.to(torch.float64, copy=True).div_(peak)
    side = exact if matrix.shape[0] <= matrix.shape[1] else exact.T
    energies, vectors = torch.linalg.eigh(side @ side.T)
    return Spectrum(side, vectors, energies.clamp(min=0).sqrt(), peak)


def singular_values(matrix: Float[Tensor, "out in"]) -> Float64[Tensor, " small"]:
    """All singular values, descending, by the Gram matrix of the smaller side in fp64.

    As exact as those of `exact_spectrum`, without vectors and without all of the matrix in fp64.
    """
    matrix = matrix.float()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(exact_gram(wide)).clamp(min=0).sqrt().flip(0)


def singular_values_bytes(shape: tuple[int, int]) -> int:
    """Peak memory of that, the matrix in fp32 left out: Gram matrix, LAPACK's room, its chunks."""
    small, large = sorted(shape)
    return 24 * small * small + 8 * small * (large if shape[0] <= shape[1] else min(large, CHUNK))


def numerical_rank(values: Float[Tensor, " small"], shape: tuple[int, int]) -> int:
    """How many singular values are above max(out, in) · eps of fp32 · σ₁."""
    return int((values > max(shape) * EPS * values[:1]).sum())


def effective_rank(values: Float[Tensor, " small"]) -> float:
    """Exp of the entropy of σᵢ / Σσ (Roy, Vetterli 2007): how many directions matter; 0 of none.

    Examples:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
        2.0
    """
    shares = values.double() / values.sum().double() if values.any() else values[:0].double()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0


def exact_svd(matrix: Float[Tensor, "out in"], rank: int) -> SVD:
    """The `rank` leading singular triplets in fp64, for work in which single directions count.

    From the eigenvectors of the Gram matrix of the smaller side, in fp64: two directions are
    blurred by 2e-16 · σ₁² / (σ_i σ_j), less than the rounding of fp32 entries down to 1e-5 of σ₁.
    Twice as fast as LAPACK's SVD in fp32. What is only to be rebuilt is served better by
    `truncated_svd`, which stops where little energy is missed.

    Args:
        matrix: Any floating dtype, finite; never modified.
        rank: Triplets wanted; more than min(out, in) means all.

    Returns:
        Factors in fp64, k ≤ rank of them: those of σ > max(out, in) · eps of fp32 · σ₁. Signs are
        as they come; u and vh belong together.
    """
    rows, columns = matrix.shape
    found = exact_spectrum(matrix) if rank else None
    if found is None:
        nothing = matrix.new_zeros(0, dtype=torch.float64)
        return SVD(nothing.view(rows, 0), nothing, nothing.view(0, columns))
    values = found.values.flip(0)
    kept = min(rank, numerical_rank(values, (rows, columns)))
    values, vectors = values[:kept], found.vectors.flip(1)[:, :kept]
    others = (vectors.T @ found.side) / values[:, None]
    values = values * found.peak
    return SVD(vectors, values, others) if rows <= columns else SVD(others.T, values, vectors.T)


def svd_bytes(shape: tuple[int, int], rank: int, solver: Solver = "auto") -> int:
    """Peak memory of `truncated_svd` at this rank, the matrix itself left out.

    It holds the matrix scaled, in fp32, and of what a solver works on:

    * `gram`: the Gram matrix, its eigenvectors and LAPACK's room of twice their size, in fp64 (32
      bytes an entry) where fp32 does not do; before that, of what is not tall, all of it in fp64.
      Afterwards up to four of both factors, on their way to be orthonormal and to have signs.
    * `randomised`: a basis and its image of up to `KRYLOV_LIMIT` of the small side, the image in
      fp64; or, to see whether nothing is left to look for, the matrix once more. Or what `gram`
      holds, which may take over.
    * `full`: LAPACK's copy, both factors and a little room.
    """
    small, large = sorted(shape)
    kept = min(rank, small)
    if not kept:
        return 0
    scaled, probe = 4 * small * large, False
    if solver == "auto":
        solver, probe = _choose(small, large, kept)
    if solver == "full":
        return scaled + 8 * small * large + 8 * small * small
    exact = 8 * small * min(large, CHUNK if shape[0] > shape[1] else large)
    found = 16 * kept * (small + large)
    most = max(32 * small * small, 8 * small * small + exact, 4 * small * small + found)
    if solver == "randomised" or probe:
        columns = min(int(KRYLOV_LIMIT * small) if solver == "randomised" else PROBE_BLOCK, small)
        basis = 4 * columns * (small + large)
        in_fp64 = 8 * columns * large + 32 * columns * columns
        most = max(most, basis + max(in_fp64, 4 * small * large, found))
    return scaled + most


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


def largest_magnitude(matrix: Float[Tensor, "..."]) -> float:
    """The largest magnitude; without a copy of all of them."""
    return float(torch.stack(matrix.aminmax()).abs().max())


def _solve(wide: Tensor, rank: int, solver: Solver, seed: int) -> SVD:
    """Run the solver asked for, or the fastest for this shape; the exact one if its check fails."""
    small, large = wide.shape
    found, probe = None, False
    if solver == "auto":
        solver, probe = _choose(small, large, rank)
    if solver == "full":
        u, values, vh = torch.linalg.svd(wide, full_matrices=False)
        return SVD(u[:, :rank], values[:rank], vh[:rank])
    if solver == "randomised":
        block = min(max(SMALLEST_BLOCK, rank // BLOCKS_PER_RANK), small)
        found = by_lanczos(wide, rank, seed, block, limit=int(KRYLOV_LIMIT * small))
    elif probe:
        found = by_lanczos(wide, rank, seed, PROBE_BLOCK, limit=PROBE_BLOCK)
    return by_eigenvectors(wide, rank) if found is None else found


def _choose(small: int, large: int, rank: int) -> tuple[Solver, bool]:
    """The faster solver by leading terms, and whether one Lanczos block is worth trying first."""
    gram = 1.5 * small**2 * large + 9 * small**3  # eigh(n) takes as long as 9 n³ in products
    if small < SMALLEST_TO_APPROXIMATE or large > TALLEST_FOR_KRYLOV * small:
        return "gram", False
    if _krylov(small, large, KRYLOV_COLUMNS * rank) < gram:
        return "randomised", False
    return "gram", _krylov(small, large, PROBE_BLOCK) < PROBE_SHARE * gram


def _krylov(small: int, large: int, columns: int | float) -> float:
    operations = 4 * small * large * columns + 4 * small * columns**2 + 9 * columns**3
    return KRYLOV_OVERHEAD * operations


def _finish(svd: SVD, shape: tuple[int, ...], rank_tolerance: float | None, signs: Signs) -> SVD:
    """Drop what is below the numerical rank, cast, fix signs."""
    u, values, vh = svd
    if rank_tolerance is None:
        rank_tolerance = max(shape) * EPS
    kept = int((values > rank_tolerance * values[:1]).sum())
    svd = SVD(*(part.float().contiguous() for part in (u[:, :kept], values[:kept], vh[:kept])))
    return fix_signs(svd) if signs == "largest_positive" else svd
