"""Core Space (Panariello et al. 2025): merge LoRA adapters as small matrices, in bases they share.

With τ_n = B_n A_n, let U be the left singular vectors of [B_1 … B_N] and V the right ones of the
A_n on top of each other. The cores Uᵀ B_n A_n V, of Σ ranks rows and columns, hold all there is:
any rule merges them, and U and V take the result back. Rules that do not depend on the basis give
what they give on the task vectors, for much less work; TIES, an entry at a time, does not.

Where the ranks add up to as many as a side has, or the factors are not at hand, the bases are
those of the task vectors themselves.
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
from personae.ops.bases import joint_basis
from personae.ops.polar import sum_tolerance

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
    density: Density = 0.2,
    scale: float = 1.0,
    site: Site,
) -> Float[Tensor, "*shape"]:
    """Merge the cores of LoRA adapters by a rule; what is no matrix by the rule as it is.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order, fp32: cores already, on
            sides on which they are smaller than the tensor.
        rule: The sum of the cores, or another method's rule for one tensor.
        density: Fraction of the entries of a core that TIES keeps of each expert, each tensor
            apart (as in the original code).
        scale: Multiplier on the result.
        site: Which tensor.

    Returns:
        The merged task vector, fp32, of the size of those given.
    """
    if task_vectors.ndim != 3:
        return _merge(task_vectors, rule, density, scale, site)
    left = right = None
    if task_vectors.shape[1] == site.shape[0]:
        left = _basis(task_vectors)
    if task_vectors.shape[2] == site.shape[1]:
        right = _basis(task_vectors.mT)
    cores = task_vectors if left is None else left.T @ task_vectors
    cores = cores if right is None else cores @ right
    merged = _merge(cores, rule, density, scale, replace(site, shape=tuple(cores.shape[1:])))
    merged = merged if left is None else left @ merged
    return merged if right is None else merged @ right.T


def _merge(seen: Tensor, rule: RuleName, density: float, scale: float, site: Site) -> Tensor:
    own = {"density": density, "scope": "tensor"} if rule == "ties" else {}
    return Rule(rule, scale=scale, **own).merge(seen, None, site)


def _basis(matrices: Float[Tensor, "expert out _"]) -> Float[Tensor, "out rank"]:
    """What their columns span, without what rounding has added."""
    basis, values = joint_basis(list(matrices))
    return basis[:, values > sum_tolerance(matrices)].float()
