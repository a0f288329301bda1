"""DARE-TIES (Yu et al. 2024): TIES with entries dropped at random in place of trimming.

Masks are those of `dare`; signs are elected and what agrees is merged as in `ties`. Other codes by
this name trim by magnitude as well (FusionBench), or do not average what agrees (mergekit).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropper
from personae.methods._entries import merge_elected, votes, votes_by_mass
from personae.methods._merge import Gathering, Measure, Statistics
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided


def _gather(_: Any, experts: int) -> Gathering:
    """One look, for the majority sign."""

    def vote(vectors: Tensor, own: Any, site: Site) -> Tensor:
        fill = dropper(
            site,
            density=own.density,
            weight=own.weight,
            rescale=own.rescale,
            seed=own.seed,
            experts=experts,
        )
        return votes(vectors, fill, own.elect)

    # A single expert is never outvoted.
    majority = (yield Measure("majority", vote, late=True)) if experts > 1 else torch.tensor(0)
    return {} if majority is None else {"majority": majority.sign()}


@merge_method(
    paper="arXiv:2311.03099",
    order_free=False,
    entrywise=everywhere,
    late=votes_by_mass,
    gather=_gather,
    model_wide=("scope",),
)
def dare_ties(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    density: Density | tuple[Density, ...] = 0.2,
    weight: float | tuple[float, ...] = 1.0,
    rescale: bool = True,
    scope: Literal["model", "tensor"] = "model",
    reduce: Literal["mean", "sum", "max"] = "mean",
    elect: Literal["mass", "count"] = "mass",
    scale: float = 1.0,
    seed: int = 0,
    statistics: Statistics | None = None,
    site: Site | None = None,
    undecided: Undecided | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop entries at random, elect one sign per entry, merge the entries that agree.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        density: Probability that an entry is kept (1 - p of the paper), to the nearest 1/65536.
        weight: Coefficient of each expert's kept entries, before signs are elected, as in `ties`.
        rescale: Whether what is kept is divided by the density, so that its expectation is τ_n.
        scope: Whether undecided entries take the majority sign of the whole model or of the tensor.
        reduce: Mean, sum or largest magnitude of the entries that agree.
        elect: Whether experts vote with their magnitudes or one vote each.
        scale: Multiplier on the result.
        seed: Of the masks: same seed, same model.
        statistics: `majority` (), int64, over the scope.
        site: Which tensor, and from which entry on.
        undecided: Told of entries that are undecided, which become 0, if the majority is not
            known yet.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """
    assert statistics is not None, "dare_ties needs the majority sign"
    assert site is not None, "dare_ties needs to know which entries it is given"
    fill = dropper(
        site,
        density=density,
        weight=weight,
        rescale=rescale,
        seed=seed,
        experts=len(task_vectors),
    )
    return merge_elected(
        task_vectors,
        fill,
        elect=elect,
        reduce=reduce,
        scale=scale,
        statistics=statistics,
        undecided=undecided,
    )
