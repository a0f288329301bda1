"""`dare_ties` of mergekit 0.1.5: entries dropped at random, norms restored, what agrees added up.

It adds what agrees, where `ties` there and `dare_ties` here take a mean. Masks are those of `dare`
(mergekit's come from one global generator in the order of the work): results agree in distribution.
"""

from collections.abc import Iterator

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided
from personae.methods._merge import as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import Dropping, consensus, rescaled


@merge_method(paper="arXiv:2311.03099", conventions="mergekit")
class DARETIES(Dropping):
    """Drop entries at random, restore each tensor's norm, elect signs, add up what agrees."""

    weight: float | tuple[float, ...] = Field(
        description="Coefficient of each expert, applied before signs are elected."
    )
    normalize: bool = Field(
        default=False, description="Whether to divide by the sum of the weights that agree."
    )

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        experts = blocks.experts
        weights, densities = one_each(self.weight, experts), one_each(self.density, experts)
        factors = rescaled(weights, densities, statistics.get("norms"))
        fill = self.fill(site, experts, factors)
        return consensus(blocks, fill, weights, normalize=self.normalize, scale=self.lambda_)


dare_ties = as_function(DARETIES)
