"""Multi-SLERP (mergekit): the weighted mean of directions, at the weighted mean of lengths.

mergekit projects the directions to the tangent space at their weighted mean, averages them there
and goes along what comes out. That average is 0 for whatever it is given, as the mean's own part of
the directions is all that they have in common: the mean of directions is left, which `karcher`
only begins with.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, lengths
from personae.methods._merge import as_function
from personae.methods._method import one_each
from personae.methods._registry import merge_method


@merge_method(paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea")
class MultiSLERP(FromGram):
    """Average the experts' directions and lengths, tensor by tensor, from the base if there is one.

    Directions that cancel, or tensors of zeros, are added up instead.

    Returns:
        The merged task vector; without a base the model. fp32.
    """

    needs: ClassVar = "either"

    weight: float | tuple[float, ...] = Field(default=1.0, description="Weight of each expert.")
    normalize_weights: bool = Field(
        default=True, description="Whether weights are divided by their sum."
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="Length of the mean direction below which directions cancel."
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Weights that are divided by 0."""
        if not self.normalize_weights or sum(one_each(self.weight, experts)):
            return ""
        return "multislerp divides by the sum of the weights, which is 0. Give other weights."

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`."""
        norms = lengths(gram)
        if len(norms) == 1:
            return np.ones(1)
        weights = np.array(one_each(self.weight, len(norms)))
        if self.normalize_weights:
            weights /= weights.sum()
        direction = weights / (norms + self.eps)
        length = np.sqrt(max(direction @ gram @ direction, 0))
        return weights if length < self.eps else direction / length * (weights @ norms)


multislerp = as_function(MultiSLERP)
