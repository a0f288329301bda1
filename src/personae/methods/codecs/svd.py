"""The low-rank baseline of the DTS paper: truncated SVD, factors in full precision.

The paper says that its rank is tuned to the memory of DTS; its printed memory rates are those of
one fixed rank fraction, 0.03, which is the default here.
"""

from math import prod
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, float32

from personae import _types
from personae._types import Layout, Parts, PartSpec, RankFraction
from personae.methods._codec import Bits, Codec, Context, decompose_touched
from personae.methods._low_rank import (
    decode_low_rank,
    encode_low_rank,
    low_rank_layout,
    stored_triplets,
)
from personae.methods._registry import codec
from personae.ops.parts import cut
from personae.ops.svd import svd_bytes


@codec(paper="arXiv:2512.01461")
class SVD(Codec):
    """Truncated SVD in fp32: matrices at low rank, every other tensor exact.

    Matrices of one row or one column are vectors, and exact, as in the code that the published
    rates came from.

    Parts:
        left: U, row after row, [m·k].
        singular_values: σ, [k].
        right: Vᵀ, row after row, [k·d].
        exact: a tensor that is no matrix, or of one row or column, as it is.

    All are fp32. A zero delta, or one of rank 0, has no parts.
    """

    free: ClassVar = frozenset({"rank_fraction"})
    by_budget: ClassVar = "rank_fraction"

    rank_fraction: RankFraction = Field(
        default=0.03, description="Singular triplets kept, as a fraction of the smaller dimension."
    )
    solver: Literal["auto", "randomised", "gram", "full"] = Field(
        default="auto", description="Algorithm of the decomposition."
    )
    rank_tolerance: float | None = Field(
        default=None, ge=0, description="Fraction of σ₁ below which a singular value counts as 0."
    )

    def rank(self, shape: tuple[int, ...]) -> int:
        """`⌊rank_fraction · min(m, d)⌋` of a matrix; 0 for other tensors, which stay exact."""
        return 0 if _is_kept_exact(shape) else int(self.rank_fraction * min(shape) + 1e-9)

    def decompose(self, delta: Float[Tensor, "out in"], rank: int) -> _types.SVD:
        """Truncated SVD of the rows that changed; the other rows of `u` are exact zeros."""
        return decompose_touched(
            delta, rank, solver=self.solver, rank_tolerance=self.rank_tolerance
        )

    def decomposing_bytes(self, matrix: tuple[int, int], rank: int) -> int:
        """With the solver asked for."""
        return svd_bytes(matrix, rank, self.solver)

    def encode(
        self,
        delta: Float[Tensor, "..."],
        svd: _types.SVD | None = None,
        context: Context | None = None,
    ) -> Parts:
        """Keep the leading triplets of a matrix, or the tensor itself."""
        if not delta.any():
            return {}
        if _is_kept_exact(tuple(delta.shape)):
            return {"exact": delta.flatten().clone()}
        rank = self.rank(tuple(delta.shape))
        return encode_low_rank(svd or self.decompose(delta, rank), rank) if rank else {}

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if parts and _is_kept_exact(shape):
            return cut(parts, "exact", [prod(shape)])[0].reshape(shape).clone()
        return decode_low_rank(parts, shape)

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> _types.SVD | None:
        """The factors."""
        return stored_triplets(parts, shape) if "singular_values" in parts else None

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """Factors of a matrix, or the tensor itself."""
        if _is_kept_exact(shape):
            return {"exact": PartSpec.of(float32, prod(shape))}
        return low_rank_layout(shape, rank)

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """32 bits for every number kept."""
        numbers = prod(shape)
        if not _is_kept_exact(shape):
            numbers = (self.rank(shape) if rank is None else rank) * (sum(shape) + 1)
        return Bits(32 * numbers, 32 * numbers, 32 * numbers)


def _is_kept_exact(shape: tuple[int, ...]) -> bool:
    return len(shape) != 2 or min(shape) == 1
