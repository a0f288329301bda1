"""CART (Choi et al. 2024): the average, plus what sets each expert apart from it, at low rank.

The average takes the place of the base, so that difference vectors and task vectors give the same
model. Defaults are those of the authors' code (JH-GEECS/CART, D28), tuned by them on CLIP ViT-B/32:
attention and MLP weights alone, with rank and λ of the nearest of their three numbers of tasks.
"""

from jaxtyping import Float
from torch import Tensor

from personae._types import RankFraction
from personae.methods._entries import mean
from personae.methods._matrices import Tensors, from_both_sides, is_matrix, not_matrix
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.svd import exact_svd

_TUNED = ((0.12, 2.0), (0.16, 1.5), (0.32, 1.9))
"""(rank_fraction, scale) that the authors chose for 8, 14 and 20 tasks."""
_MOST_TASKS = (11, 17)


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
    rank_fraction: RankFraction | None = None,
    tensors: Tensors = "linear",
    scale: float | None = None,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Add low-rank deviations from the mean to the mean; average other tensors.

    τ̄ + scale · Σ_n SVD_k(τ_n − τ̄), k = max(1, ⌊rank_fraction · min(m, d)⌋). The
    deviations themselves sum to 0: at full rank, or of two experts, whose deviations are opposite,
    this is weight averaging.

    Args:
        task_vectors: One vector per expert, stacked in recipe order; fp32. What they are relative
            to, base or average, does not matter.
        rank_fraction: Singular directions kept of each deviation (the paper: 0.04 to 0.32). If not
            given: 0.12 of up to 11 tasks, 0.16 of up to 17, else 0.32.
        tensors: Which tensors are merged so; the rest is averaged.
        scale: Multiplier on the deviations (λ in the paper). If not given: 2.0, 1.5 or 1.9, as the
            authors found beside these ranks.
        site: Which tensor; k follows from the shape of the whole tensor.

    Returns:
        The merged vector, fp32, relative to what the input is relative to.
    """
    merged = mean(task_vectors)
    if not is_matrix(tensors, site):
        return merged
    fraction, strength = _TUNED[sum(len(task_vectors) > most for most in _MOST_TASKS)]
    fraction = fraction if rank_fraction is None else rank_fraction
    strength = strength if scale is None else scale
    rank = max(1, int(fraction * min(site.shape) + 1e-9))
    center = merged.clone()
    for matrix in task_vectors:
        u, singular_values, vh = exact_svd(matrix - center, rank)
        merged.add_(((u * singular_values) @ vh).float(), alpha=strength)
    return merged
