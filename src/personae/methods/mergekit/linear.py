"""`linear` of mergekit 0.1.5: the weighted mean of the experts."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods.merge.average import average, faulty_scale, faulty_sum


def _check(parameters: Any, experts: int, _: bool) -> str:
    weights = one_each(parameters.weight, experts)
    return (faulty_sum if parameters.normalize else faulty_scale)("linear", weights)


@merge_method(
    paper="arXiv:2203.05482",
    order_free=True,
    entrywise=everywhere,
    check=_check,
    bytes_per_entry=12,
    conventions="mergekit",
)
def linear(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...],
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """Average the experts: Σ w_n θ_n / Σ w_n.

    Where mergekit would return values that are not finite (weights that sum to 0) or a scaled model
    (`normalize: false` and weights that do not sum to 1), this refuses.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Weight of each expert.
        normalize: Whether to divide by the sum of the weights; if not, it has to be 1.

    Returns:
        The merged task vector, fp32.
    """
    return average(task_vectors, weight=weight, normalize=normalize)
