"""`model_stock` of mergekit 0.1.5: the angle is taken as it is, below 90° or above.

Where experts point apart, t is negative there, and the base is left on their other side; products
of lengths below 1e-6 count as 1e-6.
"""

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from personae.methods._gram import lengths, pairs_of
from personae.methods._merge import as_function
from personae.methods._registry import merge_method
from personae.methods.merge.model_stock import ModelStock as Ours

_SMALLEST_PRODUCT = 1e-6
_SMALLEST_DIVISOR = 1e-6


@merge_method(paper="arXiv:2403.19522", conventions="mergekit")
class ModelStock(Ours):
    """Average the task vectors, times t = N cos φ / (1 + (N - 1) cos φ), a tensor or row each."""

    def solve(self, gram: Float64[ndarray, "*vector model model"]) -> Float64[ndarray, "..."]:
        """See `FromGram.solve`."""
        experts, norms = gram.shape[-1], lengths(gram)
        first, second = pairs_of(experts)
        products = np.maximum(norms[..., first] * norms[..., second], _SMALLEST_PRODUCT)
        each = np.clip(gram[..., first, second] / products, -1, 1)
        cosine = each.mean(axis=-1) if experts > 1 else np.ones(gram.shape[:-2])
        divisor = 1 + (experts - 1) * cosine
        singular = np.abs(divisor) < _SMALLEST_DIVISOR
        t = np.where(singular, 0, experts * cosine / np.where(singular, 1, divisor))
        return np.repeat(t[..., None] / experts, experts, axis=-1)


model_stock = as_function(ModelStock)
