"""Consensus Merging (Wang et al. 2024): keep the entries that several tasks would localise.

Each task marks what TALL-masks would keep of the sum of all task vectors for it; entries with too
few marks are dropped: no task needs them ("catastrophic"), or one alone does ("selfish").
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._entries import blocks
from personae.methods._merge import Gathering, Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._rules import Rule
from personae.methods._site import Site

Threshold = Annotated[float, Field(ge=0)]


def _gather(parameters: Any, experts: int) -> Gathering:
    """What TIES looks for, if the multi-task vector is that of TIES."""
    if parameters.multi_task == "sum":
        return {}
    return (yield from _ties(parameters.density).gather(experts))


def _ties(density: float) -> Rule:
    return Rule("ties", density=density, reduce="sum")


def _check(parameters: Any, experts: int, _: bool) -> str:
    if parameters.at_least <= experts:
        return ""
    return (
        f"consensus: at_least is {parameters.at_least}, and there are {experts} expert(s), so that "
        f"no entry could be kept. Give at most {experts}."
    )


@merge_method(
    paper="arXiv:2405.07813",
    order_free=True,
    entrywise=everywhere,
    gather=_gather,
    check=_check,
    degenerates="weight averaging: the multi-task vector is the sum, which is 0 there",
    model_wide=("multi_task", "density"),
)
def consensus(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    threshold: Threshold | tuple[Threshold, ...] = 0.4,
    at_least: Annotated[int, Field(ge=1)] = 2,
    multi_task: Literal["sum", "ties"] = "sum",
    density: Density = 0.2,
    scale: float = 1.0,
    statistics: Statistics | None = None,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Keep of the multi-task vector the entries that at least so many tasks mark.

    m_n = 1[|τ_n| > threshold_n · |τ_MTL − τ_n|]; result: scale · 1[Σ m_n ≥ at_least] · τ_MTL.

    A single expert is its own multi-task vector: its one mark an entry is too few for the default
    `at_least` = 2, which recipes refuse; 1 keeps it whole. Otherwise `at_least` = 1 drops
    catastrophic entries alone.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        threshold: How far an expert has to outweigh the rest to mark an entry (λ in the paper;
            there chosen from 0.2 to 0.6 on validation data).
        at_least: Marks that keep an entry; with more than there are experts nothing is kept.
        multi_task: τ_MTL: the sum of the task vectors, or TIES with the sum of what agrees.
        density: Fraction of entries that TIES keeps of each expert, if asked for.
        scale: Multiplier on the result (α in the paper, chosen from 0 to 1 on validation data).
        statistics: Those of TIES, if asked for.
        site: Where the entries are.

    Returns:
        The merged task vector, fp32; entries without consensus are 0.
    """
    summed = multi_task == "sum"
    multi = None if summed else _ties(density).merge(task_vectors, statistics, site).flatten().cpu()
    thresholds = one_each(threshold, len(task_vectors))
    merged = torch.empty(task_vectors[0].numel())
    for start, rows in blocks(task_vectors):
        block = slice(start, start + len(rows[0]))
        # fp64: near a threshold, the order of experts must not decide.
        exact = [row.double() for row in rows]
        total = sum(exact[1:], exact[0]) if multi is None else multi[block].double()
        marks = torch.zeros(len(total), dtype=torch.int32)
        for vector, each in zip(exact, thresholds, strict=True):
            marks += vector.abs() > each * (total - vector).abs()
        merged[block] = scale * total * (marks >= at_least)
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)
