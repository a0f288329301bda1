"""CART (Choi et al. 2024): the average, plus what sets each expert apart from it, at low rank.

The average takes the place of the base, so that difference vectors and task vectors give the same
model. Ranks are rounded down, as everywhere here (a third party's code rounds up).
"""

from jaxtyping import Float
from torch import Tensor

from personae._types import RankFraction
from personae.methods._entries import mean
from personae.methods._matrices import Tensors, from_both_sides, is_matrix, not_matrix
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.svd import truncated_svd


@merge_method(
    paper="arXiv:2412.12153",
    order_free=True,
    entrywise=not_matrix,
    equivariant=from_both_sides,
    bytes_per_entry=16,
)
def cart(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    rank_fraction: RankFraction = 0.08,
    tensors: Tensors = "matrices",
    scale: float = 1.0,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Add low-rank deviations from the mean to the mean; average other tensors.

    τ̄ + scale · Σ_n SVD_k(τ_n − τ̄), k = ⌊rank_fraction · min(m, d)⌋. The deviations themselves sum
    to 0: at full rank, or of two experts, whose deviations are opposite, this is weight averaging.

    Args:
        task_vectors: One vector per expert, stacked in recipe order; fp32. What they are relative
            to, base or average, does not matter.
        rank_fraction: Singular directions kept of each deviation (the paper: 0.04 to 0.32).
        tensors: Which tensors are merged so; the rest is averaged.
        scale: Multiplier on the deviations (λ in the paper, tuned on validation data).
        site: Which tensor; k follows from the shape of the whole tensor.

    Returns:
        The merged vector, fp32, relative to what the input is relative to.
    """
    merged = mean(task_vectors)
    rank = int(rank_fraction * min(site.shape, default=0) + 1e-9)
    if rank == 0 or not is_matrix(tensors, site):
        return merged
    center = merged.clone()
    for matrix in task_vectors:
        u, singular_values, vh = truncated_svd(matrix - center, rank)
        merged.addmm_(u * singular_values, vh, alpha=scale)
    return merged
