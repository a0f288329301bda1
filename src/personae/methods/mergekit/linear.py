"""`linear` of mergekit 0.1.5: the weighted mean, or the weighted sum, of the experts."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.average import Average, faulty_sum


@merge_method(paper="arXiv:2203.05482", conventions="mergekit")
class Linear(RowWise):
    """Average the experts: Σ w_n θ_n / Σ w_n; without `normalize` their sum, Σ w_n θ_n.

    Where mergekit would return values that are not finite (weights that sum to 0), this refuses.

    Returns:
        What is to be added to the reference of which the blocks tell; to 0 if they tell of none.
    """

    weight: float | tuple[float, ...] = Field(description="Weight of each expert.")
    normalize: bool = Field(
        default=True,
        description=(
            "Whether to divide by the sum of the weights. If not, and that is not 1, the model as "
            "a whole is scaled by it."
        ),
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that sum to 0 and are to be divided by that."""
        return faulty_sum("linear", one_each(self.weight, experts)) if self.normalize else ""

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        rest = 0.0 if self.normalize else sum(one_each(self.weight, blocks.experts)) - 1.0
        mean = Average(weight=self.weight, normalize=self.normalize)
        for merged in mean.merge_blocks(blocks, statistics, site):
            if rest and blocks.has_reference:  # Σ w θ = θ₀ + Σ w τ + (Σ w - 1) θ₀
                merged += np.float32(rest) * blocks.reference
            yield merged


linear = as_function(Linear)
