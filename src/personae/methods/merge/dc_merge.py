"""DC-Merge (Zhang et al. 2026): merge in a space that the leading directions of all tasks cover.

Every expert is given an equal share of a matrix's directions, as in TSV-M; those of all experts,
made orthonormal, are the axes of the cover space. There the task vectors are matrices of which few
entries matter: the largest are kept, signs are elected, and what couples the axes of two experts is
left out.

The fraction of entries kept is that of the authors' code, 0.001; the text can be read as 0.1. Their
code for fully fine-tuned models does not smooth; that for adapters does, at rank 16.

Departs from the code where that leaves the choice to rounding, as TSV-M does: directions that
experts share are made orthonormal within the span they have, and directions beneath the numerical
rank of an expert are not taken. Of a matrix with fewer rows or columns than experts, the average.
"""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Density
from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function, matrix_memory
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.polar import WHITENING_TOLERANCE, polar_factor
from personae.ops.select import kept_count
from personae.ops.svd import exact_svd

Smoothing = Literal["none", "average", "linear"]


@merge_method(paper="arXiv:2603.06242")
class DCMerge(MatrixWise):
    """Elect signs among the largest coordinates of the tasks in a space they share; average others.

    Of each τ_n = U Σ Vᵀ the k leading triplets are taken. With U⊥ and V⊥ the polar factors of
    [U_1 … U_N] and [V_1 … V_N], M_n = U⊥ᵀ U_n Σ_n V_nᵀ V⊥; of each the largest entries are kept.
    M is the mean of those that have the sign of their sum, within the blocks of one expert's axes,
    and the result scale · U⊥ M V⊥ᵀ.
    """

    rows: ClassVar = (0, 20)
    side: ClassVar = "both"

    density: Density = Field(
        default=1e-3, description="Fraction of entries kept of each M_n; one at least."
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description=(
            "k, no more than ⌊min(m, d) / N⌋, which it is if not given. The authors' code takes "
            "16 for adapters."
        ),
    )
    smoothing: Smoothing = Field(
        default="none",
        description=(
            "`average`: an expert's k singular values become their mean; `linear`: they fall "
            "evenly, from `rho` times the last at most, and keep their sum."
        ),
    )
    rho: Annotated[float, Field(ge=1)] = Field(
        default=5.0, description="With `smoothing: linear`: largest ratio of first and last value."
    )
    tensors: Tensors = Field(
        default="matrices",
        description="Which tensors are merged this way; the others are averaged.",
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Multiplier on the result, averages included (found on validation data by the authors)."
        ),
    )

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, entry=45, square=8 * experts + 50)

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
        rank = min(rank, self.rank or rank)
        parts = [exact_svd(matrix, rank) for matrix in task_vectors]
        left, _ = polar_factor(torch.cat([u for u, _, _ in parts], dim=1), WHITENING_TOLERANCE)
        right, _ = polar_factor(torch.cat([vh for _, _, vh in parts]), WHITENING_TOLERANCE)
        merged = self._elect([self._coordinates(part, left, right) for part in parts])
        owner = torch.cat(
            [torch.full((len(values),), n) for n, (_, values, _) in enumerate(parts)]
        ).to(merged.device)
        merged *= owner[:, None] == owner
        return (left @ merged @ right).mul_(self.scale).float()

    def _coordinates(self, part: SVD, left: Tensor, right: Tensor) -> Tensor:
        """M_n, without its small entries."""
        u, values, vh = part
        if self.smoothing != "none" and len(values):
            ratio = 1.0 if self.smoothing == "average" else float(values[0] / values[-1])
            shares = torch.linspace(min(self.rho, ratio), 1.0, len(values)).to(values)
            values = values.sum() * shares / shares.sum()
        found = ((left.T @ u) * values) @ (vh @ right.T)
        magnitudes = found.abs()
        if not found.numel():
            return found
        least = magnitudes.flatten().topk(kept_count(found.numel(), self.density)).values[-1]
        return found.where(magnitudes >= least, 0.0)

    @staticmethod
    def _elect(coordinates: list[Tensor]) -> Tensor:
        """The mean of the entries that have the sign of their sum."""
        sign = sum(coordinates[1:], coordinates[0]).sign()
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for one in coordinates:
            agrees = (one.sign() == sign) & (sign != 0)
            total += one * agrees
            count += agrees
        return total.div_(count.clamp_(min=1))


dc_merge = as_function(DCMerge)
