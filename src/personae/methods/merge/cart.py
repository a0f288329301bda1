"""CART (Choi et al. 2024): the average, plus what sets each expert apart from it, at low rank.

The average takes the place of the base, so that difference vectors and task vectors give the same
model. Defaults are those of the authors' code (JH-GEECS/CART, D28), tuned by them on CLIP ViT-B/32:
attention and MLP weights alone, with rank and λ of the nearest of their three numbers of tasks.
"""

from math import prod
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import RankFraction
from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.svd import exact_svd

_TUNED = ((0.12, 2.0), (0.16, 1.5), (0.32, 1.9))
"""(rank_fraction, scale) that the authors chose for 8, 14 and 20 tasks."""
_MOST_TASKS = (11, 17)


@merge_method(paper="arXiv:2412.12153")
class CART(MatrixWise):
    """Add low-rank deviations from the mean to the mean; average other tensors.

    τ̄ + scale · Σ_n SVD_k(τ_n − τ̄), k = max(1, ⌊rank_fraction · min(m, d)⌋). The
    deviations themselves sum to 0: at full rank, or of two experts, whose deviations are opposite,
    this is weight averaging.

    Returns:
        The merged vector, fp32, relative to what the input is relative to.
    """

    rows: ClassVar = (0, 20)
    side: ClassVar = "both"

    rank_fraction: RankFraction | None = Field(
        default=None,
        description=(
            "Singular directions kept of each deviation (the paper: 0.04 to 0.32). If not given: "
            "0.12 for up to 11 tasks, 0.16 for up to 17, else 0.32."
        ),
    )
    tensors: Tensors = Field(
        default="linear", description="Which tensors are merged this way; the others are averaged."
    )
    scale: float | None = Field(
        default=None,
        description=(
            "Multiplier on the deviations (λ in the paper). If not given: 2.0, 1.5 or 1.9, as "
            "the authors chose for these ranks."
        ),
    )

    def memory(self, site: Site, experts: int) -> int:
        """Of one exact decomposition, in fp64, beside mean, sum and deviation; and its factors."""
        fraction = _TUNED[-1][0] if self.rank_fraction is None else self.rank_fraction
        entries = prod(site.shape)
        return int((24 + 24 * fraction) * entries) + 40 * min(site.shape) ** 2

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        merged = mean(task_vectors)
        if not is_matrix(self.tensors, site):
            return merged
        fraction, strength = _TUNED[sum(len(task_vectors) > most for most in _MOST_TASKS)]
        fraction = fraction if self.rank_fraction is None else self.rank_fraction
        strength = strength if self.scale is None else self.scale
        rank = max(1, int(fraction * min(site.shape) + 1e-9))
        center = merged.clone()
        for matrix in task_vectors:
            u, singular_values, vh = exact_svd(matrix - center, rank)
            merged.add_(((u * singular_values) @ vh).float(), alpha=strength)
        return merged


cart = as_function(CART)
