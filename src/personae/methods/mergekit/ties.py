"""`ties` of mergekit 0.1.5: trimmed tensor by tensor, averaged by weight.

As many entries are kept as there. Of those that tie with the last one, the first in order are,
where there an unstable sort picks.
"""

from typing import ClassVar

from pydantic import Field

from personae.methods._entries import Fill, find_thresholds
from personae.methods._merge import as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.mergekit._cuts import find_cuts, trimmer
from personae.methods.mergekit._sparsified import Sparsified


@merge_method(paper="arXiv:2306.01708", conventions="mergekit")
class TIES(Sparsified):
    """Trim each tensor, weight it, elect the sign of the sum, average by weight what agrees."""

    usual_passes: ClassVar = 3

    normalize: bool = Field(
        default=True, description="Whether to divide by the sum of the weights that agree."
    )

    def find(self, experts: int) -> Passes:
        """Those for each expert's threshold and ties."""
        thresholds = yield from find_thresholds(self.density, experts, scope=self.passes_over)
        cuts = yield from find_cuts(self.density, thresholds, experts)
        return {"thresholds": thresholds, "cuts": cuts}

    def fill(self, site: Site, statistics: Statistics, weights: tuple[float, ...]) -> Fill:
        """Trims."""
        return trimmer(statistics["thresholds"], statistics["cuts"], weights, site)


ties = as_function(TIES)
