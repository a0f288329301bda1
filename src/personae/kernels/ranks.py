"""Entries dropped at random, with a probability that their rank within a row decides."""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import as_bits, kernel
from personae.kernels.draws import numbers_of
from personae.kernels.stored import F32, MAGNITUDE, U32

_BITS = 8
_VALUES = 1 << _BITS
_LAST = U32(_VALUES - 1)


@kernel
def drop_by_rank(
    entries: ndarray, state: ndarray, skipped: int, kept: ndarray, factors: ndarray
) -> None:
    """Multiply what is kept by a factor, and everything else by 0, row by row.

    Entries of equal magnitude share their mean rank.

    Args:
        entries: Whole rows of one expert, one after the other, overwritten; fp32.
        state: As for `drop`.
        skipped: As for `drop`.
        kept: An entry is kept if its number is below that of twice its rank, from the smallest
            magnitude, 0, to the largest, 2 (n - 1) in rows of n; int32 (2n - 1).
        factors: The same for the factors; fp32 (2n - 1).
    """
    numbers = numbers_of(state, skipped, entries.size)
    length = (kept.size + 1) // 2
    keys, keys_after = np.empty(length, np.uint32), np.empty(length, np.uint32)
    order, order_after = np.empty(length, np.uint32), np.empty(length, np.uint32)
    places = np.empty(_VALUES, np.uint32)
    for first in range(0, entries.size, length):
        row, drawn = entries[first : first + length], numbers[first : first + length]
        varying = U32(0)
        for i in range(length):
            keys[i] = as_bits(row[i]) & MAGNITUDE
            order[i] = i
            varying |= keys[i] ^ keys[0]
        shift = U32(0)
        while varying:  # by a digit, from the lowest bit that is not the same in all keys
            while not varying & U32(1):
                varying >>= U32(1)
                shift += U32(1)
            _sort_by_digit(keys, order, shift, places, keys_after, order_after)
            keys, keys_after = keys_after, keys
            order, order_after = order_after, order
            varying >>= U32(_BITS)
            shift += U32(_BITS)
        start = 0
        while start < length:
            end = start
            while end + 1 < length and keys[end + 1] == keys[start]:
                end += 1
            limit, factor = kept[start + end], factors[start + end]
            for i in range(start, end + 1):
                entry = order[i]
                row[entry] = F32(1 if drawn[entry] < limit else 0) * row[entry] * factor
            start = end + 1


@kernel
def _sort_by_digit(
    keys: ndarray,
    order: ndarray,
    shift: np.uint32,
    places: ndarray,
    keys_after: ndarray,
    order_after: ndarray,
) -> None:
    """Sort by the digit that begins at a bit; what has the same one stays in its order."""
    places[:] = 0
    for i in range(keys.size):
        places[(keys[i] >> shift) & _LAST] += 1
    place = U32(0)
    for value in range(places.size):
        count = places[value]
        places[value] = place
        place += count
    for i in range(keys.size):
        value = (keys[i] >> shift) & _LAST
        place = places[value]
        places[value] = place + U32(1)
        keys_after[place] = keys[i]
        order_after[place] = order[i]
