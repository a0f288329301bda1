"""DARE-TIES (Yu et al. 2024): TIES with entries dropped at random in place of trimming.

Masks are those of `dare`; signs are elected and what agrees is merged as in `ties`. The published
figures are of two algorithms (D27). The DARE authors' code (MergeLM) runs all of TIES on what is
left, its trimming to 20 % included: `trim: 0.2`, as FusionBench's, gives those. In the DRM paper's
tables, as here by default, dropping takes the place of trimming. Below a density of 0.2 there is
nothing left to trim, and both are the same. mergekit does not average what agrees.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._dropping import dropper
from personae.methods._entries import (
    Fill,
    PerExpert,
    find_thresholds,
    merge_elected,
    trimmer,
    votes,
)
from personae.methods._merge import Gathering, Measure, RowWise, Statistics, as_function
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided


@merge_method(paper="arXiv:2311.03099")
class DARETIES(RowWise):
    """Drop entries at random, elect one sign per entry, merge the entries that agree.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    can_decide_late: ClassVar = True
    order_free: ClassVar = False
    model_wide: ClassVar = ("scope", "trim")

    density: Density | tuple[Density, ...] = Field(
        default=0.2,
        description=(
            "Probability that an entry is kept (1 - p of the paper), to the nearest 1/65536."
        ),
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "Coefficient of each expert's kept entries, before signs are elected, as in `ties`."
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
    reduce: Literal["mean", "sum", "max"] = Field(
        default="mean", description="Mean, sum or largest magnitude of the entries that agree."
    )
    elect: Literal["mass", "count"] = Field(
        default="mass", description="Whether experts vote with their magnitudes or one vote each."
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")
    seed: int = Field(default=0, description="Seed of the random masks: same seed, same model.")

    def is_late(self) -> bool:
        """With magnitudes votes seldom cancel; with one vote each they often do."""
        return self.elect == "mass"

    def gather(self, experts: int) -> Gathering:
        """Looks for the thresholds of trimming, if there is any, and one for the majority sign."""

        def kept(own: Any, site: Site) -> Fill:
            return own.dropper(site, experts, weight=1.0)

        found: dict[str, Tensor] = {}
        if self.trim < 1:
            found["thresholds"] = yield from find_thresholds(self.trim, experts, kept)

        def vote(vectors: Tensor | DeltaBlocks, own: Any, site: Site) -> Tensor:
            fill = own.fill(site, experts, found.get("thresholds"))
            return votes(delta_blocks(vectors), fill, own.elect)

        # A single expert is never outvoted.
        majority = (yield Measure("majority", vote, late=True)) if experts > 1 else torch.tensor(0)
        return found if majority is None else {**found, "majority": majority.sign()}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return merge_elected(
            blocks,
            self.fill(site, blocks.experts, statistics.get("thresholds")),
            elect=self.elect,
            reduce=self.reduce,
            scale=self.scale,
            statistics=statistics,
            undecided=undecided,
        )

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

    def fill(self, site: Site, experts: int, thresholds: Float[Tensor, " expert"] | None) -> Fill:
        """Drops, and trims what is left where there are thresholds."""
        if thresholds is None:
            return self.dropper(site, experts, self.weight)
        drop = self.dropper(site, experts, weight=1.0)
        trim = trimmer(thresholds, self.weight)

        def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
            drop(start, deltas)
            trim(start, deltas)

        return fill


dare_ties = as_function(DARETIES)
