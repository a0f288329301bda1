"""`dare_linear` of mergekit 0.1.5: entries dropped at random, norms restored, added up.

mergekit draws its masks from one global generator in the order of the work; here they are those of
`dare`, so that results agree in distribution, not entry by entry.
"""

from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropped_sum, dropper
from personae.methods._merge import Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import drop_norms, rescaled

_SMALLEST_DIVISOR = 1e-8


@merge_method(
    paper="arXiv:2311.03099",
    order_free=False,
    entrywise=everywhere,
    gather=drop_norms,
    scope="tensor",
    looks=1,
    conventions="mergekit",
)
def dare_linear(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...],
    density: Density | tuple[Density, ...] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    seed: int = 0,
    statistics: Statistics | None = None,
    site: Site | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop entries at random, restore each tensor's norm, add up the weighted task vectors.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Coefficient of each expert.
        density: Probability that an entry is kept.
        normalize: Whether to divide by the sum of the weights (by 1 if that is below 1e-8).
        rescale: Whether what is kept of a tensor gets the L1 norm of the whole.
        lambda_: Multiplier on the result.
        seed: Of the masks.
        statistics: With `rescale`, `norms` (expert, 2, bins), int64, sums of magnitudes.
        site: Which tensor, and from which entry on.

    Returns:
        The merged task vector, fp32.
    """
    assert statistics is not None, "dare_linear needs the norms"
    assert site is not None, "dare_linear needs to know which entries it is given"
    experts = len(task_vectors)
    weights, densities = one_each(weight, experts), one_each(density, experts)
    factors = rescaled(weights, densities, statistics.get("norms"))
    divisor = sum(weights) if normalize else 1.0
    scale = lambda_ if abs(divisor) < _SMALLEST_DIVISOR else lambda_ / divisor
    fill = dropper(site, density=density, weight=factors, rescale=False, seed=seed, experts=experts)
    return dropped_sum(task_vectors, fill, scale)
