"""Iso-CTS (Marczak et al. 2025): common directions of all tasks, some of each task, one value.

Departs from the paper where that leaves the choice to rounding, as Iso-C does: directions that the
sum, or what it leaves of a task, has not got are not filled with arbitrary ones. Merging adapters,
the sum often spans all that the tasks have; then nothing is left for single tasks, and the result
is that of Iso-C.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function, matrix_memory
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.iso_c import AverageOver, flat_value
from personae.ops.bases import joint_basis
from personae.ops.polar import WHITENING_TOLERANCE, polar_factor, sum_tolerance
from personae.ops.svd import exact_svd

Fraction = Annotated[float, Field(ge=0, le=1)]


@merge_method(paper="arXiv:2502.04959")
class IsoCTS(MatrixWise):
    """Give common and task-specific directions one singular value; average other tensors.

    Of min(m, d) directions, the k leading ones of the sum are the common space. Each expert adds
    the (min(m, d) − k) / N leading ones of what the common space leaves of it, τ_n − U_k U_kᵀ τ_n.
    Both sides' vectors are made orthonormal (polar factors); all get the mean of the values.
    k = common_fraction · min(m, d), moved to the nearest number that leaves a multiple of N.

    On difference vectors, whose sum is 0, there would be no common space: a base is needed.
    """

    rows: ClassVar = (0, 20)
    side: ClassVar = "both"
    needs: ClassVar = "base"

    common_fraction: Fraction = Field(
        default=0.8, description="Share of the directions that is common."
    )
    tensors: Tensors = Field(
        default="matrices",
        description="Which tensors are merged this way; the others are averaged.",
    )
    average_over: AverageOver = Field(
        default="side",
        description=(
            "Whether the mean of the values is over min(m, d), as published, or over the "
            "directions found, if these are fewer."
        ),
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Multiplier on the result, averages included (α in the paper, tuned up to 3)."
        ),
    )

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, entry=60, square=48)

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
        common, specific = shares(min(site.shape), len(task_vectors), self.common_fraction)
        tolerance = sum_tolerance(task_vectors)
        total = task_vectors.sum(dim=0, dtype=torch.float64)
        basis, values = joint_basis([total])
        common = min(common, int((values > tolerance).sum()))
        basis, values = basis[:, :common], values[:common]
        lefts, sizes, rights = [basis], [values], [(basis.T @ total) / values[:, None]]
        for matrix in task_vectors:
            image = basis.T @ matrix.double()
            u, singular_values, vh = exact_svd(matrix.double().sub_(basis @ image), specific)
            found = singular_values > tolerance
            lefts.append(u[:, found])
            sizes.append(singular_values[found])
            rights.append(vh[found])
        left, _ = polar_factor(torch.cat(lefts, dim=1), WHITENING_TOLERANCE)
        right, _ = polar_factor(torch.cat(rights), WHITENING_TOLERANCE)
        value = flat_value(torch.cat(sizes), min(site.shape), self.average_over)
        return ((left @ right) * (self.scale * value)).float()


iso_cts = as_function(IsoCTS)


def shares(directions: int, experts: int, common_fraction: float) -> tuple[int, int]:
    """Directions of the common space, and of each expert: together all there are."""
    rest = directions - int(common_fraction * directions + 1e-9)
    each = min(round(rest / experts), directions // experts)
    return directions - each * experts, each
