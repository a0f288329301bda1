"""NearSwap (alchemonaut, in mergekit): take the expert's entries where they are near the base's.

Of an entry that is further away than t, the step of length t towards the expert is taken.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Undecided
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site

_SMALLEST = np.float32(1e-6)


@merge_method(paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001")
class NearSwap(RowWise):
    """Cut the entries of one task vector off at ± t: τ · min(1, t / max(|τ|, 1e-6)).

    Returns:
        The merged task vector, fp32.
    """

    needs: ClassVar = "base"
    takes: ClassVar = 1

    t: Annotated[float, Field(ge=0)] = Field(
        default=1e-4, description="Largest change of an entry of the base."
    )

    def check(self, experts: int, has_base: bool) -> str:
        """More experts than one."""
        if experts == 1:
            return ""
        return f"nearswap goes from the base to one expert, and here are {experts}. Give one."

    def working(self, experts: int) -> int:
        """Magnitudes, and what they are cut off to."""
        return 4 + 4

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        for _, (delta,) in blocks:
            yield delta * np.minimum(np.float32(self.t) / np.maximum(np.abs(delta), _SMALLEST), 1)


nearswap = as_function(NearSwap)
