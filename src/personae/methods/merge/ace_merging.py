"""ACE-Merging (Xu et al. 2026): RegMean with input covariances that task vectors tell.

Rows of a task vector lie where the task's inputs do; so their covariance stands for that of the
inputs, and the merged matrix has a closed form. This is the authors' code (unravel-xu/ACE-Merging,
22d9dfe), with its odd corners: the task vectors lose the mean of their rows, what is added to the
sum of covariances is a row and not a matrix, and scales are compared by the spread of log traces.

Departs from it in leaving out experts that did not change a matrix, which the code gives a
covariance larger than all others; it is computed in fp64.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor

from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.svd import exact_svd

_TINY = 1e-12
Positive = Annotated[float, Field(gt=0)]


@merge_method(paper="arXiv:2603.02945")
class ACEMerging(MatrixWise):
    """Merge matrices by estimated covariances of their inputs; average other tensors.

    With τ̄_n the task vector less the mean of its rows and Σ_n = τ̄_nᵀ τ̄_n + ε I, the result is
    (Σ_n τ̄_n Σ_n) (Σ_n Σ_n + 1 cᵀ)⁻¹, c the mean row of Σ_n τ̄_nᵀ τ̄_n. Where the experts' norms
    are uneven, each Σ_n is divided by its trace, c by the mean trace, and the leading directions of
    what is left are added with one value.
    """

    rows: ClassVar = (0, 20)

    epsilon: Positive = Field(default=1e-2, description="ε, added to the covariances' diagonals.")
    threshold: Annotated[float, Field(ge=0)] = Field(
        default=0.3,
        description="Var(log ‖τ_n‖²) / mean(log ‖τ_n‖²)² beyond which norms are uneven.",
    )
    rank_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.3, description="Where norms are uneven: share of the directions that is added."
    )
    tensors: Tensors = Field(
        default="matrices",
        description="Which tensors are merged this way; the others are averaged.",
    )
    scale: float = Field(default=1.0, description="Multiplier on the result, averages included.")

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        out, into = reversed(site.shape) if site.transposed else site.shape
        return (
            8 * experts * out * into + 40 * out * into + 40 * into * into + 50 * min(out, into) ** 2
        )

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        if not is_matrix(self.tensors, site):
            return self.scale * mean(task_vectors)
        matrices = task_vectors.mT if site.transposed else task_vectors
        matrices = matrices[matrices.flatten(1).any(dim=1)].double()
        if not len(matrices):
            return torch.zeros_like(task_vectors[0])
        merged = self._merge(matrices).mul_(self.scale).float()
        return merged.T if site.transposed else merged

    def _merge(self, matrices: Float64[Tensor, "expert out in"]) -> Float64[Tensor, "out in"]:
        experts, out, into = matrices.shape
        traces = matrices.square().sum(dim=(1, 2))
        uneven = experts > 1 and float(_spread(traces)) > self.threshold
        covariance = matrices.new_zeros(into, into)
        weighted, ridge = matrices.new_zeros(out, into), 0.0
        raw = list[Tensor]()
        for matrix in matrices:
            centred = matrix - matrix.mean(dim=0)
            own = centred.T @ centred
            trace = float(own.trace()) + _TINY if uneven else 1.0
            own /= trace
            weighted += centred @ own + (self.epsilon / trace) * centred
            ridge += self.epsilon / trace
            covariance += own
            raw.append(own)
        row = covariance.mean(dim=0) / (float(traces.mean()) + _TINY if uneven else 1.0)
        covariance.diagonal().add_(ridge)
        merged = torch.linalg.solve(covariance + row, weighted, left=False)
        if uneven:
            merged += self._rest(matrices, raw, covariance / experts, merged)
        return merged

    def _rest(self, matrices: Tensor, raw: list[Tensor], average: Tensor, merged: Tensor) -> Tensor:
        """The leading directions of merged and residuals together, all with their mean value."""
        total = merged.clone()
        for matrix, own in zip(matrices, raw, strict=True):
            total += matrix @ (own - average)
        count = int(self.rank_fraction * min(total.shape) + 1e-9)
        if not count:
            return torch.zeros_like(total)
        u, values, vh = exact_svd(total, count)
        return u @ vh * (values.sum() / count)


ace_merging = as_function(ACEMerging)


def _spread(traces: Float64[Tensor, " expert"]) -> Tensor:
    logs = (traces + _TINY).log()
    return logs.var() / (logs.mean().square() + _TINY)
