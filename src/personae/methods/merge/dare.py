"""DARE (Yu et al. 2024): drop entries of the task vectors at random, add up what is left.

The paper states the fraction dropped; here `density` is the fraction kept. Departs from its code:
masks are drawn for each tensor, expert and entry apart, not by a shared generator, so that the
order of the work does not matter (with another seed, name or place of an expert they differ). What
DTS's tables call DARE is density 0.4 without rescaling, of exactly that many entries.
"""

from collections.abc import Iterator
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae._types import Density
from personae.methods._deltas import DeltaBlocks
from personae.methods._dropping import dropped_sums, dropper
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="arXiv:2311.03099", aliases=("dare_linear",))
class DARE(RowWise):
    """Drop entries at random, rescale the rest, add them up: scale · Σ w_n m_n τ_n / density_n."""

    order_free: ClassVar = False
    counts_experts: ClassVar = False

    density: Density | tuple[Density, ...] = Field(
        default=0.4,
        description=(
            "Probability that an entry is kept (1 - p of the paper), to the nearest 1/65536."
        ),
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert; not divided by their sum."
    )
    rescale: bool = Field(
        default=True,
        description=(
            "Whether kept entries are divided by the density, so that their expectation is τ_n."
        ),
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")
    seed: int = Field(default=0, description="Seed of the random masks: same seed, same model.")

    def working(self, experts: int) -> int:
        """The sum; entries are dropped in place."""
        return 4

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        fill = dropper(
            site,
            density=self.density,
            weight=self.weight,
            rescale=self.rescale,
            seed=self.seed,
            experts=blocks.experts,
        )
        return dropped_sums(blocks, fill, self.scale)


dare = as_function(DARE)
