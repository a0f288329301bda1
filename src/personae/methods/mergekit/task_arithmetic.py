"""`task_arithmetic` of mergekit 0.1.5: λ · Σ w_n τ_n."""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae.methods._entries import weighted_sum
from personae.methods._merge import RowWise, Statistics, as_function
from personae.methods._parameters import one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided

_SMALLEST_DIVISOR = 1e-8


@merge_method(paper="arXiv:2212.04089", conventions="mergekit")
class TaskArithmetic(RowWise):
    """Add up the weighted task vectors, times lambda."""

    rows: ClassVar = (0, 16)
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

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        merged = weighted_sum(task_vectors, self.weight)
        divisor = sum(one_each(self.weight, len(task_vectors))) if self.normalize else 1.0
        return merged.mul_(
            self.lambda_ if abs(divisor) < _SMALLEST_DIVISOR else self.lambda_ / divisor
        )


task_arithmetic = as_function(TaskArithmetic)
