"""TSV-Compress: each task keeps its share of the singular directions, in full precision.

arXiv:2412.00081. With N tasks a matrix keeps ⌊min(m, d) / N⌋ triplets, so that all tasks together
store no more directions than one matrix has.
"""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, TensorSpec
from personae.methods._codec import Bits, Codec, Context, Rest, Treatment
from personae.methods._low_rank import (
    decode_low_rank,
    encode_low_rank,
    low_rank_layout,
    stored_triplets,
)
from personae.methods._method import Statistics
from personae.methods._registry import codec
from personae.methods._site import has_matrices


@codec(paper="arXiv:2412.00081")
class TSVCompress(Codec):
    """Truncated SVD in fp32 at rank ⌊min(m, d) / N⌋ for N tasks; other tensors stay exact.

    Parts: those of `svd`.
    """

    of_family: ClassVar = ("tasks",)

    tasks: int | None = Field(
        default=None, ge=1, description="Tasks that share the directions; none: as many as experts."
    )
    rest: Rest = Field(
        default="exact", description="Tensors that are not matrices: exact, or as in the reference."
    )

    def treats(self, spec: TensorSpec) -> Treatment:
        """Matrices are coded."""
        return "code" if has_matrices(spec.name, spec.shape) else self.rest

    def for_family(self, statistics: Sequence[Statistics]) -> "TSVCompress":
        """Count the tasks."""
        return self if self.tasks else self.model_copy(update={"tasks": len(statistics)})

    def rank(self, shape: tuple[int, ...]) -> int:
        """⌊min(m, d) / N⌋; a single task keeps all."""
        return min(shape) // (self.tasks or 1) if len(shape) == 2 else 0

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Keep the leading triplets."""
        rank = self.rank(tuple(delta.shape))
        if rank == 0 or not delta.any():
            return {}
        return encode_low_rank(svd or self.decompose(delta, rank), rank)

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        return decode_low_rank(parts, shape)

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> SVD | None:
        """The factors."""
        return stored_triplets(parts, shape) if "singular_values" in parts else None

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """The factors."""
        return low_rank_layout(shape, rank)

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """32 bits for every number kept, k (m + d + 1) of them."""
        kept = 32 * (self.rank(shape) if rank is None else rank) * (sum(shape) + 1)
        return Bits(kept, kept, kept)
