"""Magnitude pruning: keep the largest entries of each task vector, add up the rest.

PEFT's `magnitude_prune` for adapters, on task vectors. It keeps exactly so many entries of each
tensor, and none where their number rounds to 0; here one is kept at least, and entries that tie
with the last one kept are kept too, as a stream has no first.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae._types import Density
from personae.methods._deltas import DeltaBlocks
from personae.methods._dropping import dropped_sums
from personae.methods._entries import Undecided, find_thresholds, trimmer
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="https://github.com/huggingface/peft")
class MagnitudePrune(RowWise):
    """Keep the largest entries of each task vector, add them up: scale · Σ w_n m_n τ_n."""

    counts_experts: ClassVar = False
    usual_passes: ClassVar = 1
    model_wide: ClassVar = ("density", "scope")

    density: Density | tuple[Density, ...] = Field(
        default=0.2, description="Fraction of entries kept of each expert."
    )
    scope: Literal["model", "tensor"] = Field(
        default="tensor",
        description=(
            "Whether the fraction is of each tensor (as in PEFT) or of the whole model, where "
            "tensors that changed more keep more."
        ),
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert; not divided by their sum."
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")

    def working(self, experts: int) -> int:
        """The sum; what is small is dropped in place."""
        return 4

    def passes(self, experts: int) -> Passes:
        """Those that find each expert's threshold."""
        return {"thresholds": (yield from find_thresholds(self.density, experts))}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return dropped_sums(blocks, trimmer(statistics["thresholds"], self.weight), self.scale)


magnitude_prune = as_function(MagnitudePrune)
