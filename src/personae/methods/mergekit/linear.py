"""`linear` of mergekit 0.1.5: the weighted mean of the experts."""

from collections.abc import Iterator

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.average import Average, faulty_scale, faulty_sum


@merge_method(paper="arXiv:2203.05482", conventions="mergekit")
class Linear(RowWise):
    """Average the experts: Σ w_n θ_n / Σ w_n.

    Where mergekit would return values that are not finite (weights that sum to 0) or a scaled model
    (`normalize: false` and weights that do not sum to 1), this refuses.
    """

    weight: float | tuple[float, ...] = Field(description="Weight of each expert.")
    normalize: bool = Field(
        default=True,
        description="Whether to divide by the sum of the weights; if not, it must be 1.",
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that sum to 0, or without `normalize` not to 1."""
        weights = one_each(self.weight, experts)
        return (faulty_sum if self.normalize else faulty_scale)("linear", weights)

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        mean = Average(weight=self.weight, normalize=self.normalize)
        return mean.merge_blocks(blocks, statistics, site)


linear = as_function(Linear)
