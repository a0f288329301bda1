"""Weight averaging: the weighted mean of the experts, as base plus the mean of the task vectors.

Paper: Wortsman et al. 2022 (model soups); mergekit calls it `linear`.
"""

from collections.abc import Iterator

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.errors import MethodError
from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import Linear, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site

_RELATIVE_ZERO = 1e-6
_ROUNDING = 1e-6


def faulty_sum(method: str, weights: tuple[float, ...]) -> str:
    """What is wrong with weights that are to be divided by their sum, if anything."""
    if abs(sum(weights)) > _RELATIVE_ZERO * sum(map(abs, weights)):
        return ""
    listed = ", ".join(f"{weight:g}" for weight in weights)
    return (
        f"{method} divides by the sum of the weights, and {listed} sum to 0. "
        "Change one, or set normalize to false."
    )


def faulty_scale(method: str, weights: tuple[float, ...]) -> str:
    """What is wrong with weights of whole models that are not divided by their sum, if anything."""
    if abs(sum(weights) - 1) <= _ROUNDING:
        return ""
    return (
        f"{method}: normalize is false and the weights sum to {sum(weights):g}, which would scale "
        "the whole model. Make them sum to 1, or scale task vectors alone with task_arithmetic."
    )


@merge_method(paper="arXiv:2203.05482", aliases=("linear",))
class Average(Linear):
    """Average the experts: Σ w_n τ_n / Σ w_n, entry by entry.

    Returns:
        The merged task vector. Added to the base it is the mean of the experts, up to rounding.
    """

    weight: float | tuple[float, ...] = Field(default=1.0, description="Weight of each expert.")
    normalize: bool = Field(
        default=True,
        description=(
            "Whether to divide by the sum of the weights. If false, the result is base + Σ w_n "
            "τ_n, as in `task_arithmetic`, not Σ w_n θ_n. Without a base, false is refused "
            "unless the weights sum to 1."
        ),
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that sum to 0, or without a base and `normalize`, not to 1."""
        weights = one_each(self.weight, experts)
        if self.normalize:
            return faulty_sum("average", weights)
        return "" if has_base else faulty_scale("average", weights)

    def coefficients(self, experts: int) -> list[float]:
        """w_n / Σ w_n."""
        weights = one_each(self.weight, experts)
        total = sum(weights) if self.normalize else 1.0
        return [weight / total for weight in weights]

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`.

        Raises:
            MethodError: if the weights sum to 0 and would be divided by.
        """
        weights = one_each(self.weight, blocks.experts)
        fault = faulty_sum("average", weights) if self.normalize else ""
        if fault:
            raise MethodError(fault)
        return weighted_sums(blocks, weights, divisor=sum(weights) if self.normalize else 1.0)


average = as_function(Average)
