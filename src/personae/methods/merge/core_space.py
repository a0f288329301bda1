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
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._entries import Undecided
from personae.methods._merge import MatrixWise, MergeMethod, as_function, matrix_memory
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.iso_c import IsoC, flat_value
from personae.methods.merge.task_arithmetic import TaskArithmetic
from personae.methods.merge.ties import TIES
from personae.methods.merge.tsv_m import TSVM
from personae.ops.bases import joint_basis
from personae.ops.polar import polar_factor, sum_tolerance

RuleName = Literal["task_arithmetic", "ties", "tsv_m", "iso_c"]


@merge_method(paper="arXiv:2509.17786")
class CoreSpace(MatrixWise):
    """Merge the small cores of LoRA adapters by another method's rule.

    Returns:
        The merged task vector, fp32, of the size of those given.
    """

    side: ClassVar = "both"
    needs: ClassVar = "adapters"

    rule: RuleName = Field(
        default="tsv_m",
        description="The sum of the cores, or another method's rule for one tensor.",
    )
    isotropic: bool = Field(
        default=False,
        description=(
            "Gives all singular directions of the merged core one value, their mean (Iso, as in "
            "the original code: TSV + Iso is the rule `tsv_m`, TA + Iso is `iso_c`)."
        ),
    )
    density: Density = Field(
        default=0.2,
        description=(
            "With `rule: ties`: fraction of entries kept of each expert's core, for each tensor "
            "separately (as in the original code)."
        ),
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")

    def entrywise(self, site: Site) -> bool:
        """Vectors of adapters that train biases; TIES has a threshold for each tensor."""
        return len(site.shape) != 2 and self.rule != "ties"

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, stack=44, entry=24)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        rule = _rule(self.rule, self.density, self.scale)
        if task_vectors.ndim != 3:
            return rule.apply(task_vectors, None, site)
        if site.cores:
            return _merge_cores(task_vectors, rule, self.isotropic, site)
        left, right = _basis(task_vectors), _basis(task_vectors.mT)
        cores = left.T @ task_vectors @ right
        return left @ _merge_cores(cores, rule, self.isotropic, site) @ right.T


core_space = as_function(CoreSpace)


def _merge_cores(
    cores: Float[Tensor, "expert rows columns"], rule: MergeMethod, isotropic: bool, site: Site
) -> Float[Tensor, "rows columns"]:
    inner = replace(site, shape=tuple(cores.shape[1:]))
    merged = rule.apply(cores, None, inner)
    if not isotropic:
        return merged
    factor, values = polar_factor(merged, sum_tolerance(merged[None]))
    return (factor * flat_value(values, min(merged.shape), "side")).float()


def _rule(name: RuleName, density: float, scale: float) -> MergeMethod:
    if name == "ties":
        return TIES(density=density, scope="tensor", scale=scale)
    return {"task_arithmetic": TaskArithmetic, "tsv_m": TSVM, "iso_c": IsoC}[name](scale=scale)


def _basis(matrices: Float[Tensor, "expert out _"]) -> Float[Tensor, "out rank"]:
    """What their columns span, without what rounding has added."""
    basis, values = joint_basis(list(matrices))
    return basis[:, values > sum_tolerance(matrices)].float()
