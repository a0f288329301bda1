"""Weight averaging: the weighted mean of the experts, as base plus the mean of the task vectors.

Paper: Wortsman et al. 2022 (model soups); mergekit calls it `linear`.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from personae.errors import MethodError
from personae.methods._entries import weighted_sum
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method

_RELATIVE_ZERO = 1e-6
_ROUNDING = 1e-6


def _coefficients(parameters: Any, experts: int) -> list[float]:
    weights = one_each(parameters.weight, experts)
    total = sum(weights) if parameters.normalize else 1.0
    return [weight / total for weight in weights]


def _check(parameters: Any, experts: int, has_base: bool) -> str:
    weights = one_each(parameters.weight, experts)
    if parameters.normalize:
        return faulty_sum("average", weights)
    return "" if has_base else faulty_scale("average", weights)


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


@merge_method(
    paper="arXiv:2203.05482",
    order_free=True,
    entrywise=everywhere,
    check=_check,
    coefficients=_coefficients,
    bytes_per_entry=12,
    aliases=("linear",),
)
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
        normalize: Whether to divide by the sum of the weights. Without, the base enters once all
            the same, as in `task_arithmetic`: base + Σ w_n τ_n, not Σ w_n θ_n. Without a base both
            are meant, and recipes whose weights do not sum to 1 are refused.

    Returns:
        The merged task vector. Added to the base it is the mean of the experts, up to rounding.

    Raises:
        MethodError: if the weights sum to 0 and would be divided by.
    """
    weights = one_each(weight, len(task_vectors))
    fault = faulty_sum("average", weights) if normalize else ""
    if fault:
        raise MethodError(fault)
    total = weighted_sum(task_vectors, weights)
    return total.div_(sum(weights)) if normalize else total
