"""DARE-TIES (Yu et al. 2024): TIES with entries dropped at random in place of trimming.

Masks are those of `dare`; signs are elected and what agrees is merged as in `ties`. The published
figures are of two algorithms (D27). The DARE authors' code (MergeLM) runs all of TIES on what is
left, its trimming to 20 % included: `trim: 0.2`, as FusionBench's, gives those. In the DRM paper's
tables, as here by default, dropping takes the place of trimming. Below a density of 0.2 there is
nothing left to trim, and both are the same. mergekit does not average what agrees.
"""

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae._types import Density
from personae.methods._dropping import dropper
from personae.methods._electing import Electing
from personae.methods._entries import Fill, PerExpert, Seen, find_thresholds, trimmer
from personae.methods._merge import as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="arXiv:2311.03099")
class DARETIES(Electing):
    """Drop entries at random, elect one sign per entry, merge the entries that agree.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    order_free: ClassVar = False
    model_wide: ClassVar = ("scope", "trim")

    density: Density | tuple[Density, ...] = Field(
        default=0.2,
        description=(
            "Probability that an entry is kept (1 - p of the paper), to the nearest 1/65536."
        ),
    )
    rescale: bool = Field(
        default=True,
        description=(
            "Whether kept entries are divided by the density, so that their expectation is τ_n."
        ),
    )
    trim: Density = Field(
        default=1.0,
        description=(
            "Fraction of all entries that trimming keeps of each expert after dropping: the "
            "largest. 1: no trimming; 0.2: the DARE authors' algorithm."
        ),
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description=(
            "Whether trimming and the majority sign are computed over the whole model or over "
            "each tensor."
        ),
    )
    seed: int = Field(default=0, description="Seed of the random masks: same seed, same model.")

    def find(self, experts: int) -> Passes:
        """Those for the thresholds of trimming, if there is any."""

        def kept(own: Any, site: Site) -> Seen:
            drop = own.dropper(site, experts, weight=1.0)

            def seen(start: int, deltas: Float[ndarray, "expert entry"]) -> ndarray:
                drop(start, deltas)
                return deltas

            return seen

        if self.trim == 1:
            return {}
        return {"thresholds": (yield from find_thresholds(self.trim, experts, kept))}

    def fill(self, site: Site, experts: int, statistics: Statistics) -> Fill:
        """Drops, and trims what is left where there are thresholds."""
        if "thresholds" not in statistics:
            return self.dropper(site, experts, self.weight)
        drop = self.dropper(site, experts, weight=1.0)
        trim = trimmer(statistics["thresholds"], self.weight)

        def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
            drop(start, deltas)
            trim(start, deltas)

        return fill

    def dropper(self, site: Site, experts: int, weight: PerExpert) -> Fill:
        """Drops at random, as in `dare`."""
        return dropper(
            site,
            density=self.density,
            weight=weight,
            rescale=self.rescale,
            seed=self.seed,
            experts=experts,
        )


dare_ties = as_function(DARETIES)
