"""Geometric median: the model whose distances to all experts have the smallest sum.

Each tensor is one point. Unlike the mean, it stays near the others if one expert is far off.
Found by Weiszfeld's iteration, as Vardi and Zhang (2000) made it go on from an expert's own place.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram
from personae.methods._merge import as_function
from personae.methods._method import one_each
from personae.methods._registry import merge_method

_SAME = 1e-14
"""Squared distance, over the largest squared norm, at which two points are one by rounding."""


@merge_method(paper="doi:10.1073/pnas.97.4.1423")
class GeometricMedian(FromGram):
    """Take the point from which the distances to all experts are least in sum, a tensor each.

    Σ_n w_n ‖τ - τ_n‖ is smallest there; the base has no part in it.

    Returns:
        The merged task vector, fp32; it lies between the experts' own.
    """

    counts_experts: ClassVar = True

    weight: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=1.0, description="Weight of each expert's distance."
    )
    max_iter: Annotated[int, Field(ge=1)] = Field(default=200, description="Most steps.")
    tol: Annotated[float, Field(gt=0)] = Field(
        default=1e-6,
        description="Change of the experts' shares, from one step to the next, at which it ends.",
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that are all 0."""
        if any(one_each(self.weight, experts)):
            return ""
        return "geometric_median: all weights are 0. Give at least one expert a weight above 0."

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`. A point Σ p_n τ_n with Σ p_n = 1 is its p."""
        weights = np.array(one_each(self.weight, len(gram)), np.float64)
        shares = weights / weights.sum()
        squares, same = np.diagonal(gram), _SAME * float(np.diagonal(gram).max(initial=0.0))
        for _ in range(self.max_iter):
            far = squares - 2 * (gram @ shares) + shares @ gram @ shares
            here = far <= same
            pulls = np.where(here, 0.0, weights / np.sqrt(np.where(here, 1.0, far)))
            if not pulls.any():  # all are one point
                break
            step = pulls / pulls.sum()
            stay = self._stay(gram, shares, weights[here].sum(), pulls)
            found = (1 - stay) * step + stay * shares
            moved = float(np.abs(found - shares).max())
            shares = found
            if moved < self.tol:
                break
        return shares

    @staticmethod
    def _stay(gram: ndarray, shares: ndarray, held: float, pulls: ndarray) -> float:
        """How much of an expert's own place is kept: all of it if it is the median."""
        if not held:
            return 0.0
        pull = pulls - pulls.sum() * shares
        strength = float(np.sqrt(max(pull @ gram @ pull, 0.0)))
        return 1.0 if strength <= held else held / strength


geometric_median = as_function(GeometricMedian)
