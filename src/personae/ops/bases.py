"""Orthonormal bases that several matrices share."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from personae.ops.svd import largest_positive


def joint_basis(
    matrices: Sequence[Float[Tensor, "out _"]],
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    """Left singular vectors, and singular values, of matrices set side by side.

    By the smaller side: LAPACK's SVD where there are fewer columns than rows, else eigenvectors of
    the Gram matrix Σ A Aᵀ, which know singular values beneath about 1e-8 of the largest (σ₁) to no
    better than that.

    Args:
        matrices: With equally many rows; any floating dtype, finite.

    Returns:
        Basis, fp64, min(rows, all columns) vectors, of each the entry of largest magnitude
        positive; singular values, fp64, descending.
    """
    rows, columns = len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)
    if columns < rows:
        basis, values, _ = torch.linalg.svd(
            torch.cat([matrix.double() for matrix in matrices], dim=1), full_matrices=False
        )
    else:
        gram = matrices[0].new_zeros(rows, rows, dtype=torch.float64)
        for matrix in matrices:
            exact = matrix.double()
            gram.addmm_(exact, exact.T)
        energies, basis = torch.linalg.eigh(gram)
        values, basis = energies.clamp(min=0).sqrt().flip(0), basis.flip(1)
    if not values.numel():
        return basis, values
    return basis * largest_positive(basis), values
