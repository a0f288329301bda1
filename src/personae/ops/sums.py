"""Sums over tensors: of magnitudes, exact however a stream is cut; in fp64 otherwise.

PyTorch converts a whole tensor before it sums in another dtype: ten times slower than by chunks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

_CHUNK = 1 << 14
_ENTRIES = 1 << 17
_OCTAVES = 15  # 2^14 entries of 24 bits, 15 octaves apart at most, add up exactly in 53 bits
_LOW_BITS = 26
_BIAS = 150  # what is counted at f are units of 2^(f - 150): the last bit at exponent field f
SUM_BINS = 256 + _LOW_BITS


def magnitude_sums(entries: Float[Tensor, " entry"]) -> Int64[Tensor, " bins"]:
    """Σ of the magnitudes of fp32 entries as counts (int64) of units of 2^(bin - 150)."""
    sums = np.zeros(SUM_BINS, np.int64)
    magnitudes = np.abs(entries.numpy())
    for start in range(0, len(magnitudes), _CHUNK):
        rest = magnitudes[start : start + _CHUNK]
        while len(rest) and (top := rest.max()) > 0:
            unit = max((int(top.view(np.int32)) >> 23) - _OCTAVES, 1)
            limit = np.float32(0 if unit == 1 else 2.0 ** (unit - 127))
            is_large = rest >= limit
            exact = np.ldexp((rest * is_large).sum(dtype=np.float64), _BIAS - unit)
            high, low = divmod(int(exact), 1 << _LOW_BITS)
            sums[unit] += low
            sums[unit + _LOW_BITS] += high
            rest = rest[(rest < limit) & (rest > 0)]
    return torch.from_numpy(sums)


def total(sums: Int64[Tensor, " bins"]) -> float:
    """The sum that the counts stand for, rounded once."""
    return sum(count << place for place, count in enumerate(sums.tolist())) / (1 << _BIAS)


def squared_norm(tensor: Float[Tensor, "*shape"]) -> float:
    """Σ of the squares of the entries, in fp64; 0 for an empty tensor."""
    return float(sum(torch.dot(chunk, chunk) for chunk in _in_fp64(tensor)))


def absolute_sum(tensor: Float[Tensor, "*shape"]) -> float:
    """Σ of the magnitudes of the entries, in fp64; 0 for an empty tensor."""
    return float(sum(chunk.abs().sum() for chunk in _in_fp64(tensor)))


def _in_fp64(tensor: Tensor) -> Iterator[Float[Tensor, " entry"]]:
    return (chunk.double() for chunk in tensor.reshape(-1).split(_ENTRIES))
