"""`dare_ties` of mergekit 0.1.5: entries dropped at random, norms restored, what agrees added up.

It adds what agrees, where `ties` there and `dare_ties` here take a mean. Masks are those of `dare`
(mergekit's come from one global generator in the order of the work): results agree in distribution.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropper
from personae.methods._entries import ballots
from personae.methods._merge import Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import consensus, drop_norms, rescaled


@merge_method(
    paper="arXiv:2311.03099",
    order_free=False,
    entrywise=everywhere,
    gather=drop_norms,
    scope="tensor",
    looks=1,
    conventions="mergekit",
)
def dare_ties(
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
    """Drop entries at random, restore each tensor's norm, elect signs, add up what agrees.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Coefficient of each expert, applied before signs are elected.
        density: Probability that an entry is kept.
        normalize: Whether to divide by the sum of the weights that agree.
        rescale: Whether what is kept of a tensor gets the L1 norm of the whole.
        lambda_: Multiplier on the result.
        seed: Of the masks.
        statistics: With `rescale`, `norms` (expert, 2, bins), int64, sums of magnitudes.
        site: Which tensor, and from which entry on.

    Returns:
        The merged task vector, fp32.
    """
    assert statistics is not None, "dare_ties needs the norms"
    assert site is not None, "dare_ties needs to know which entries it is given"
    experts = len(task_vectors)
    weights, densities = one_each(weight, experts), one_each(density, experts)
    factors = rescaled(weights, densities, statistics.get("norms"))
    fill = dropper(site, density=density, weight=factors, rescale=False, seed=seed, experts=experts)
    merged = torch.empty(task_vectors[0].numel())
    for block, ballot in ballots(task_vectors, fill):
        merged[block] = consensus(ballot, weights, normalize=normalize, scale=lambda_)
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)
