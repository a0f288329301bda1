"""Products of two thin factors, and how few directions hold how much of a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD
from personae.ops.gram import exact_gram


def balanced(
    svd: SVD, *, overwrite: bool = False
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """`left @ right` = U diag(σ) Vᵀ, the root of each value in both.

    Args:
        svd: U, σ and Vᵀ.
        overwrite: Whether the factors take the place of U and Vᵀ.
    """
    u, values, vh = svd
    root = values.abs().sqrt()
    left, right = (u, vh) if overwrite else (None, None)
    return (
        torch.mul(u, root, out=left),
        torch.mul(vh, (values.sign() * root)[:, None], out=right),
    )


def truncated_product(
    left: Float[Tensor, "out inner"], right: Float[Tensor, "inner in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Balanced factors of the best approximation of `left @ right` at this rank, in fp32.

    From the SVD of the small matrix between orthonormal bases of both, in fp64: the product itself
    is never formed.
    """
    q, core, p = _core(left, right)
    u, values, vh = torch.linalg.svd(core)
    u, values, vh = u[:, :rank], values[:rank], vh[:rank]
    found = balanced(SVD(q @ u, values, vh @ p.T))
    return found[0].float(), found[1].float()


def product_energies(
    left: Float[Tensor, "out inner"], right: Float[Tensor, "inner in"]
) -> Float[Tensor, " rank"]:
    """σ² of `left @ right`, descending, in fp64."""
    return torch.linalg.svdvals(_core(left, right)[1]).square()


def energies(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " rank"]:
    """σ² of a matrix, descending, in fp64: to 2e-16 of the largest."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(exact_gram(wide.float())).clamp(min=0).flip(0)


def energies_bytes(shape: tuple[int, int]) -> int:
    """Peak memory of `energies`: the matrix in fp64, and LAPACK's room for its Gram matrix."""
    small, large = sorted(shape)
    return 8 * small * large + 24 * small * small


def smallest_rank(energies: Float[Tensor, " rank"], share: float) -> int:
    """How many leading directions hold this share of all energy; 0 if there is none.

    Args:
        energies: σ², descending.
        share: Above 0, at most 1.
    """
    sums = energies.double().cumsum(0)
    if not len(sums) or sums[-1] == 0:
        return 0
    # Rounding in the last bits of the sum must not ask for directions that hold nothing.
    return 1 + int((sums < share * sums[-1] * (1 - 1e-12)).sum())


def _core(
    left: Float[Tensor, "out inner"], right: Float[Tensor, "inner in"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases of both factors and the small matrix between them, in fp64."""
    q, of_left = torch.linalg.qr(left.double())
    p, of_right = torch.linalg.qr(right.double().T)
    return q, of_left @ of_right.T, p
