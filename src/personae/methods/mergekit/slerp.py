"""`slerp` of mergekit 0.1.5: a tensor of zeros is at a right angle to all others.

Here the straight line leads to it.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, lengths
from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.merge.slerp import between_two

_SMALLEST_NORM = 1e-8
_LINEAR_ABOVE = 0.9995


@merge_method(paper="doi:10.1145/325334.325242", conventions="mergekit")
class SLERP(FromGram):
    """Interpolate between two models along the arc, tensor by tensor."""

    needs: ClassVar = "models"
    takes: ClassVar = 2
    order_free: ClassVar = False

    t: float = Field(description="Where between the models: 0 is the base, 1 the other.")

    def check(self, experts: int, has_base: bool) -> str:
        """More or fewer models than two."""
        return between_two("slerp", experts, has_base)

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`."""
        norms = lengths(gram)
        first, second = np.where(norms > _SMALLEST_NORM, norms, 1)
        cosine = np.clip(gram[0, 1] / (first * second), -1, 1)
        shares = np.array([1 - self.t, self.t])
        if abs(cosine) > _LINEAR_ABOVE:
            return shares
        angle = np.arccos(cosine)
        return np.sin(shares * angle) / np.sin(angle)


slerp = as_function(SLERP)
