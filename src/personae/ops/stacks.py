"""One basis for several matrices: the SVD of them side by side, from the Gram matrix of a side.

[W₁ … W_N] = U Σ [V₁ᵀ … V_Nᵀ] is found as the eigenvectors U of Σ_t W_t W_tᵀ (or, where the
matrices side by side are taller than wide, of the Gram matrix of their columns). The Gram matrix
squares the condition: two directions are blurred by eps · σ₁² / (σ_i σ_j). fp64 keeps that below
fp32 rounding down to σ = 1e-4 σ₁; what lies below is projected out and decomposed anew, relative to
its own largest value, until nothing above the tolerance is left. A Gram matrix in fp32 would take
half the time, but it turns directions of nearly one σ, as of noise beneath a few strong directions,
into each other, and DRM prunes what each of them holds: its result was 6 % off.
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
COUNTED_IN_FP32 = 1e-2
"""Smallest σ / σ₁ above which directions can be counted by a Gram matrix in fp32."""
SQUARES_VANISH = 1e-15
"""Length in fp32 below which squares of entries may have left its range."""
SQUARES_STAY = 1e-12, 1e12
"""Largest magnitudes of a stack between which the sums of its squares stay well inside fp32."""
_PANELS = 8


class StackedSVD(NamedTuple):
    """The joint decomposition: W_t = basis @ coordinates[t], up to directions left out.

    Attributes:
        basis: U, orthonormal columns; fp32.
        values: σ, descending up to rounding; fp32.
        coordinates: Σ V_tᵀ of each matrix; fp32.
        lengths: Norm of each row of the coordinates; fp32.
    """

    basis: Float[Tensor, "out rank"]
    values: Float[Tensor, " rank"]
    coordinates: Float[Tensor, "expert rank in"]
    lengths: Float[Tensor, "expert rank"]

    def cut(self, rank: int) -> "StackedSVD":
        """The leading `rank` directions alone."""
        basis, values, coordinates, lengths = self
        return StackedSVD(basis[:, :rank], values[:rank], coordinates[:, :rank], lengths[:, :rank])


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
    blocks, wide = _blocks(stack)
    tolerance = max(rank_tolerance, NULL_SPACE)
    vectors, ratio = _leading(blocks, tolerance)
    if not vectors.shape[1]:
        nothing = stack.new_zeros
        return StackedSVD(
            nothing(rows, 0), nothing(0), nothing(experts, 0, columns), nothing(experts, 0)
        )
    # Where U comes from the projection it must be orthonormal: fp64, whatever the spectrum.
    vectors = vectors if ratio < FP32_PROJECTION or not wide else vectors.float()
    if wide:
        basis = vectors.mul_(largest_positive(vectors))
        coordinates = basis.new_empty(experts, basis.shape[1], columns)
        for block, place in zip(blocks, coordinates, strict=True):
            torch.mm(basis.T, block.to(basis.dtype), out=place)
    else:
        image = vectors.T @ blocks[0].to(vectors.dtype)
        found = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        basis = (image / found).T
        signs = largest_positive(basis)
        basis = basis * signs
        coordinates = vectors.T * (found * signs[:, None])
        coordinates = coordinates.reshape(-1, experts, columns).movedim(0, 1)
    lengths = torch.linalg.vector_norm(coordinates, dim=2)
    if float(lengths.min()) < SQUARES_VANISH:
        lengths = torch.linalg.vector_norm(coordinates, dim=2, dtype=torch.float64)
    values = torch.linalg.vector_norm(lengths, dim=0, dtype=torch.float64)
    return StackedSVD(basis.float(), values.float(), coordinates.float(), lengths.float())


def stacked_rank(stack: Float[Tensor, "expert out in"], rank_tolerance: float) -> int:
    """Number of directions of several matrices side by side with σ > `rank_tolerance` · σ₁."""
    blocks, _ = _blocks(stack)
    dtype = torch.float32 if rank_tolerance >= COUNTED_IN_FP32 else torch.float64
    energies = torch.linalg.eigvalsh(_gram(blocks, dtype))
    most = energies[-1]
    return int((energies > rank_tolerance**2 * most).sum()) if most > 0 else 0


def _blocks(
    stack: Float[Tensor, "expert out in"],
) -> tuple[list[Float[Tensor, "short part"]], bool]:
    """The matrices side by side, or that transposed if it is taller than wide; and whether wide."""
    experts, rows, columns = stack.shape
    if rows <= experts * columns:
        return list(stack), True
    return [stack.transpose(1, 2).reshape(experts * columns, rows)], False


def _leading(
    blocks: Sequence[Float[Tensor, "short part"]], tolerance: float
) -> tuple[Float[Tensor, "short rank"], float]:
    """Left singular vectors of the blocks side by side, and their smallest σ / σ₁."""
    frame: Tensor | None = None  # what is left to decompose lies in its span; None: everything
    vectors: list[Tensor] = []
    top, ratio = 0.0, 1.0
    while True:
        energies, turned = torch.linalg.eigh(_gram(blocks, torch.float64))
        found = energies.flip(0).clamp(min=0).sqrt()
        turned = turned.flip(1)
        first = float(found[0])
        top = top or first
        floor = max(tolerance * top, BAND * first)
        kept = int((found > floor).sum())
        ratio = float(found[kept - 1]) / top if kept else ratio
        whole = turned if frame is None else frame @ turned
        vectors.append(whole[:, :kept])
        if kept == len(found) or floor <= tolerance * top:
            return vectors[0] if frame is None else torch.cat(vectors, dim=1), ratio
        frame = whole[:, kept:]
        blocks = [turned[:, kept:].T @ block.double() for block in blocks]


def _gram(
    blocks: Sequence[Float[Tensor, "short part"]], dtype: torch.dtype
) -> Float[Tensor, "short short"]:
    """Lower triangle (what `eigh` reads) of Σ block · blockᵀ, by panels of rows.

    In fp32 of the blocks over their largest magnitude, where squares would leave its range.
    """
    short = len(blocks[0])
    gram = torch.zeros(short, short, dtype=dtype, device=blocks[0].device)
    unit = 1.0
    if dtype == torch.float32:
        peak = max(float(torch.stack(block.aminmax()).abs().max()) for block in blocks)
        if peak and not SQUARES_STAY[0] < peak < SQUARES_STAY[1]:
            unit = peak
    for block in blocks:
        rows = block.to(dtype) if unit == 1 else block / unit
        for start, stop in _panels(short):
            gram[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)
    return gram


def _panels(length: int) -> Iterator[tuple[int, int]]:
    step = -(-length // _PANELS)
    for start in range(0, length, step):
        yield start, min(start + step, length)
