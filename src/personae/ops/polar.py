"""The orthogonal part of a matrix, over its numerical range alone."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from personae.ops.svd import exact_spectrum

WHITENING_TOLERANCE = 1e-6
"""For singular vectors in fp64 side by side. As many as fill a matrix of m rows have a smallest
singular value of about 1/m, and each such direction counts; copies of one vector leave 1e-8."""

_ROUNDING = 8 * torch.finfo(torch.float32).eps


def sum_tolerance(matrices: Iterable[Float[Tensor, "out in"]]) -> float:
    """What singular values of a sum of fp32 matrices may amount to by rounding alone.

    Errors of single entries, ε times these, make a matrix whose largest singular value is about
    ε ‖A‖ / sqrt(m), m its shorter side. A full matrix has smallest ones not far above: they count.
    """
    return sum(
        _ROUNDING / max(min(matrix.shape), 1) ** 0.5 * float(matrix.norm()) for matrix in matrices
    )


def polar_factor(
    matrix: Float[Tensor, "out in"], tolerance: float
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " rank"]]:
    """The polar factor U Vᵀ of a matrix U Σ Vᵀ, over singular values above the tolerance.

    Of a matrix of full rank it is the nearest with orthonormal rows or columns (the solution of
    the orthogonal Procrustes problem). Otherwise it is a partial isometry: directions that the
    matrix has not got stay 0, where a full decomposition would fill them with arbitrary ones.

    Computed in fp64 from the Gram matrix of the smaller side (`exact_spectrum`).

    Args:
        matrix: Any floating dtype, finite.
        tolerance: Singular values up to this one count as 0.

    Returns:
        The factor and the singular values kept, descending; fp64.
    """
    found = exact_spectrum(matrix)
    if found is None:
        return torch.zeros_like(matrix, dtype=torch.float64), matrix.new_zeros(0).double()
    side, vectors, values, peak = found
    kept = values * peak > tolerance
    values, vectors = values[kept], vectors[:, kept]
    factor = (vectors / values) @ (vectors.T @ side)
    factor = factor if matrix.shape[0] <= matrix.shape[1] else factor.T
    return factor, (values * peak).flip(0)
