"""Iso-C (Marczak et al. 2025): the sum of the task vectors with a flat spectrum.

Departs from the paper where that leaves the choice to rounding: of a sum without full rank (as of
adapters) only the directions it has get the common singular value, where the paper's decomposition
fills what is missing with arbitrary ones. The value is the paper's, the mean over min(m, d) values,
or the mean over those there are, which keeps the nuclear norm of the sum.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function, matrix_memory
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.polar import polar_factor, sum_tolerance

AverageOver = Literal["side", "rank"]


@merge_method(paper="arXiv:2502.04959")
class IsoC(MatrixWise):
    """Give all singular directions of the sum their mean value; average other tensors.

    Σ_n τ_n = U Σ Vᵀ becomes scale · mean(σ) · U Vᵀ.
    """

    rows: ClassVar = (0, 20)
    side: ClassVar = "both"
    degenerates: ClassVar = "weight averaging: the sum is 0 there, up to rounding"

    tensors: Tensors = Field(
        default="matrices",
        description="Which tensors are merged this way; the others are averaged.",
    )
    average_over: AverageOver = Field(
        default="side",
        description=(
            "Whether the mean of the values is over min(m, d), as published, or over the rank of "
            "the sum, if that is less."
        ),
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Multiplier on the result, averages included (α in the paper, tuned up to 3)."
        ),
    )

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, entry=37, square=17)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        if not is_matrix(self.tensors, site):
            return self.scale * mean(task_vectors)
        total = task_vectors.sum(dim=0, dtype=torch.float64)
        factor, values = polar_factor(total, sum_tolerance(task_vectors))
        value = flat_value(values, min(site.shape), self.average_over)
        return (factor * (self.scale * value)).float()


iso_c = as_function(IsoC)


def flat_value(values: Float[Tensor, " rank"], side: int, average_over: AverageOver) -> float:
    """The one value that all directions get; 0 where there is none."""
    return float(values.sum()) / max(1, side if average_over == "side" else len(values))
