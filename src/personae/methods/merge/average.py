"""Weight averaging: the mean of the experts, here as base plus the mean of the task vectors."""

from jaxtyping import Float
from torch import Tensor

from personae.methods._registry import merge_method


@merge_method(paper="arXiv:2203.05482", order_free=True)
def average(task_vectors: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """Average the experts: (1/N) Σ τ_n, entry by entry.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.

    Returns:
        The merged task vector. Added to the base it is the mean of the experts, up to rounding.
    """
    return task_vectors.mean(dim=0)
