"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, merge what agrees.

Departs from the original code in three small things. Its `kthvalue` rule keeps one entry more than
asked; here exactly k count, and entries that tie with the k-th are kept too, as a stream has no
first. Entries without a winner become 0 if the model as a whole has none either (there: negative).
Votes within rounding of a tie are summed in fp64, so that the order of experts cannot flip a sign.

The whole model, over which K is taken, is what the experts consist of: of full checkpoints every
tensor, also those that no expert changed; of LoRA adapters alone the tensors that one of them
trains.
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
from personae.methods._entries import find_thresholds, merge_elected, trimmer, votes
from personae.methods._merge import Gathering, Measure, RowWise, Statistics, as_function
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods._undecided import Undecided


@merge_method(paper="arXiv:2306.01708")
class TIES(RowWise):
    """Trim each task vector, elect one sign per entry, merge the entries that agree.

    Trim: τ̂_n has the `density` largest magnitudes of τ_n, times w_n. Elect: σ_p = sgn Σ_n τ̂_np;
    undecided entries (sum 0) take the majority sgn Σ_p σ_p. Merge: the τ̂_np whose sign is σ_p.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    can_decide_late: ClassVar = True
    looks: ClassVar = 1
    model_wide: ClassVar = ("density", "scope")

    density: Density | tuple[Density, ...] = Field(
        default=0.2, description="Fraction of entries kept of each expert (K in the paper)."
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "Coefficient of each expert's trimmed task vector, applied before signs are elected. "
            "The mean divides by the number of experts that agree, not by the sum of their "
            "weights: if all weights are 2, the result doubles. A negative weight negates."
        ),
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description=(
            "Whether trimming and the majority sign are computed over the whole model (as in the "
            "paper) or over each tensor."
        ),
    )
    reduce: Literal["mean", "sum", "max"] = Field(
        default="mean", description="Mean, sum or largest magnitude of the entries that agree."
    )
    elect: Literal["mass", "count"] = Field(
        default="mass",
        description=(
            "Whether experts vote with their magnitudes (as in the paper) or one vote each."
        ),
    )
    scale: float = Field(default=1.0, description="Multiplier on the result (λ in the paper).")

    def is_late(self) -> bool:
        """With magnitudes votes seldom cancel; with one vote each they often do."""
        return self.elect == "mass"

    def gather(self, experts: int) -> Gathering:
        """Looks that find each expert's threshold, and one for the majority sign."""
        thresholds = yield from find_thresholds(self.density, experts)

        def vote(vectors: Tensor | DeltaBlocks, own: Any, _: Site) -> Tensor:
            return votes(delta_blocks(vectors), trimmer(thresholds, own.weight), own.elect)

        # A single expert is never outvoted.
        majority = (yield Measure("majority", vote, late=True)) if experts > 1 else torch.tensor(0)
        known = {} if majority is None else {"majority": majority.sign()}
        return {"thresholds": thresholds, **known}

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
            trimmer(statistics["thresholds"], self.weight),
            elect=self.elect,
            reduce=self.reduce,
            scale=self.scale,
            statistics=statistics,
            undecided=undecided,
        )


ties = as_function(TIES)
