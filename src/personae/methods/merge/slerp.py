"""SLERP (Shoemake 1985): from one model to another along the arc between them.

Of each tensor as one vector: its direction turns evenly and its length changes evenly, where a
straight line would pass nearer to 0. Models that were fine-tuned from one base are so close that
both are nearly the same.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, cosines
from personae.methods._merge import as_function
from personae.methods._registry import merge_method


@merge_method(paper="doi:10.1145/325334.325242")
class SLERP(FromGram):
    """Interpolate between two models along the arc: (sin((1-t) φ) θ_0 + sin(t φ) θ_1) / sin φ.

    The two are the base and one expert, or without a base two experts. φ is the angle between
    them, of each tensor as one vector.

    Returns:
        The model, fp32.
    """

    needs: ClassVar = "models"
    takes: ClassVar = 2
    order_free: ClassVar = False

    t: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Where between the models: 0 is the first, 1 the second."
    )
    linear_above: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9995,
        description=(
            "Cosine of the angle, or of that to the opposite, above which the straight line is "
            "taken, as mergekit does; 1: never but for parallel vectors."
        ),
    )

    def check(self, experts: int, has_base: bool) -> str:
        """More or fewer models than two."""
        return between_two(self.name, experts, has_base)

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`; a tensor of zeros has no direction, and the line is taken."""
        cosine = cosines(gram)[0, 1]
        angle = np.arccos(cosine)
        if not gram.diagonal().all() or abs(cosine) >= self.linear_above or np.sin(angle) == 0:
            return np.array([1 - self.t, self.t])
        return np.sin(np.array([1 - self.t, self.t]) * angle) / np.sin(angle)


slerp = as_function(SLERP)


def between_two(method: str, experts: int, has_base: bool) -> str:
    """What is wrong with more or fewer models than two; empty if nothing."""
    if experts + has_base == 2:
        return ""
    of = "the base and " if has_base else ""
    return (
        f"{method} is between two models, and here are {of}{experts} expert(s). Give a base and "
        "one expert, or two experts without a base; of more, karcher is the mean."
    )
