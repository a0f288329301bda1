"""Model Breadcrumbs (Davari & Belilovsky 2024) in the place of TIES's trimming.

Entries are dropped as in `breadcrumbs`; signs are elected and what agrees is merged as in `ties`.
No paper has it: mergekit does, where what agrees is added up (`reduce: sum`).
"""

from typing import ClassVar

from pydantic import Field

from personae._types import Density
from personae.methods._electing import Electing
from personae.methods._entries import Fill, between, find_bounds
from personae.methods._merge import as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.breadcrumbs import Share


@merge_method(paper="arXiv:2312.06795")
class BreadcrumbsTIES(Electing):
    """Drop the largest and the smallest entries, elect one sign per entry, merge what agrees.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    usual_passes: ClassVar = 2
    default_scope: ClassVar = "tensor"

    density: Density | tuple[Density, ...] = Field(
        default=0.15, description="Fraction of entries kept of each tensor (1 - β of the paper)."
    )
    gamma: Share | tuple[Share, ...] = Field(
        default=0.007,
        description=(
            "Fraction of entries, the largest, that are dropped (1 - γ of the paper); fewer where "
            "density needs them, none at density 1."
        ),
    )

    def find(self, experts: int) -> Passes:
        """Those for the smallest and the largest magnitude kept of each expert."""
        return (yield from find_bounds(self.density, self.gamma, experts))

    def fill(self, site: Site, experts: int, statistics: Statistics) -> Fill:
        """Keeps what lies between."""
        return between(statistics, self.weight)


breadcrumbs_ties = as_function(BreadcrumbsTIES)
