"""DARE-TIES (Yu et al. 2024): TIES with entries dropped at random in place of trimming.

Masks are those of `dare`; signs are elected and what agrees is merged as in `ties`. The published
figures are of two algorithms (D27). The DARE authors' code (MergeLM) runs all of TIES on what is
left, its trimming to 20 % included: `trim: 0.2`, as FusionBench's, gives those. In the DRM paper's
tables, as here by default, dropping takes the place of trimming. Below a density of 0.2 there is
nothing left to trim, and both are the same. mergekit does not average what agrees.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropped, dropper
from personae.methods._entries import (
    Fill,
    PerExpert,
    find_thresholds,
    limits_of,
    merge_elected,
    votes,
    votes_by_mass,
)
from personae.methods._entries import trim as trim_rows
from personae.methods._merge import Gathering, Measure, Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided


def _gather(parameters: Any, experts: int) -> Gathering:
    """Looks for the thresholds of trimming, if there is any, and one for the majority sign."""

    def kept(vectors: Tensor, own: Any, site: Site) -> Tensor:
        return dropped(vectors, _dropper(own, site, experts, weight=1.0))

    found: dict[str, Tensor] = {}
    if parameters.trim < 1:
        found["thresholds"] = yield from find_thresholds(parameters.trim, experts, kept)

    def vote(vectors: Tensor, own: Any, site: Site) -> Tensor:
        return votes(vectors, _fill(own, site, experts, found.get("thresholds")), own.elect)

    # A single expert is never outvoted.
    majority = (yield Measure("majority", vote, late=True)) if experts > 1 else torch.tensor(0)
    return found if majority is None else {**found, "majority": majority.sign()}


@merge_method(
    paper="arXiv:2311.03099",
    order_free=False,
    entrywise=everywhere,
    late=votes_by_mass,
    gather=_gather,
    model_wide=("scope", "trim"),
)
def dare_ties(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    density: Density | tuple[Density, ...] = 0.2,
    weight: float | tuple[float, ...] = 1.0,
    rescale: bool = True,
    trim: Density = 1.0,
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
        trim: Fraction of all entries that is kept of each expert after dropping, those of largest
            magnitude. 1: no trimming; 0.2: the DARE authors' algorithm.
        scope: Whether an expert is trimmed, and undecided entries take the majority sign, over the
            whole model or over the tensor.
        reduce: Mean, sum or largest magnitude of the entries that agree.
        elect: Whether experts vote with their magnitudes or one vote each.
        scale: Multiplier on the result.
        seed: Of the masks: same seed, same model.
        statistics: `majority` (), int64, over the scope; with `trim`, `thresholds` (expert,), fp32.
        site: Which tensor, and from which entry on.
        undecided: Told of entries that are undecided, which become 0, if the majority is not
            known yet.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """
    assert statistics is not None, "dare_ties needs the majority sign"
    assert site is not None, "dare_ties needs to know which entries it is given"
    own = _Dropping(density, weight, rescale, seed)
    return merge_elected(
        task_vectors,
        _fill(own, site, len(task_vectors), statistics.get("thresholds")),
        elect=elect,
        reduce=reduce,
        scale=scale,
        statistics=statistics,
        undecided=undecided,
    )


class _Dropping(NamedTuple):
    """The parameters that say what is dropped, as `Parameters` name them."""

    density: PerExpert
    weight: PerExpert
    rescale: bool
    seed: int


def _dropper(own: Any, site: Site, experts: int, weight: PerExpert) -> Fill:
    return dropper(
        site,
        density=own.density,
        weight=weight,
        rescale=own.rescale,
        seed=own.seed,
        experts=experts,
    )


def _fill(own: Any, site: Site, experts: int, thresholds: Float[Tensor, " expert"] | None) -> Fill:
    """Drops, and trims what is left where there are thresholds."""
    if thresholds is None:
        return _dropper(own, site, experts, own.weight)
    drop = _dropper(own, site, experts, weight=1.0)
    limits, weights = limits_of(thresholds), one_each(own.weight, experts)

    def fill(start: int, rows: list[Tensor], kept: Tensor) -> None:
        drop(start, rows, kept)
        trim_rows(list(kept.clone()), limits, weights, kept)

    return fill
