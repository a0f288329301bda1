"""Model Stock (Jang et al. 2024): as far from the base to the average as their angles say.

Fine-tuned models lie on a thin shell around a centre, and task vectors meet at nearly one angle φ.
The point nearest to the centre on the way from the base to the average follows from φ alone.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from personae.methods._gram import FromGram, cosines
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

    def check(self, experts: int, has_base: bool) -> str:
        """Fewer than two experts have no angle."""
        if experts > 1:
            return ""
        return "model_stock takes angles between experts, and there is one. Give at least two."

    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """See `FromGram.solve`."""
        experts = len(gram)
        if experts == 1:
            return np.ones(1)
        off_diagonal = ~np.eye(experts, dtype=bool)
        cosine = max(float(cosines(gram)[off_diagonal].mean()), 0.0)
        t = experts * cosine / (1 + (experts - 1) * cosine)
        return np.full(experts, t / experts)


model_stock = as_function(ModelStock)
