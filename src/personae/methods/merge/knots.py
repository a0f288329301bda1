"""KnOTS (Stoica et al. 2024): merge in the basis that the task vectors of a layer share.

The SVD of all task vectors side by side, [τ_1 … τ_N] = U Σ [V_1 … V_N]ᵀ, aligns them: what differs
is Σ V_nᵀ, and that is what an entry-wise rule merges, before U takes it back.

Departs from the original code: it appends a layer's bias to its weight as a column and sets
norms on a diagonal; here only the weights of linear layers are aligned, and the rule sees all
other tensors as they are (for norms that is the same). Σ V_nᵀ = Uᵀ τ_n, so that only U is ever
computed. Singular values that rounding may have brought about are dropped with the small ones.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._merge import Gathering, Side, Statistics
from personae.methods._registry import merge_method, not_linear
from personae.methods._rules import Rule
from personae.methods._site import Site
from personae.ops.polar import sum_tolerance
from personae.ops.stacks import StackedSVD, stacked_svd

Cutoff = Annotated[float, Field(ge=0)]

RuleName = Literal["ties", "dare_ties"]


def _gather(parameters: Any, experts: int) -> Gathering:
    """The looks of the rule, each at coordinates computed anew."""

    def view(task_vectors: Tensor, own: Any, site: Site) -> tuple[Tensor, Site]:
        if not_linear(own, site):
            return task_vectors, site
        coordinates = _align(_horizontal(task_vectors, site), own.singular_cutoff).coordinates
        return coordinates, _place(coordinates, site)

    own = parameters
    rule = _rule(own.rule, own.density, own.scope, own.scale, own.seed)
    return (yield from rule.gather(experts, view))


def _rule(name: RuleName, density: float, scope: str, scale: float, seed: int) -> Rule:
    draws = {"seed": seed} if name == "dare_ties" else {}
    return Rule(name, density=density, scope=scope, scale=scale, **draws)


def _side(_: Any, site: Site) -> Side:
    """Turning outputs turns U, and nothing else."""
    if not_linear(None, site):
        return "none"
    return "right" if site.transposed else "left"


@merge_method(
    paper="arXiv:2410.19735",
    order_free=True,
    entrywise=not_linear,
    gather=_gather,
    equivariant=_side,
    looks=2,
    model_wide=("rule", "density", "scope"),
    bytes_per_entry=48,
)
def knots(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    rule: RuleName = "ties",
    density: Density = 0.2,
    scope: Literal["model", "tensor"] = "model",
    scale: float = 1.0,
    singular_cutoff: Cutoff = 1e-5,
    seed: int = 0,
    statistics: Statistics | None = None,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Align the task vectors of each layer by one SVD, merge their coordinates by TIES.

    Each of TIES' looks at the model decomposes every layer again, as nothing keeps what it finds.
    With DARE's draws in place of trimming, the order of experts matters.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        rule: Whether TIES keeps the largest coordinates, or random ones (DARE), rescaled.
        density: Fraction of coordinates kept of each expert.
        scope: Whether an expert is trimmed over the whole model (as in the paper) or over each
            tensor apart.
        scale: Multiplier on the result (the paper's code: 0.6 for eight CLIP adapters).
        singular_cutoff: Directions whose singular value is no larger are dropped.
        seed: Of DARE's draws.
        statistics: Those of the rule, of the coordinates.
        site: Which tensor.

    Returns:
        The merged task vector, fp32.
    """
    merging = _rule(rule, density, scope, scale, seed)
    if not_linear(None, site):
        return merging.merge(task_vectors, statistics, site)
    basis, _, coordinates, _ = _align(_horizontal(task_vectors, site), singular_cutoff)
    merged = basis @ merging.merge(coordinates, statistics, _place(coordinates, site))
    return merged.T if site.transposed else merged


def _horizontal(
    task_vectors: Float[Tensor, "expert rows columns"], site: Site
) -> Float[Tensor, "expert out in"]:
    return task_vectors.mT if site.transposed else task_vectors


def _place(coordinates: Float[Tensor, "expert rank in"], site: Site) -> Site:
    return replace(site, shape=tuple(coordinates.shape[1:]), transposed=False)


def _align(matrices: Float[Tensor, "expert out in"], cutoff: float) -> StackedSVD:
    """The joint decomposition, of it what is above the cutoff and above rounding."""
    found = stacked_svd(matrices)
    return found.cut(int((found.values > max(cutoff, sum_tolerance(matrices))).sum()))
