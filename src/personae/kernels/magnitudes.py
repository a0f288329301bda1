"""Entries chosen and counted by their magnitude, whose bits as an integer order as it does."""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import Number, as_bits, kernel
from personae.kernels.stored import F32, MAGNITUDE, U32

_WORD = 8
_MANTISSA = U32(0x7F_FFFF)
_IMPLIED = U32(1 << 23)


@kernel
def trim(deltas: ndarray, limits: ndarray, weights: ndarray) -> None:
    """Leave entries whose magnitude is above the expert's limit, times its weight; 0 elsewhere."""
    for n in range(deltas.shape[0]):
        row, limit, weight = deltas[n], limits[n], weights[n]
        for i in range(row.size):
            value = row[i]
            row[i] = value * weight if abs(value) > limit else F32(0)


@kernel
def drop_ties(row: ndarray, level: Number, first: int) -> None:
    """Set entries of exactly this magnitude to 0, from the entry `first` on."""
    for i in range(first, row.size):
        row[i] = F32(0) if abs(row[i]) == level else row[i]


@kernel
def count_ties(row: ndarray, level: Number, first: int, width: int, counts: ndarray) -> None:
    """Count entries, those above the level, and those that equal it, in bins of their positions.

    Args:
        row: Entries of one expert; fp32.
        level: A magnitude.
        first: Of the first entry its place behind the beginning of the first bin, or before it.
        width: Positions in a bin.
        counts: Added to: entries, entries above, then one count for each bin; int64.
    """
    bins = counts.size - 2
    counts[0] += row.size
    for i in range(row.size):
        counts[1] += abs(row[i]) > level
    for i in range(row.size):
        if abs(row[i]) == level and first + i >= 0:
            place = (first + i) // width
            if place < bins:
                counts[2 + place] += 1


@kernel
def sample(row: ndarray, floor: int, shift: int, counts: ndarray) -> None:
    """Add a histogram of magnitudes: bins of 2^shift patterns, the first one around `floor`."""
    last, low, by = U32(counts.size - 1), U32(floor), U32(shift)
    places = np.empty(row.size, np.uint32)
    for i in range(row.size):
        places[i] = min(U32(max(U32(as_bits(row[i]) & MAGNITUDE), low) - low) >> by, last)
    for i in range(row.size):
        counts[places[i]] += 1


@kernel
def count_magnitudes(row: ndarray, low: int, high: int, shift: int, counts: ndarray) -> None:
    """Add how many entries there are, how many are at or above `high`, and those of each bin.

    Args:
        row: Entries of one expert; fp32.
        low: The lowest pattern that is looked at closely.
        high: The pattern above the last such.
        shift: log2 of the patterns in a bin.
        counts: Added to: entries, entries above, then one count for each bin; int64.
    """
    low_, high_ = U32(low), U32(high)
    span = U32(high_ - low_)
    inside = np.zeros(-(-row.size // _WORD) * _WORD, np.uint8)
    above = np.int64(0)
    for i in range(row.size):
        pattern = U32(as_bits(row[i]) & MAGNITUDE)
        above += pattern >= high_
        inside[i] = U32(pattern - low_) < span
    counts[0] += row.size
    counts[1] += above
    marked = inside.view(np.uint64)
    for word in range(marked.size):
        if marked[word]:
            for i in range(word * _WORD, word * _WORD + _WORD):
                if inside[i]:
                    offset = U32(U32(as_bits(row[i]) & MAGNITUDE) - low_)
                    counts[2 + (np.int64(offset) >> shift)] += 1


@kernel
def sum_magnitudes(row: ndarray, sums: ndarray) -> None:
    """Add the magnitudes of finite entries, exactly: sums[e] counts units of 2^(e - 150)."""
    for i in range(row.size):
        bits = U32(as_bits(row[i]) & MAGNITUDE)
        exponent = bits >> U32(23)
        mantissa = U32(bits & _MANTISSA)
        if exponent:
            sums[exponent] += np.int64(mantissa | _IMPLIED)
        else:
            sums[1] += np.int64(mantissa)
