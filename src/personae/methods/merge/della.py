"""DELLA (Deep et al. 2024): drop small entries rather than large ones, elect signs, merge.

MagPrune, its first step, drops at random as DARE does, with a probability that falls with the rank
of an entry's magnitude in its row. The paper writes p - ε/2 + ε r/n for the probability of dropping
the entry of rank r; its code, which this follows, goes from p - ε/2 to p + ε/2 with both ends, so
that a fraction 1 - p is kept on average. Entries of equal magnitude share their mean rank. Rows are
those of the matrix as it is stored: of one output, but in GPT-2's transposed layers.

mergekit's `della` takes density ± ε, twice as wide, and restores the L1 norm of each tensor where
what is kept is here divided by its own probability.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from personae._types import Density
from personae.methods._dropping import beyond_certainty, rank_bytes, rank_dropper
from personae.methods._electing import Electing
from personae.methods._entries import Fill
from personae.methods._merge import as_function
from personae.methods._method import Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site

Width = Annotated[float, Field(ge=0, lt=1)]


@merge_method(paper="arXiv:2406.11617")
class DELLA(Electing):
    """Drop entries at random by the rank of their magnitude, elect signs, merge what agrees.

    In a row of n entries that of rank r (0: the smallest magnitude) is kept with probability
    q_r = density + epsilon · (r / (n - 1) - 1/2), and divided by it. A vector is one row.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """

    order_free: ClassVar = False
    whole_rows: ClassVar = True
    model_wide: ClassVar = ("scope",)

    density: Density | tuple[Density, ...] = Field(
        default=0.7, description="Mean probability that an entry is kept (1 - p of the paper)."
    )
    epsilon: Width | tuple[Width, ...] = Field(
        default=0.14,
        description=(
            "Probability of the largest entry of a row less that of the smallest (ε of the paper, "
            "window_size of its code)."
        ),
    )
    rescale: bool = Field(
        default=True,
        description=(
            "Whether kept entries are divided by their probability, so that their expectation is "
            "τ_n."
        ),
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description="Whether the majority sign is that of the whole model or of each tensor.",
    )
    seed: int = Field(default=0, description="Seed of the random masks: same seed, same model.")

    def check(self, experts: int, has_base: bool) -> str:
        """Probabilities beyond 0 or 1."""
        pairs = zip(one_each(self.density, experts), one_each(self.epsilon, experts), strict=True)
        return beyond_certainty(self.name, ((d, e / 2) for d, e in pairs))

    def block_bytes(
        self, site: Site, entries: int, experts: int, *, has_reference: bool = True
    ) -> int:
        """See `Entrywise.block_bytes`; and the tables by rank."""
        block = super().block_bytes(site, entries, experts, has_reference=has_reference)
        return block + rank_bytes(site.row_entries, experts)

    def fill(self, site: Site, experts: int, statistics: Statistics) -> Fill:
        """Drops and rescales."""
        return rank_dropper(
            site,
            density=self.density,
            spread=self.epsilon,
            weight=self.weight,
            rescale=self.rescale,
            seed=self.seed,
            experts=experts,
        )


della = as_function(DELLA)
