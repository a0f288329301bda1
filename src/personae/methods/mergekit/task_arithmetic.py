"""`task_arithmetic` of mergekit 0.1.5: λ · Σ w_n τ_n."""

from collections.abc import Iterator
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site

_SMALLEST_DIVISOR = 1e-8


@merge_method(paper="arXiv:2212.04089", conventions="mergekit")
class TaskArithmetic(RowWise):
    """Add up the weighted task vectors, times lambda."""

    degenerates: ClassVar = "the average whatever lambda, where all weights are the same"

    weight: float | tuple[float, ...] = Field(description="Coefficient of each expert.")
    normalize: bool = Field(
        default=False,
        description=("Whether to divide by the sum of the weights (by 1 if that is below 1e-8)."),
    )
    lambda_: float = Field(
        default=1.0,
        alias="lambda",
        description="Multiplier on the result.",
    )

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        divisor = sum(one_each(self.weight, blocks.experts)) if self.normalize else 1.0
        scale = self.lambda_ if abs(divisor) < _SMALLEST_DIVISOR else self.lambda_ / divisor
        return weighted_sums(blocks, self.weight, scale=scale)


task_arithmetic = as_function(TaskArithmetic)
