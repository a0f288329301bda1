"""Core Space (Panariello et al. 2025): merge LoRA adapters as small matrices, in bases they share.

With τ_n = B_n A_n, let U be the left singular vectors of [B_1 … B_N] and V the right ones of the
A_n on top of each other. The cores Uᵀ B_n A_n V, of Σ ranks rows and columns (of no more than the
tensor has), hold all there is: any rule merges them, and U and V take the result back. Rules that
do not depend on the basis give what they give on the task vectors, for much less work; TIES, an
entry at a time, does not.

Departs from the original code where that leaves the choice to rounding: directions that a merged
core has not got are not filled with arbitrary ones when its spectrum is made flat. Where factors
are not at hand (of fused experts), the bases are those of the task vectors themselves.
"""

from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._matrices import from_both_sides
from personae.methods._registry import merge_method
from personae.methods._rules import Rule
from personae.methods._site import Site
from personae.methods.merge.iso_c import flat_value
from personae.ops.bases import joint_basis
from personae.ops.polar import polar_factor, sum_tolerance

RuleName = Literal["task_arithmetic", "ties", "tsv_m", "iso_c"]


def _entrywise(parameters: Any, site: Site) -> bool:
    """Vectors of adapters that train biases; TIES has a threshold for each tensor."""
    return len(site.shape) != 2 and parameters.rule != "ties"


@merge_method(
    paper="arXiv:2509.17786",
    order_free=True,
    entrywise=_entrywise,
    equivariant=from_both_sides,
    needs="adapters",
    bytes_per_entry=48,
)
def core_space(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    rule: RuleName = "tsv_m",
    isotropic: bool = False,
    density: Density = 0.2,
    scale: float = 1.0,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Merge the cores of LoRA adapters by a rule; what is no matrix by the rule as it is.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order, fp32; of matrices the
            cores, as `MergeMethod.in_bases` makes them, or the task vectors as they are.
        rule: The sum of the cores, or another method's rule for one tensor.
        isotropic: Gives all singular directions of the merged core one value, their mean (Iso, as
            in the original code: TSV + Iso is the rule `tsv_m`, TA + Iso is `iso_c`).
        density: Fraction of the entries of a core that TIES keeps of each expert, each tensor
            apart (as in the original code).
        scale: Multiplier on the result.
        site: Which tensor, and whether it is given as cores.

    Returns:
        The merged task vector, fp32, of the size of those given.
    """
    if task_vectors.ndim != 3:
        return _merge(task_vectors, rule, density, scale, site)
    if site.cores:
        return _merge_cores(task_vectors, rule, isotropic, density, scale, site)
    left, right = _basis(task_vectors), _basis(task_vectors.mT)
    cores = left.T @ task_vectors @ right
    return left @ _merge_cores(cores, rule, isotropic, density, scale, site) @ right.T


def _merge_cores(
    cores: Float[Tensor, "expert rows columns"],
    rule: RuleName,
    isotropic: bool,
    density: float,
    scale: float,
    site: Site,
) -> Float[Tensor, "rows columns"]:
    merged = _merge(cores, rule, density, scale, replace(site, shape=tuple(cores.shape[1:])))
    if not isotropic:
        return merged
    factor, values = polar_factor(merged, sum_tolerance(merged[None]))
    return (factor * flat_value(values, min(merged.shape), "side")).float()


def _merge(seen: Tensor, rule: RuleName, density: float, scale: float, site: Site) -> Tensor:
    own = {"density": density, "scope": "tensor"} if rule == "ties" else {}
    return Rule(rule, scale=scale, **own).merge(seen, None, site)


def _basis(matrices: Float[Tensor, "expert out _"]) -> Float[Tensor, "out rank"]:
    """What their columns span, without what rounding has added."""
    basis, values = joint_basis(list(matrices))
    return basis[:, values > sum_tolerance(matrices)].float()
