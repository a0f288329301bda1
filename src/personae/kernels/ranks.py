"""Entries dropped at random, with a probability that their rank within a row decides.

Ranks are counted rather than sorted: magnitudes fall into bins, many to an octave, and where all of
a bin are equal, as differences of bf16 weights mostly are, how many lie below them is their rank.
What is left is sorted.
"""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import as_bits, kernel
from personae.kernels.draws import numbers_of
from personae.kernels.stored import F32, MAGNITUDE, U32

U64 = np.uint64
_BITS = 8
_VALUES = 1 << _BITS
_LAST = U32(_VALUES - 1)
_OCTAVES = 3
"""log2 of the octaves that bins reach down from the largest magnitude; the lowest has the rest."""
_LEAST, _MOST = 6, 11
"""log2 of how many bins there are."""
_COUNT = U64(0xFF_FFFF)
_ONES, _ZEROS = U64(24), U64(44)
"""Where a bin notes, above its count, which of 20 low bits of its keys are ever 1, which ever 0."""


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
    keys, ranks = np.empty(length, np.uint32), np.empty(length, np.int32)
    bins = _LEAST
    while bins < _MOST and (1 << bins) < length:
        bins += 1
    sorts = keys.size > _COUNT
    for first in range(0, entries.size, length):
        row, drawn = entries[first : first + length], numbers[first : first + length]
        smallest, largest = MAGNITUDE, U32(0)
        for i in range(length):
            keys[i] = as_bits(row[i]) & MAGNITUDE
            smallest, largest = min(smallest, keys[i]), max(largest, keys[i])
        if smallest == largest:
            ranks[:] = length - 1
        elif sorts:
            ranks[:] = 0
            _rank_sorted(keys, np.arange(length).astype(np.uint32), np.zeros_like(ranks), ranks)
        else:  # rows are alike: where many have to be sorted, the next one is sorted at once
            sorts = 2 * _rank(keys, bins, largest, ranks) > length
        for i in range(length):
            rank = ranks[i]
            row[i] = F32(1 if drawn[i] < kept[rank] else 0) * row[i] * factors[rank]


@kernel
def _rank(keys: ndarray, bins: int, largest: np.uint32, ranks: ndarray) -> int:
    """Find twice the mean rank of every key.

    Args:
        keys: Bits of magnitudes; uint32.
        bins: log2 of how many bins they are counted in.
        largest: Of the keys.
        ranks: Filled; int32.

    Returns:
        How many had to be sorted.
    """
    count = 1 << bins
    shift = U32(23 + _OCTAVES - bins)  # of what a bin does not tell apart
    low = U32((U32(1) << shift) - U32(1))
    lowest = np.int32(max(np.int64(largest >> shift) - count + 1, 0))
    places = np.empty(keys.size, np.int32)
    for i in range(keys.size):
        places[i] = max(np.int32(keys[i] >> shift) - lowest, np.int32(0))
    noted = np.zeros(count, np.uint64)
    for i in range(keys.size):
        ones = U64(keys[i] & low)
        zeros = U64(ones ^ U64(low))
        noted[places[i]] = (noted[places[i]] + U64(1)) | (ones << _ONES) | (zeros << _ZEROS)
    # Of each bin twice what its keys' ranks are, or what is below it, and 1 where these are unlike.
    begins, below = np.empty(count, np.int32), np.int32(0)
    for place in range(count):
        inside = np.int32(noted[place] & _COUNT)
        is_mixed = ((noted[place] >> _ONES) & (noted[place] >> _ZEROS) & U64(low)) != U64(0)
        begins[place] = 2 * below + 1 if is_mixed else 2 * (2 * below + inside - 1)
        below += inside
    if lowest:
        begins[0] = 1  # it has what is smaller, too
    left, found = np.empty(keys.size, np.uint32), 0
    for i in range(keys.size):
        begin = begins[places[i]]
        ranks[i] = begin >> 1
        left[found] = i
        found += begin & 1
    if found:
        _rank_sorted(keys, left[:found], places, ranks)
    return int(found)


@kernel
def _rank_sorted(keys: ndarray, entries: ndarray, places: ndarray, ranks: ndarray) -> None:
    """Find twice the mean rank of all entries of some bins by sorting them.

    Args:
        keys: Of all entries.
        entries: Those of these bins; uint32, overwritten.
        places: Bins of all entries.
        ranks: Has, for these entries, how many lie below their bins; overwritten.
    """
    order, keys_before = entries, keys[entries]
    keys_after, order_after = np.empty_like(keys_before), np.empty_like(order)
    counts = np.empty(_VALUES, np.uint32)
    varying = U32(0)
    for i in range(order.size):
        varying |= keys_before[i] ^ keys_before[0]
    shift = U32(0)
    while varying:  # by a digit, from the lowest bit that is not the same in all keys
        while not varying & U32(1):
            varying >>= U32(1)
            shift += U32(1)
        _sort_by_digit(keys_before, order, shift, counts, keys_after, order_after)
        keys_before, keys_after = keys_after, keys_before
        order, order_after = order_after, order
        varying >>= U32(_BITS)
        shift += U32(_BITS)
    begin = start = 0  # of a bin, and of equal keys in it
    while start < order.size:
        if places[order[start]] != places[order[begin]]:
            begin = start
        end = start
        while end + 1 < order.size and keys_before[end + 1] == keys_before[start]:
            end += 1
        rank = 2 * (ranks[order[start]] - begin) + start + end
        for i in range(start, end + 1):
            ranks[order[i]] = rank
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
