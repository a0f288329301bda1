"""KnOTS (Stoica et al. 2024): merge in the basis that the task vectors of a layer share.

The SVD of all task vectors side by side, [τ_1 … τ_N] = U Σ [V_1 … V_N]ᵀ, aligns them: what differs
is Σ V_nᵀ, and that is what an entry-wise rule merges, before U takes it back.

Departs from the original code: it appends a layer's bias to its weight as a column and sets
norms on a diagonal; here only the weights of linear layers are aligned, and the rule sees all
other tensors as they are (for norms that is the same). Σ V_nᵀ = Uᵀ τ_n, so that only U is ever
computed. Singular values that rounding may have brought about are dropped with the small ones.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._entries import Undecided
from personae.methods._merge import MatrixWise, MergeMethod, Side, as_function, stacked_memory
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._rules import passes_through
from personae.methods._site import Site
from personae.methods.merge.dare_ties import DARETIES
from personae.methods.merge.ties import TIES
from personae.ops.polar import sum_tolerance
from personae.ops.stacks import StackedSVD, stacked_svd

Cutoff = Annotated[float, Field(ge=0)]

RuleName = Literal["ties", "dare_ties"]


@merge_method(paper="arXiv:2410.19735")
class KnOTS(MatrixWise):
    """Align the task vectors of each layer by one SVD, merge their coordinates by TIES.

    Each pass of TIES over the model decomposes every layer again, as nothing keeps what it finds.
    With DARE's draws in place of trimming, the order of experts matters.
    """

    usual_passes: ClassVar = 2
    model_wide: ClassVar = ("rule", "density", "scope")

    rule: RuleName = Field(
        default="ties",
        description=(
            "Whether TIES keeps the largest coordinates, or random ones (DARE), rescaled."
        ),
    )
    density: Density = Field(
        default=0.2, description="Fraction of coordinates kept of each expert."
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description=(
            "Whether trimming is computed over the whole model (as in the paper) or over each "
            "tensor."
        ),
    )
    scale: float = Field(
        default=1.0,
        description="Multiplier on the result (the paper's code: 0.6 for eight CLIP adapters).",
    )
    singular_cutoff: Cutoff = Field(
        default=1e-5, description="Directions whose singular value is no larger are dropped."
    )
    seed: int = Field(default=0, description="Seed of the random masks of `dare_ties`.")

    def passes(self, experts: int) -> Passes:
        """The passes of the rule, each over coordinates computed anew."""

        def view(task_vectors: Tensor, own: Any, site: Site) -> tuple[Tensor, Site]:
            if site.kind != "linear":
                return task_vectors, site
            coordinates = _align(_horizontal(task_vectors, site), own.singular_cutoff).coordinates
            return coordinates, _place(coordinates, site)

        return (yield from passes_through(self._rule, experts, view))

    @property
    def _rule(self) -> MergeMethod:
        given: dict[str, Any]
        given = {"density": self.density, "scope": self.scope, "scale": self.scale}
        return TIES(**given) if self.rule == "ties" else DARETIES(**given, seed=self.seed)

    def equivariant(self, site: Site) -> Side:
        """Turning outputs turns U, and nothing else."""
        if site.kind != "linear":
            return "none"
        return "right" if site.transposed else "left"

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return stacked_memory(site, experts, stack=13, tall=37)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        if site.kind != "linear":
            return self._rule.merge(task_vectors, statistics, site)
        basis, _, coordinates, _ = _align(_horizontal(task_vectors, site), self.singular_cutoff)
        merged = basis @ self._rule.merge(coordinates, statistics, _place(coordinates, site))
        return merged.T if site.transposed else merged


knots = as_function(KnOTS)


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
