"""Task arithmetic (Ilharco et al. 2023): add up the task vectors, times a coefficient.

The default leaves the task vectors at full length, so that what is added is what the weights say.
With several experts that overshoots; the papers use less: DTS's code a scale of 0.3 for eight
tasks, DRM's 0.4, the original 0.3 to 0.4 found on validation data.
"""

from collections.abc import Iterator
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import Linear, as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="arXiv:2212.04089")
class TaskArithmetic(Linear):
    """Add up the task vectors: scale · Σ w_n τ_n."""

    counts_experts: ClassVar = False
    degenerates: ClassVar = "the average whatever the scale, where all weights are the same"

    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert; not divided by their sum."
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Multiplier on the result (λ in the paper); 1 / experts makes it the average."
        ),
    )

    def coefficients(self, experts: int) -> list[float]:
        """Scale · w_n."""
        return [self.scale * weight for weight in one_each(self.weight, experts)]

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return weighted_sums(blocks, self.weight, scale=self.scale)


task_arithmetic = as_function(TaskArithmetic)
