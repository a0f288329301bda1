"""Iso-C (Marczak et al. 2025): the sum of the task vectors with a flat spectrum.

Departs from the paper where that leaves the choice to rounding: of a sum without full rank (as of
adapters) only the directions it has get the common singular value, where the paper's decomposition
fills what is missing with arbitrary ones. The value is the paper's, the mean over min(m, d) values,
or the mean over those there are, which keeps the nuclear norm of the sum.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae.methods._entries import mean
from personae.methods._matrices import Tensors, from_both_sides, is_matrix, not_matrix
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.polar import polar_factor, sum_tolerance

AverageOver = Literal["side", "rank"]


@merge_method(
    paper="arXiv:2502.04959",
    order_free=True,
    entrywise=not_matrix,
    equivariant=from_both_sides,
    degenerates="weight averaging: the sum is 0 there, up to rounding",
    bytes_per_entry=24,
)
def iso_c(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    tensors: Tensors = "matrices",
    average_over: AverageOver = "side",
    scale: float = 1.0,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Give all singular directions of the sum one value, their mean; average other tensors.

    Σ_n τ_n = U Σ Vᵀ becomes scale · mean(σ) · U Vᵀ.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        tensors: Which tensors are merged so; the rest is averaged.
        average_over: Whether the mean of the values is over min(m, d), as published, or over
            the rank of the sum, where that is less.
        scale: Multiplier on the result, averages included (α in the paper, tuned up to 3).
        site: Which tensor.

    Returns:
        The merged task vector, fp32.
    """
    if not is_matrix(tensors, site):
        return scale * mean(task_vectors)
    total = task_vectors.sum(dim=0, dtype=torch.float64)
    factor, values = polar_factor(total, sum_tolerance(task_vectors))
    value = flat_value(values, min(site.shape), average_over)
    return (factor * (scale * value)).float()


def flat_value(values: Float[Tensor, " rank"], side: int, average_over: AverageOver) -> float:
    """The one value that all directions get; 0 where there is none."""
    return float(values.sum()) / max(1, side if average_over == "side" else len(values))
