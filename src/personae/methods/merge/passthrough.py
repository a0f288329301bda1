"""One model as it is, or times a number (mergekit's passthrough)."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import Linear, as_function
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="https://github.com/arcee-ai/mergekit")
class Passthrough(Linear):
    """Take one model as it is; with filters, some of its tensors times a number.

    Returns:
        The model, fp32.
    """

    needs: ClassVar = "experts"
    takes: ClassVar = 1

    scale: float = Field(default=1.0, description="Multiplier on the tensors.")

    def check(self, experts: int, has_base: bool) -> str:
        """More models than one."""
        if experts == 1:
            return ""
        return f"passthrough takes one model, and here are {experts}. Give one, or another method."

    def coefficients(self, experts: int) -> Sequence[float]:
        """See `Linear.coefficients`."""
        return (self.scale,) * experts

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return weighted_sums(blocks, self.scale)


passthrough = as_function(Passthrough)
