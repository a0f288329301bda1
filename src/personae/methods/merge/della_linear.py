"""DELLA's first step alone (Deep et al. 2024): drop small entries rather than large ones, add up.

Entries are dropped as in `della`. mergekit calls it so; it is to `della` what `dare` is to
`dare_ties`.
"""

from collections.abc import Iterator
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae._types import Density
from personae.methods._deltas import DeltaBlocks
from personae.methods._dropping import beyond_certainty, dropped_sums, rank_bytes, rank_dropper
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.della import Width


@merge_method(paper="arXiv:2406.11617")
class DELLALinear(RowWise):
    """Drop entries at random by the rank of their magnitude, rescale the rest, add them up."""

    order_free: ClassVar = False
    counts_experts: ClassVar = False
    whole_rows: ClassVar = True

    density: Density | tuple[Density, ...] = Field(
        default=0.7, description="Mean probability that an entry is kept (1 - p of the paper)."
    )
    epsilon: Width | tuple[Width, ...] = Field(
        default=0.14,
        description="Probability of the largest entry of a row less that of the smallest.",
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert; not divided by their sum."
    )
    rescale: bool = Field(
        default=True,
        description=(
            "Whether kept entries are divided by their probability, so that their expectation is "
            "τ_n."
        ),
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")
    seed: int = Field(default=0, description="Seed of the random masks: same seed, same model.")

    def check(self, experts: int, has_base: bool) -> str:
        """Probabilities beyond 0 or 1."""
        pairs = zip(one_each(self.density, experts), one_each(self.epsilon, experts), strict=True)
        return beyond_certainty(self.name, ((d, e / 2) for d, e in pairs))

    def working(self, experts: int) -> int:
        """The sum; entries are dropped in place."""
        return 4

    def block_bytes(
        self, site: Site, entries: int, experts: int, *, has_reference: bool = True
    ) -> int:
        """See `Entrywise.block_bytes`; and the tables by rank."""
        block = super().block_bytes(site, entries, experts, has_reference=has_reference)
        return block + rank_bytes(site.row_entries, experts)

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        fill = rank_dropper(
            site,
            density=self.density,
            spread=self.epsilon,
            weight=self.weight,
            rescale=self.rescale,
            seed=self.seed,
            experts=blocks.experts,
        )
        return dropped_sums(blocks, fill, self.scale)


della_linear = as_function(DELLALinear)
