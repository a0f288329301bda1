"""`ties` of mergekit 0.1.5: trimmed tensor by tensor, averaged by weight.

As many entries are kept as there. Of those that tie with the last one, the first in order are,
where there an unstable sort picks.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._entries import Undecided, find_thresholds
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Pass, Passes, Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.mergekit._consensus import consensus, l1_share, rescaled
from personae.methods.mergekit._cuts import find_cuts, trimmer


@merge_method(paper="arXiv:2306.01708", conventions="mergekit")
class TIES(RowWise):
    """Trim each tensor, weight it, elect the sign of the sum, average by weight what agrees."""

    default_scope: ClassVar = "tensor"
    usual_passes: ClassVar = 3

    weight: float | tuple[float, ...] = Field(
        description="Coefficient of each expert, applied before signs are elected."
    )
    density: Density | tuple[Density, ...] = Field(
        default=1.0, description="Fraction of entries kept of each tensor."
    )
    normalize: bool = Field(
        default=True, description="Whether to divide by the sum of the weights that agree."
    )
    rescale: bool = Field(
        default=False, description="Whether trimming restores each tensor's L1 norm."
    )
    lambda_: float = Field(
        default=1.0,
        alias="lambda",
        description="Multiplier on the result.",
    )

    def passes(self, experts: int) -> Passes:
        """Those for each expert's threshold and ties, and for the norms if they are restored."""
        thresholds = yield from find_thresholds(self.density, experts)
        cuts = yield from find_cuts(self.density, thresholds, experts)
        found = {"thresholds": thresholds, "cuts": cuts}
        if self.rescale:

            def norms(vectors: Tensor | DeltaBlocks, _: Any, site: Site) -> Tensor:
                return l1_share(
                    delta_blocks(vectors), trimmer(thresholds, cuts, (1.0,) * experts, site)
                )

            found["norms"] = yield Pass("norms", norms)
        return found

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        experts = blocks.experts
        weights, densities = one_each(self.weight, experts), one_each(self.density, experts)
        factors = rescaled(weights, densities, statistics.get("norms"))
        fill = trimmer(statistics["thresholds"], statistics["cuts"], factors, site)
        return consensus(blocks, fill, weights, normalize=self.normalize, scale=self.lambda_)


ties = as_function(TIES)
