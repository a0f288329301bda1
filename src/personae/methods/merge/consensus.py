"""Consensus Merging (Wang et al. 2024): keep the entries that several tasks would localise.

Each task marks what TALL-masks would keep of the sum of all task vectors for it; entries with too
few marks are dropped: no task needs them ("catastrophic"), or one alone does ("selfish").
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae import kernels
from personae._types import Density
from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Passes, Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._rules import passes_through
from personae.methods._site import Site
from personae.methods.merge.ties import TIES

Threshold = Annotated[float, Field(ge=0)]


@merge_method(paper="arXiv:2405.07813")
class Consensus(RowWise):
    """Keep the entries of the multi-task vector that several tasks mark.

    m_n = 1[|τ_n| > threshold_n · |τ_MTL − τ_n|]; result: scale · 1[Σ m_n ≥ at_least] · τ_MTL.

    A single expert is its own multi-task vector: its one mark an entry is too few for the default
    `at_least` = 2, which recipes refuse; 1 keeps it whole. Otherwise `at_least` = 1 drops
    catastrophic entries alone.

    Returns:
        The merged task vector, fp32; entries without consensus are 0.
    """

    counts_experts: ClassVar = False
    degenerates: ClassVar = "weight averaging: the multi-task vector is the sum, which is 0 there"
    model_wide: ClassVar = ("multi_task", "density")

    threshold: Threshold | tuple[Threshold, ...] = Field(
        default=0.4,
        description=(
            "An expert marks the entries where |τ_n| > threshold · |τ_MTL − τ_n| (λ in the "
            "paper, chosen from 0.2 to 0.6 on validation data)."
        ),
    )
    at_least: Annotated[int, Field(ge=1)] = Field(
        default=2,
        description="How many experts must mark an entry to keep it.",
    )
    multi_task: Literal["sum", "ties"] = Field(
        default="sum",
        description=("τ_MTL: the sum of the task vectors, or TIES with the sum of what agrees."),
    )
    density: Density = Field(
        default=0.2, description="With `multi_task: ties`: fraction of entries kept of each expert."
    )
    scale: float = Field(
        default=1.0,
        description=(
            "Multiplier on the result (α in the paper, chosen from 0 to 1 on validation data)."
        ),
    )

    def passes(self, experts: int) -> Passes:
        """Those of TIES, if the multi-task vector is that of TIES."""
        if self.multi_task == "sum":
            return {}
        return (yield from passes_through(self._ties, experts))

    @property
    def _ties(self) -> TIES:
        return TIES(density=self.density, reduce="sum")

    def check(self, experts: int, has_base: bool) -> str:
        """More marks than there are experts."""
        if self.at_least <= experts:
            return ""
        return (
            f"consensus: at_least is {self.at_least}, and there are {experts} expert(s), so that "
            f"no entry could be kept. Give at most {experts}."
        )

    def working(self, experts: int) -> int:
        """TIES works on a copy, a block of its own, beside the sum in fp64."""
        own = super().working(experts)
        return own if self.multi_task == "sum" else own + 8 * experts + 12

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        thresholds = np.asarray(one_each(self.threshold, blocks.experts), np.float64)
        for start, deltas in blocks:
            total = np.empty(deltas.shape[1], np.float64)
            if self.multi_task == "ties":
                copy = [torch.from_numpy(row.copy()) for row in deltas]
                place = replace(site, start=site.start + start)
                (merged,) = self._ties.merge_blocks(
                    DeltaBlocks(copy, are_deltas=True), statistics, place
                )
                total[:] = merged
            else:
                kernels.multi_task_vector(deltas, total)
            merged = np.empty(deltas.shape[1], np.float32)
            kernels.keep_marked(deltas, thresholds, self.at_least, self.scale, total, merged)
            yield merged


consensus = as_function(Consensus)
