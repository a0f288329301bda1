"""NuSLERP (mergekit): SLERP between two experts, of their task vectors or of themselves.

Where `slerp` turns from the base to one expert, this turns from one expert to the other, around the
base if there is one. No paper has it.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, Span, lengths
from personae.methods._merge import as_function
from personae.methods._method import one_each
from personae.methods._registry import merge_method

_SMALLEST_NORM = 1e-7
_SMALLEST_WEIGHT = 1e-6
_PARALLEL = 2.0**-23


@merge_method(paper="https://github.com/arcee-ai/mergekit")
class NuSLERP(FromGram):
    """Interpolate along the arc between two experts, seen from the base if there is one.

    t is the second weight over their sum (1/2 where they cancel), φ the angle between the vectors:
    (sin((1-t) φ) x_0 + sin(t φ) x_1) / sin φ; the straight line where they are parallel. A vector
    of zeros is at a right angle to all others.

    Returns:
        The merged task vector; without a base the model. fp32.
    """

    needs: ClassVar = "either"
    takes: ClassVar = 2
    order_free: ClassVar = False
    whole_rows: ClassVar = True

    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Weight of each expert; divided by their sum."
    )
    nuslerp_flatten: bool = Field(
        default=True, description="Whether a tensor is one vector, not many."
    )
    nuslerp_row_wise: bool = Field(
        default=False,
        description=(
            "Without nuslerp_flatten: whether vectors lie along the first axis of a tensor, not "
            "along the last."
        ),
    )

    @property
    def span(self) -> Span:
        """See `FromGram.span`."""
        if self.nuslerp_flatten:
            return "tensor"
        return "column" if self.nuslerp_row_wise else "row"

    def check(self, experts: int, has_base: bool) -> str:
        """More or fewer experts than two."""
        if experts == 2:
            return ""
        return f"nuslerp is between two experts, and here are {experts}. Give two."

    def solve(self, gram: Float64[ndarray, "*vector model model"]) -> Float64[ndarray, "..."]:
        """See `FromGram.solve`."""
        first, second = one_each(self.weight, 2)
        total = first + second
        t = 0.5 if abs(total) < _SMALLEST_WEIGHT else second / total
        shares = np.array([1 - t, t])
        norms = np.maximum(lengths(gram), _SMALLEST_NORM)
        cosine = np.clip(gram[..., 0, 1] / norms.prod(axis=-1), -1, 1)[..., None]
        parallel = 1 - cosine**2 <= _PARALLEL
        angle = np.arccos(np.where(parallel, 0, cosine))
        arc = np.sin(shares * angle) / np.where(parallel, 1, np.sin(angle))
        return np.where(parallel, shares, arc)


nuslerp = as_function(NuSLERP)
