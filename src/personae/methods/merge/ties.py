"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, merge what agrees.

Departs from the original code in three small things. Its `kthvalue` rule keeps one entry more than
asked; here exactly k count, and entries that tie with the k-th are kept too, as a stream has no
first. Entries without a winner become 0 if the model as a whole has none either (there: negative).
Votes within rounding of a tie are summed in fp64, so that the order of experts cannot flip a sign.

The whole model, over which K is taken, is what the experts consist of: of full checkpoints every
tensor, also those that no expert changed; of LoRA adapters alone the tensors that one of them
trains.
"""

from typing import ClassVar, Literal

from pydantic import Field

from personae._types import Density
from personae.methods._electing import Electing
from personae.methods._entries import Fill, find_thresholds, trimmer
from personae.methods._merge import as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="arXiv:2306.01708")
class TIES(Electing):
    """Trim each task vector, elect one sign per entry, merge the entries that agree.

    Trim: τ̂_n has the `density` largest magnitudes of τ_n, times w_n. Elect: σ_p = sgn Σ_n τ̂_np;
    undecided entries (sum 0) take the majority sgn Σ_p σ_p. Merge: the τ̂_np whose sign is σ_p.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    usual_passes: ClassVar = 1
    model_wide: ClassVar = ("density", "scope")

    density: Density | tuple[Density, ...] = Field(
        default=0.2, description="Fraction of entries kept of each expert (K in the paper)."
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description=(
            "Whether trimming and the majority sign are computed over the whole model (as in the "
            "paper) or over each tensor."
        ),
    )

    def find(self, experts: int) -> Passes:
        """Those that find each expert's threshold."""
        found = yield from find_thresholds(self.density, experts, scope=self.scope)
        return {"thresholds": found}

    def fill(self, site: Site, experts: int, statistics: Statistics) -> Fill:
        """Trims."""
        return trimmer(statistics["thresholds"], self.weight)


ties = as_function(TIES)
