"""Model Breadcrumbs (Davari & Belilovsky 2024): drop the largest and the smallest entries, add up.

The fractions are taken of each tensor, as the paper says it ("layer by layer"); its code takes them
along the last axis, row by row. Entries that tie with the last one kept are kept too.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae._types import Density
from personae.methods._deltas import DeltaBlocks
from personae.methods._dropping import dropped_sums
from personae.methods._entries import Undecided, between, find_bounds
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site

Share = Annotated[float, Field(ge=0, lt=1)]


@merge_method(paper="arXiv:2312.06795")
class Breadcrumbs(RowWise):
    """Drop the largest and the smallest entries of each task vector, add up the rest.

    Of a tensor of n entries the gamma · n largest are dropped, and of the others the density · n
    largest kept: scale · Σ w_n m_n τ_n.
    """

    default_scope: ClassVar = "tensor"
    counts_experts: ClassVar = False
    usual_passes: ClassVar = 2

    density: Density | tuple[Density, ...] = Field(
        default=0.15, description="Fraction of entries kept of each tensor (1 - β of the paper)."
    )
    gamma: Share | tuple[Share, ...] = Field(
        default=0.007,
        description=(
            "Fraction of entries, the largest, that are dropped (1 - γ of the paper); fewer where "
            "density needs them, none at density 1."
        ),
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert; not divided by their sum."
    )
    scale: float = Field(
        default=0.3,
        description="Multiplier on the result (α in the paper, chosen for each family).",
    )

    def working(self, experts: int) -> int:
        """A row's magnitudes and which are too large, or the sum; what is counted is in place."""
        return 4 + 1

    def passes(self, experts: int) -> Passes:
        """Those for the smallest and the largest magnitude kept of each expert."""
        return (yield from find_bounds(self.density, self.gamma, experts))

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return dropped_sums(blocks, between(statistics, self.weight), self.scale)


breadcrumbs = as_function(Breadcrumbs)
