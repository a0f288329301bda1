"""`dare_linear` of mergekit 0.1.5: entries dropped at random, norms restored, added up.

mergekit draws its masks from one global generator in the order of the work; here they are those of
`dare`, so that results agree in distribution, not entry by entry.
"""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropped_sum, dropper
from personae.methods._merge import Gathering, RowWise, Statistics, as_function
from personae.methods._parameters import one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided
from personae.methods.mergekit._consensus import drop_norms, rescaled

_SMALLEST_DIVISOR = 1e-8


@merge_method(paper="arXiv:2311.03099", conventions="mergekit")
class DARELinear(RowWise):
    """Drop entries at random, restore each tensor's norm, add up the weighted task vectors."""

    order_free: ClassVar = False
    default_scope: ClassVar = "tensor"
    looks: ClassVar = 1

    weight: float | tuple[float, ...] = Field(description="Coefficient of each expert.")
    density: Density | tuple[Density, ...] = Field(
        default=1.0, description="Probability that an entry is kept."
    )
    normalize: bool = Field(
        default=False,
        description=("Whether to divide by the sum of the weights (by 1 if that is below 1e-8)."),
    )
    rescale: bool = Field(
        default=True, description="Whether what is kept of a tensor gets the L1 norm of the whole."
    )
    lambda_: float = Field(
        default=1.0,
        alias="lambda",
        description="Multiplier on the result.",
    )
    seed: int = Field(default=0, description="Of the masks.")

    def gather(self, experts: int) -> Gathering:
        """One look, for the norms of what is kept, if they are restored."""
        return drop_norms(self, experts)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        experts = len(task_vectors)
        weights, densities = one_each(self.weight, experts), one_each(self.density, experts)
        factors = rescaled(weights, densities, statistics.get("norms"))
        divisor = sum(weights) if self.normalize else 1.0
        scale = self.lambda_ if abs(divisor) < _SMALLEST_DIVISOR else self.lambda_ / divisor
        fill = dropper(
            site,
            density=self.density,
            weight=factors,
            rescale=False,
            seed=self.seed,
            experts=experts,
        )
        return dropped_sum(task_vectors, fill, scale)


dare_linear = as_function(DARELinear)
