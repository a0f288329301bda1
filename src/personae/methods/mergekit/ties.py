"""`ties` of mergekit 0.1.5: trimmed tensor by tensor, averaged by weight.

As many entries are kept as there. Of those that tie with the last one, the first in order are,
where there an unstable sort picks.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._entries import ballots, find_thresholds
from personae.methods._merge import Gathering, Measure, Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import consensus, l1_share, rescaled
from personae.methods.mergekit._cuts import find_cuts, trimmer


def _gather(parameters: Any, experts: int) -> Gathering:
    """Looks for each expert's threshold and ties, and one for the norms if they are restored."""
    thresholds = yield from find_thresholds(parameters.density, experts)
    cuts = yield from find_cuts(parameters.density, thresholds, experts)
    found = {"thresholds": thresholds, "cuts": cuts}
    if parameters.rescale:

        def norms(vectors: Tensor, _: Any, site: Site) -> Tensor:
            return l1_share(vectors, trimmer(thresholds, cuts, (1.0,) * experts, site))

        found["norms"] = yield Measure("norms", norms)
    return found


@merge_method(
    paper="arXiv:2306.01708",
    order_free=True,
    entrywise=everywhere,
    gather=_gather,
    scope="tensor",
    looks=3,
    conventions="mergekit",
)
def ties(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    weight: float | tuple[float, ...],
    density: Density | tuple[Density, ...] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    site: Site,
    statistics: Statistics | None = None,
) -> Float[Tensor, "*shape"]:
    """Trim each tensor, weight it, elect the sign of the sum, average by weight what agrees.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        weight: Coefficient of each expert, applied before signs are elected.
        density: Fraction of entries kept of each tensor.
        normalize: Whether to divide by the sum of the weights that agree.
        rescale: Whether trimming restores each tensor's L1 norm.
        lambda_: Multiplier on the result.
        site: Which tensor, and from which entry on.
        statistics: `thresholds` (expert,), fp32, and `cuts` (expert,), int64; with `rescale` also
            `norms` (expert, 2, bins), int64, sums of magnitudes.

    Returns:
        The merged task vector, fp32.
    """
    assert statistics is not None, "ties needs its thresholds"
    experts = len(task_vectors)
    weights, densities = one_each(weight, experts), one_each(density, experts)
    factors = rescaled(weights, densities, statistics.get("norms"))
    fill = trimmer(statistics["thresholds"], statistics["cuts"], factors, site)
    merged = torch.empty(task_vectors[0].numel())
    for block, ballot in ballots(task_vectors, fill):
        merged[block] = consensus(ballot, weights, normalize=normalize, scale=lambda_)
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)
