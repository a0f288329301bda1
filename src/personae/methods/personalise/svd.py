"""The low-rank baseline of the DTS paper: truncated SVD, factors in full precision.

The paper says that its rank is tuned to the memory of DTS; its printed memory rates are those of
one fixed rank fraction, 0.03, which is the default here.
"""

from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae import _types
from personae._types import Parts, RankFraction
from personae.methods._codec import Bits, Codec
from personae.methods._registry import codec
from personae.ops.parts import cut, part
from personae.ops.rows import restore_rows, touched_rows
from personae.ops.svd import truncated_svd


@codec(paper="arXiv:2512.01461")
class SVD(Codec):
    """Truncated SVD in fp32: matrices at low rank, every other tensor exact.

    Parts:
        left: U, row after row, [m·k].
        singular_values: σ, [k].
        right: Vᵀ, row after row, [k·d].
        exact: a tensor that is no matrix, as it is.

    All are fp32. A zero delta, or one of rank 0, has no parts.
    """

    rank_fraction: RankFraction = Field(
        default=0.03, description="Singular triplets kept, as a fraction of the smaller dimension."
    )
    solver: Literal["auto", "randomised", "filtered", "gram", "full"] = Field(
        default="auto", description="Algorithm of the decomposition."
    )
    rank_tolerance: float | None = Field(
        default=None, ge=0, description="Fraction of σ₁ below which a singular value counts as 0."
    )

    def rank(self, shape: tuple[int, ...]) -> int:
        """`⌊rank_fraction · min(m, d)⌋` of a matrix; 0 for other tensors, which stay exact."""
        return int(self.rank_fraction * min(shape) + 1e-9) if len(shape) == 2 else 0

    def decompose(self, delta: Float[Tensor, "out in"], rank: int) -> _types.SVD:
        """Truncated SVD of the rows that changed; the other rows of `u` are exact zeros."""
        touched = touched_rows(delta)
        svd = truncated_svd(
            delta if touched.all() else delta[touched],
            rank,
            solver=self.solver,
            rank_tolerance=self.rank_tolerance,
        )
        return svd._replace(u=restore_rows(svd.u, touched))

    def encode(self, delta: Float[Tensor, "..."], svd: _types.SVD | None = None) -> Parts:
        """Keep the leading triplets of a matrix, or the tensor itself."""
        if not delta.any():
            return {}
        if delta.ndim != 2:
            return {"exact": delta.flatten().clone()}
        rank = self.rank(tuple(delta.shape))
        if rank == 0:
            return {}
        u, singular_values, vh = svd or self.decompose(delta, rank)
        if not singular_values.any():
            return {}
        return {
            "left": u[:, :rank].flatten().clone(),
            "singular_values": singular_values[:rank].clone(),
            "right": vh[:rank].flatten().clone(),
        }

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        if len(shape) != 2:
            return cut(parts, "exact", [prod(shape)])[0].reshape(shape).clone()
        singular_values = part(parts, "singular_values")
        rank, (rows, columns) = len(singular_values), shape
        left = cut(parts, "left", [rows * rank])[0].reshape(rows, rank)
        right = cut(parts, "right", [rank * columns])[0].reshape(rank, columns)
        return left @ (singular_values[:, None] * right)

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """32 bits for every number kept."""
        numbers = prod(shape)
        if len(shape) == 2:
            numbers = (self.rank(shape) if rank is None else rank) * (sum(shape) + 1)
        return Bits(32 * numbers, 32 * numbers, 32 * numbers)
