"""`task_arithmetic` of mergekit 0.1.5: λ · Σ w_n τ_n."""

from jaxtyping import Float
from torch import Tensor

from personae.methods._entries import weighted_sum
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method

_SMALLEST_DIVISOR = 1e-8


@merge_method(
    paper="arXiv:2212.04089",
    order_free=True,
    entrywise=everywhere,
    degenerates="the average whatever lambda, where all weights are the same",
    bytes_per_entry=12,
    conventions="mergekit",
)
def task_arithmetic(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Add up the weighted task vectors, times lambda.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Coefficient of each expert.
        normalize: Whether to divide by the sum of the weights (by 1 if that is below 1e-8).
        lambda_: Multiplier on the result.

    Returns:
        The merged task vector, fp32.
    """
    merged = weighted_sum(task_vectors, weight)
    divisor = sum(one_each(weight, len(task_vectors))) if normalize else 1.0
    return merged.mul_(lambda_ if abs(divisor) < _SMALLEST_DIVISOR else lambda_ / divisor)
