"""Weight averaging: the weighted mean of the experts, as base plus the mean of the task vectors.

Paper: Wortsman et al. 2022 (model soups); mergekit calls it `linear`.
"""

from jaxtyping import Float
from torch import Tensor

from personae.methods._parameters import per_expert
from personae.methods._registry import everywhere, merge_method


@merge_method(paper="arXiv:2203.05482", order_free=True, entrywise=everywhere, aliases=("linear",))
def average(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...] = 1.0,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """Average the experts: Σ w_n τ_n / Σ w_n, entry by entry.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Weight of each expert.
        normalize: Whether to divide by the sum of the weights.

    Returns:
        The merged task vector. Added to the base it is the mean of the experts, up to rounding.
    """
    if weight == 1.0 and normalize:
        return task_vectors.mean(dim=0)
    weights = per_expert(weight, task_vectors)
    total = (task_vectors * weights).sum(dim=0)
    return total / weights.sum() if normalize else total
