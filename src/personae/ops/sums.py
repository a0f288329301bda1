"""Exact sums of magnitudes over a stream: the same however the stream is cut, and in any order."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

EXPONENTS = 256
_MANTISSA_BITS = 23


def magnitude_sums(entries: Float[Tensor, " entry"]) -> Int64[Tensor, "256"]:
    """Σ of the significands (integers) of fp32 entries, by their exponent field.

    A chunk's sums are exact in the fp64 of `bincount`: 2^24 · entries stays below 2^53.
    """
    bits = entries.contiguous().numpy().view(np.int32) & 0x7FFF_FFFF
    exponents = bits >> _MANTISSA_BITS
    significands = (bits & (1 << _MANTISSA_BITS) - 1) | ((exponents > 0) << _MANTISSA_BITS)
    sums = np.bincount(exponents, weights=significands, minlength=EXPONENTS)
    return torch.from_numpy(sums.astype(np.int64))


def total(sums: Int64[Tensor, "256"]) -> float:
    """Σ of the magnitudes, from the sums by exponent."""
    powers = np.maximum(np.arange(EXPONENTS), 1) - 127 - _MANTISSA_BITS
    return float(np.ldexp(sums.numpy().astype(np.float64), powers).sum())
