"""One basis for several matrices: the SVD of them side by side, from a Gram matrix of its short side.

[W₁ … W_N] = U Σ [V₁ᵀ … V_Nᵀ] is found as the eigenvectors U of Σ_t W_t W_tᵀ (or, where the matrices
side by side are taller than wide, of the Gram matrix of their columns). The Gram matrix squares the
condition: a direction of singular value σ is blurred by eps · (σ₁/σ)². fp64 keeps that below fp32
rounding down to σ = 1e-4 σ₁; what lies below is projected out and decomposed anew, relative to its
own largest value, until nothing above the tolerance is left.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from personae.ops.svd import largest_positive

NULL_SPACE = 2 * torch.finfo(torch.float32).eps
"""σ / σ₁ below which a direction of an fp32 stack is rounding noise."""
BAND = 1e-4
"""σ / σ₁ that one Gram matrix in fp64 tells apart from noise, to fp32 precision."""
FP32_PROJECTION = 1e-2
"""Smallest kept σ / σ₁ for which Uᵀ W in fp32 is good enough: its error is eps · σ₁."""
_PANELS = 4


class StackedSVD(NamedTuple):
    """The joint decomposition: W_t = basis @ coordinates[t], up to directions left out.

    Attributes:
        basis: U, orthonormal columns; fp32.
        values: σ, descending; fp32.
        coordinates: Σ V_tᵀ of each matrix; fp32.
    """

    basis: Float[Tensor, "out rank"]
    values: Float[Tensor, " rank"]
    coordinates: Float[Tensor, "expert rank in"]

    def cut(self, rank: int) -> "StackedSVD":
        """The leading `rank` directions alone."""
        return StackedSVD(self.basis[:, :rank], self.values[:rank], self.coordinates[:, :rank])


def stacked_svd(stack: Float[Tensor, "expert out in"], rank_tolerance: float = 0.0) -> StackedSVD:
    """Decompose several matrices side by side.

    Args:
        stack: fp32, finite; never modified.
        rank_tolerance: Directions of σ ≤ this · σ₁ are left out; those of σ ≤ `NULL_SPACE` · σ₁
            always.

    Returns:
        All directions above the tolerance, min(out, expert · in) at most, none for a stack of
        zeros. Of each basis vector the entry of largest magnitude is positive.
    """
    experts, rows, columns = stack.shape
    tolerance = max(rank_tolerance, NULL_SPACE)
    wide = rows <= experts * columns
    blocks = list(stack) if wide else [stack.transpose(1, 2).reshape(experts * columns, rows)]
    vectors, values = _leading(blocks, tolerance)
    if not len(values):
        nothing = stack.new_zeros
        return StackedSVD(nothing(rows, 0), nothing(0), nothing(experts, 0, columns))
    # Where U comes from the projection it must be orthonormal: fp64, whatever the spectrum.
    exact = not wide or bool(values[-1] < FP32_PROJECTION * values[0])
    vectors = vectors if exact else vectors.float()
    images = [(vectors.T @ block.to(vectors.dtype)) for block in blocks]
    if wide:
        basis, coordinates = vectors, torch.stack([image.float() for image in images])
    else:
        basis = (images[0] / values[:, None]).T
        coordinates = (vectors * values).T.float().reshape(-1, experts, columns).movedim(0, 1)
    signs = largest_positive(basis)
    return StackedSVD(
        (basis * signs).float(), values.float(), coordinates * signs.float()[:, None]
    )


def stacked_rank(stack: Float[Tensor, "expert out in"], rank_tolerance: float) -> int:
    """Number of directions of several matrices side by side with σ > `rank_tolerance` · σ₁."""
    experts, rows, columns = stack.shape
    wide = rows <= experts * columns
    blocks = list(stack) if wide else [stack.transpose(1, 2).reshape(experts * columns, rows)]
    energies = torch.linalg.eigvalsh(_gram(blocks)).flip(0)
    return int((energies > rank_tolerance**2 * energies[0]).sum()) if energies[0] > 0 else 0


def _leading(
    blocks: Sequence[Float[Tensor, "short part"]], tolerance: float
) -> tuple[Float[Tensor, "short rank"], Float[Tensor, " rank"]]:
    """Left singular vectors and values of the blocks side by side, above the tolerance; fp64."""
    frame: Tensor | None = None  # what is left to decompose lies in its span; None: everything
    vectors: list[Tensor] = []
    values: list[Tensor] = []
    while True:
        energies, turned = torch.linalg.eigh(_gram(blocks))
        found = energies.flip(0).clamp(min=0).sqrt()
        turned = turned.flip(1)
        first = values[0][0] if values else found[0]
        floor = torch.maximum(tolerance * first, BAND * found[0])
        kept = int((found > floor).sum())
        whole = turned if frame is None else frame @ turned
        vectors.append(whole[:, :kept])
        values.append(found[:kept])
        if kept == len(found) or floor <= tolerance * first:
            return torch.cat(vectors, dim=1), torch.cat(values)
        frame = whole[:, kept:]
        blocks = [turned[:, kept:].T @ block.double() for block in blocks]


def _gram(blocks: Sequence[Float[Tensor, "short part"]]) -> Float[Tensor, "short short"]:
    """Lower triangle (what `eigh` reads) of Σ block · blockᵀ, fp64, by panels of rows."""
    short = len(blocks[0])
    gram = torch.zeros(short, short, dtype=torch.float64, device=blocks[0].device)
    for block in blocks:
        rows = block.double()
        for start, stop in _panels(short):
            gram[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)
    return gram


def _panels(length: int) -> Iterator[tuple[int, int]]:
    step = -(-length // _PANELS)
    for start in range(0, length, step):
        yield start, min(start + step, length)
