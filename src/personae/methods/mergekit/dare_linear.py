"""`dare_linear` of mergekit 0.1.5: entries dropped at random, norms restored, added up.

mergekit draws its masks from one global generator in the order of the work; here they are those of
`dare`, so that results agree in distribution, not entry by entry.
"""

from collections.abc import Iterator

from jaxtyping import Float
from numpy import ndarray

from personae.methods._deltas import DeltaBlocks
from personae.methods._dropping import dropped_sums
from personae.methods._entries import Undecided
from personae.methods._merge import as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import Dropping, rescaled

_SMALLEST_DIVISOR = 1e-8


@merge_method(paper="arXiv:2311.03099", conventions="mergekit")
class DARELinear(Dropping):
    """Drop entries at random, restore each tensor's norm, add up the weighted task vectors."""

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
        divisor = sum(weights) if self.normalize else 1.0
        scale = self.lambda_ if abs(divisor) < _SMALLEST_DIVISOR else self.lambda_ / divisor
        fill = self.fill(site, experts, factors)
        return dropped_sums(blocks, fill, scale)


dare_linear = as_function(DARELinear)
