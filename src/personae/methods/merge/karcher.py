"""Karcher mean (Karcher 1977): the mean of directions on the sphere, at the mean length.

The point from which the weighted sum of the arcs to all models is 0, found by going along that sum.
Of two models it is the middle of SLERP's arc, of many it does not depend on their order.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, cosines, lengths
from personae.methods._merge import as_function
from personae.methods._method import one_each
from personae.methods._registry import merge_method


@merge_method(paper="doi:10.1002/cpa.3160300502")
class Karcher(FromGram):
    """Average the experts' directions on the sphere, each tensor as one vector.

    The base is not among them. Models of which a tensor is all zeros are left out of its direction;
    they count for its length.

    Returns:
        The model, fp32.
    """

    needs: ClassVar = "experts"

    weight: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=1.0, description="Weight of each expert; divided by their sum."
    )
    max_iter: Annotated[int, Field(ge=1)] = Field(default=10, description="Most steps.")
    tol: Annotated[float, Field(gt=0)] = Field(
        default=1e-5, description="Length of a step, in radians, at which it has arrived."
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that are all 0."""
        if any(one_each(self.weight, experts)):
            return ""
        return "karcher: all weights are 0. Give at least one expert a weight above 0."

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`.

        A point Σ p_n u_n of unit vectors is its p; inner products are those of the Gram matrix.
        """
        norms = lengths(gram)
        weights = np.array(one_each(self.weight, len(gram)), np.float64)
        weights /= weights.sum()
        length = weights @ norms
        alive = np.flatnonzero((norms > 0) & (weights > 0))
        if not len(alive):
            return np.zeros(len(gram))
        cosine, share = cosines(gram)[np.ix_(alive, alive)], weights[alive] / weights[alive].sum()

        def norm(point: ndarray) -> float:
            return float(np.sqrt(max(point @ cosine @ point, 0)))

        point = share.copy()
        if norm(point) < self.tol:  # they cancel: any start is as good
            point = np.eye(len(alive))[0]
        point /= norm(point)
        for _ in range(self.max_iter):
            to_each = np.clip(cosine @ point, -1, 1)
            angles = np.arccos(to_each)
            pull = share / np.sinc(angles / np.pi)  # φ / sin φ, 1 at 0
            pull[angles > np.pi - self.tol] = 0  # from the opposite point, no direction is nearest
            step = pull - (pull @ to_each) * point
            far = norm(step)
            if far < self.tol:
                break
            point = np.cos(far) * point + np.sin(far) / far * step
            point /= norm(point)
        found = np.zeros(len(gram))
        found[alive] = length * point / norms[alive]
        return found


karcher = as_function(Karcher)
