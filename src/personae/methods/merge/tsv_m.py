"""TSV-Merge (Gargiulo et al. 2024): the leading singular vectors of each task, made orthogonal.

Every expert is given an equal share of a matrix's directions; those of all experts are moved as
little as possible to be orthonormal (whitening), so that tasks no longer overlap.

Departs from the original code where that leaves the choice to rounding. Directions that experts
share are whitened within the span they have, as copies of one expert should, and never completed
by arbitrary ones. Directions beneath the numerical rank of an expert are not taken. A matrix with
fewer rows or columns than there are experts has no direction for each: it is averaged, where the
code would leave it at the base. Computed in fp64, since whitening magnifies an error by up to the
number of directions.
"""

from typing import ClassVar

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
from personae.ops.polar import WHITENING_TOLERANCE, polar_factor
from personae.ops.svd import exact_svd


@merge_method(paper="arXiv:2412.00081")
class TSVM(MatrixWise):
    """Merge the whitened leading singular vectors of all experts; average other tensors.

    Of each task vector U Σ Vᵀ the k = ⌊min(m, d) / N⌋ leading triplets are taken. With those of
    all experts side by side, Ũ = [U_1 … U_N] and Ṽ alike, the result is scale · U⊥ Σ̃ V⊥ᵀ, where
    U⊥ and V⊥ are the polar factors of Ũ and Ṽ.
    """

    rows: ClassVar = (0, 20)
    side: ClassVar = "both"

    tensors: Tensors = Field(
        default="matrices",
        description="Which tensors are merged this way; the others are averaged.",
    )
    scale: float = Field(
        default=1.0, description="Multiplier on the result, averages included (α in the paper)."
    )

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, entry=45, square=50)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        rank = min(site.shape, default=0) // len(task_vectors)
        if rank == 0 or not is_matrix(self.tensors, site):
            return self.scale * mean(task_vectors)
        parts = [exact_svd(matrix, rank) for matrix in task_vectors]
        left, _ = polar_factor(torch.cat([u for u, _, _ in parts], dim=1), WHITENING_TOLERANCE)
        right, _ = polar_factor(torch.cat([vh for _, _, vh in parts]), WHITENING_TOLERANCE)
        values = torch.cat([singular_values for _, singular_values, _ in parts])
        return ((left * (self.scale * values)) @ right).float()


tsv_m = as_function(TSVM)
