"""Model Stock (Jang et al. 2024): as far from the base to the average as their angles say.

Fine-tuned models lie on a thin shell around a centre, and task vectors meet at nearly one angle φ.
The point nearest to the centre on the way from the base to the average follows from φ alone.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from personae.methods._gram import FromGram, Span, cosines, pairs_of
from personae.methods._merge import as_function
from personae.methods._registry import merge_method


@merge_method(paper="arXiv:2403.19522")
class ModelStock(FromGram):
    """Average the task vectors, times t = N cos φ / (1 + (N - 1) cos φ), a tensor each.

    cos φ is the mean cosine between two experts' task vectors (eq. 2). Where it is below 0, the
    angle is wider than the paper's picture has it, and the base is kept: t = 0.

    Returns:
        The merged task vector, fp32.
    """

    needs: ClassVar = "base"
    whole_rows: ClassVar = True

    filter_wise: bool = Field(
        default=False, description="Whether each row has an angle of its own, not each tensor."
    )

    @property
    def span(self) -> Span:
        """See `FromGram.span`."""
        return "row" if self.filter_wise else "tensor"

    def check(self, experts: int, has_base: bool) -> str:
        """Fewer than two experts have no angle."""
        if experts > 1:
            return ""
        return "model_stock takes angles between experts, and there is one. Give at least two."

    def solve(self, gram: Float64[ndarray, "*vector model model"]) -> Float64[ndarray, "..."]:
        """See `FromGram.solve`."""
        experts = gram.shape[-1]
        if experts == 1:
            return np.ones(gram.shape[:-1])
        first, second = pairs_of(experts)
        cosine = np.maximum(cosines(gram)[..., first, second].mean(axis=-1), 0.0)
        t = experts * cosine / (1 + (experts - 1) * cosine)
        return np.repeat(t[..., None] / experts, experts, axis=-1)


model_stock = as_function(ModelStock)
