"""Task arithmetic (Ilharco et al. 2023): add up the task vectors, times a coefficient.

The default leaves the task vectors at full length, so that what is added is what the weights say.
With several experts that overshoots; the papers use less: DTS's code a scale of 0.3 for eight
tasks, DRM's 0.4, the original 0.3 to 0.4 found on validation data.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from personae.methods._entries import weighted_sum
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method


def _coefficients(parameters: Any, experts: int) -> list[float]:
    return [parameters.scale * weight for weight in one_each(parameters.weight, experts)]


@merge_method(
    paper="arXiv:2212.04089",
    order_free=True,
    entrywise=everywhere,
    coefficients=_coefficients,
    degenerates="the average whatever the scale, where all weights are the same",
    bytes_per_entry=12,
)
def task_arithmetic(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...] = 1.0,
    scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors: scale · Σ w_n τ_n.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Coefficient of each expert; not divided by their sum.
        scale: Multiplier on the result (λ in the paper); 1 / experts makes it the average.

    Returns:
        The merged task vector, fp32.
    """
    return weighted_sum(task_vectors, weight).mul_(scale)
