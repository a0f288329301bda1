"""Singular triplets by block Lanczos on A Aᵀ, from a Gaussian block (arXiv:1504.05477).

Blocks are much smaller than the rank (arXiv:2508.06486). The basis grows while the residual says
that energy is missed; past a limit the caller turns to another solver.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD
from personae.ops.gram import (
    ENERGY_TOLERANCE,
    EPS,
    dominant,
    estimated_gain,
    rayleigh_ritz,
)

MISSED_PER_STEP = 8.0
"""Energy missed / estimated gain of one more step: 1 to 5 on power-law and Gaussian spectra."""


def by_lanczos(
    wide: Float[Tensor, "small large"], rank: int, seed: int, block: int, limit: int
) -> SVD | None:
    """Grow a basis until its check holds; None if it would pass `limit` columns.

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
        settled = float(coupling.norm()) <= EPS * size * size
        if enough or (settled and _spans_rows(wide, basis[:filled], images[:filled])):
            values, vectors = dominant(images[:filled], min(rank, filled))
            residuals = (coupling @ vectors[-block:]).norm(dim=0)
            last = float(image.square().sum(dim=1).mean())  # energy of a direction just found
            if estimated_gain(values, residuals, last) * MISSED_PER_STEP <= ENERGY_TOLERANCE:
                return rayleigh_ritz(basis[:filled].T @ vectors, images[:filled].T @ vectors)
            due = filled * 5 // 4
    return None


def _spans_rows(
    wide: Float[Tensor, "small large"],
    basis: Float[Tensor, "k small"],
    images: Float[Tensor, "k large"],
) -> bool:
    """Whether A = QQᵀA up to fp32 (rows q, Aᵀq): a delta of low rank, nothing left to look for.

    ‖A‖/√small ≤ σ₁, and what is left out lies below the default rank tolerance.
    """
    left_out = float(torch.addmm(wide, basis.T, images, alpha=-1).norm())
    return left_out <= EPS * max(wide.shape) * float(wide.norm()) / wide.shape[0] ** 0.5


def _orthonormalise(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """QR of what `block` (columns) adds to `basis` (rows); once leaves rounding in its span."""
    step, first = torch.linalg.qr(block - basis.T @ (basis @ block))
    step, second = torch.linalg.qr(step - basis.T @ (basis @ step))
    return step, second @ first
