"""Values as models store them: read as fp32, and rounded back to nearest, ties to even.

A value of bf16 comes as the uint16 that its bits are, of fp16 as the int16, of fp32 as itself.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy import ndarray

from personae.kernels._compile import Number, as_bits, as_number, fused, kernel

U32 = np.uint32
F32 = np.float32
MAGNITUDE = U32(0x7FFF_FFFF)

_BF16, _FP16 = types.uint16, types.int16
_HALF_INFINITY = U32(0x7C00 << 13)
_HALF_BIAS = U32((127 - 15) << 23)
_HALF_MORE = U32((128 - 16) << 23)
_SMALLEST_NORMAL = F32(2.0**-14)
_SMALLEST_BITS = U32((127 - 14) << 23)
_UNIT = U32(1 << 23)
_OVERFLOW_BITS = U32((127 + 16) << 23)
_HALF = F32(0.5)
_HALF_BITS = U32(126 << 23)


@kernel
def _from_half(value: Any) -> Any:
    sign = U32(U32(value & np.int16(-0x8000)) << U32(16))
    moved = U32(U32(value & np.int16(0x7FFF)) << U32(13))
    exponent = U32(moved & _HALF_INFINITY)
    bits = U32(moved + _HALF_BIAS)
    bits = U32(bits + _HALF_MORE) if exponent == _HALF_INFINITY else bits
    tiny = as_bits(as_number(U32(bits + _UNIT)) - _SMALLEST_NORMAL)
    return as_number(U32((tiny if exponent == U32(0) else bits) | sign))


@kernel
def _to_bf16(value: Any) -> Any:
    bits = as_bits(value)
    return np.uint16(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


@kernel
def _to_half(value: Any) -> Any:
    bits = as_bits(value)
    sign = U32(bits >> U32(16)) & U32(0x8000)
    bits = U32(bits & MAGNITUDE)
    # What is too small for a normal number is rounded by the addition of one whose unit is theirs.
    tiny = U32(as_bits(as_number(bits) + _HALF) - _HALF_BITS)
    odd = U32(bits >> U32(13)) & U32(1)
    normal = U32(U32(bits - _HALF_BIAS + U32(0xFFF) + odd) >> U32(13))
    half = tiny if bits < _SMALLEST_BITS else normal
    half = U32(0x7C00) if bits >= _OVERFLOW_BITS else half
    return np.int16(half | sign)


def widened(value: Any) -> Any:
    """A stored value in fp32."""


def rounded(value: Any, like: Any) -> Any:
    """A number of fp32 as it is stored in an array of this dtype."""


@overload(widened)
def _widened(value):  # pyright: ignore
    if value == _BF16:
        return lambda value: as_number(U32(U32(value) << U32(16)))
    return (lambda value: _from_half(value)) if value == _FP16 else (lambda value: value)


@overload(rounded)
def _rounded(value, like):  # pyright: ignore
    if like == _BF16:
        return lambda value, like: _to_bf16(value)
    return (lambda value, like: _to_half(value)) if like == _FP16 else (lambda value, like: value)


@kernel
def widen(stored: ndarray, values: ndarray) -> int:
    """Read stored values as fp32; returns the bits of the largest magnitude among them."""
    most = U32(0)
    for i in range(stored.size):
        value = widened(stored[i])
        values[i] = value
        most = max(most, U32(as_bits(value) & MAGNITUDE))
    return int(most)


@kernel
def subtract(stored: ndarray, reference: ndarray, deltas: ndarray) -> int:
    """Deltas of stored values, fp32; returns the bits of the largest magnitude among them."""
    most = U32(0)
    for i in range(stored.size):
        delta = widened(stored[i]) - reference[i]
        deltas[i] = delta
        most = max(most, U32(as_bits(delta) & MAGNITUDE))
    return int(most)


@kernel
def add_multiple(stored: ndarray, coefficient: Number, total: ndarray) -> None:
    """Add a multiple of stored values to a total in fp32; each sum is rounded once."""
    for i in range(stored.size):
        total[i] = fused(widened(stored[i]), coefficient, total[i])


@kernel
def store(values: ndarray, stored: ndarray) -> int:
    """Round values of fp32; returns the bits of the largest magnitude, before it was rounded."""
    most = U32(0)
    for i in range(values.size):
        value = values[i]
        stored[i] = rounded(value, stored[i])
        most = max(most, U32(as_bits(value) & MAGNITUDE))
    return int(most)


@kernel
def store_sum(merged: ndarray, reference: ndarray, stored: ndarray) -> int:
    """As `store`, of what is merged and added to the reference's values."""
    most = U32(0)
    for i in range(merged.size):
        value = merged[i] + reference[i]
        stored[i] = rounded(value, stored[i])
        most = max(most, U32(as_bits(value) & MAGNITUDE))
    return int(most)
