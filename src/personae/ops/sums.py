"""Sums over tensors: of magnitudes, exact however a stream is cut; in fp64 otherwise.

PyTorch converts a whole tensor before it sums in another dtype: ten times slower than by chunks.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_ENTRIES = 1 << 17
_BIAS = 150  # what is counted at f are units of 2^(f - 150): the last bit at exponent field f
SUM_BINS = 256
"""One for each exponent field."""


def total(sums: Int64[Tensor, " bins"]) -> float:
    """The sum that the counts of `kernels.sum_magnitudes` stand for, rounded once."""
    return sum(count << place for place, count in enumerate(sums.tolist())) / (1 << _BIAS)


def squared_norm(tensor: Float[Tensor, "*shape"]) -> float:
    """Σ of the squares of the entries, in fp64; 0 for an empty tensor."""
    return float(sum(torch.dot(chunk, chunk) for chunk in _in_fp64(tensor)))


def absolute_sum(tensor: Float[Tensor, "*shape"]) -> float:
    """Σ of the magnitudes of the entries, in fp64; 0 for an empty tensor."""
    return float(sum(chunk.abs().sum() for chunk in _in_fp64(tensor)))


def _in_fp64(tensor: Tensor) -> Iterator[Float[Tensor, " entry"]]:
    return (chunk.double() for chunk in tensor.reshape(-1).split(_ENTRIES))
