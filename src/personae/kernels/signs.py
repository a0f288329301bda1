"""Electing one sign an entry, and merging the experts that agree with it (TIES, steps 2 and 3).

Sums go over the experts in order, entry by entry, so that how entries are cut into blocks changes
nothing.
"""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import as_bits, as_number, kernel
from personae.kernels.stored import F32, MAGNITUDE, U32

_WORD = 8
_NOTHING = F32(-0.0)
"""What sums begin with: added to it, a zero keeps its sign."""


@kernel
def elect_by_mass(kept: ndarray, signs: ndarray, undecided: ndarray) -> tuple[int, int]:
    """Elect sgn Σ_n kept_np. Sums within rounding of 0 are summed again in fp64.

    So the order of experts flips no sign. Until they are filled, the sums and the largest votes
    lie where the results will.

    Args:
        kept: What was kept of each expert, weighted, 0 where nothing was: (expert, entry), fp32.
        signs: Filled with the elected signs, 1, -1 or, where nobody votes or wins, 0; fp32.
        undecided: Filled with the entries on which experts vote and none wins, ascending; int64.

    Returns:
        How many are undecided; entries that elect + minus entries that elect -.
    """
    experts, entries = kept.shape
    # What rounding may make of a sum, in units of the largest vote. All bits that some experts have
    # make a number no less than each of theirs.
    rounding = F32(experts * (experts + 2) * 2.0**-23)
    largest = undecided.view(np.uint32)
    first = kept[0]
    for i in range(entries):
        signs[i] = first[i]
        largest[i] = as_bits(first[i])
    for n in range(1, experts):
        row = kept[n]
        for i in range(entries):
            signs[i] += row[i]
            largest[i] |= as_bits(row[i])
    doubtful = np.zeros(_words(entries) * _WORD, np.uint8)
    for i in range(entries):
        sum_ = signs[i]
        vote = as_number(U32(largest[i] & MAGNITUDE))
        plus = F32(1) if sum_ > F32(0) else F32(0)
        signs[i] = F32(-1) if sum_ < F32(0) else plus
        is_sure = (abs(sum_) > vote * rounding) & (abs(sum_) < F32(np.inf))
        doubtful[i] = (~is_sure) & (vote != F32(0))
    found = 0
    marked = doubtful.view(np.uint64)
    for word in range(marked.size):
        if marked[word]:
            for i in range(word * _WORD, word * _WORD + _WORD):
                if doubtful[i]:
                    exact = 0.0
                    for n in range(experts):
                        exact += np.float64(kept[n, i])
                    signs[i] = F32(exact > 0) - F32(exact < 0)
                    if exact == 0:
                        undecided[found] = i
                        found += 1
    return found, _sum_of_signs(signs)


@kernel
def elect_by_count(kept: ndarray, signs: ndarray, undecided: ndarray) -> tuple[int, int]:
    """As `elect_by_mass`, with one vote each."""
    experts, entries = kept.shape
    total = np.zeros(entries, np.int32)
    anyone = np.zeros(entries, np.uint32)
    for n in range(experts):
        row = kept[n]
        for i in range(entries):
            total[i] += np.int32(row[i] > F32(0)) - np.int32(row[i] < F32(0))
            anyone[i] |= as_bits(row[i])
    found = 0
    for i in range(entries):
        signs[i] = F32(total[i] > 0) - F32(total[i] < 0)
        undecided[found] = i
        found += (total[i] == 0) & (U32(anyone[i] & MAGNITUDE) != U32(0))
    return found, _sum_of_signs(signs)


@kernel
def sum_agreeing(kept: ndarray, signs: ndarray, merged: ndarray) -> None:
    """Σ_n of the kept_np whose sign is the elected one; 0 where there is none."""
    experts, entries = kept.shape
    merged[:] = _NOTHING
    for n in range(experts):
        row = kept[n]
        for i in range(entries):
            vote = row[i] * signs[i]
            merged[i] += vote if vote >= F32(0) else F32(0)
    for i in range(entries):
        merged[i] *= signs[i]


@kernel
def mean_agreeing(kept: ndarray, signs: ndarray, merged: ndarray) -> None:
    """The mean of the kept_np whose sign is the elected one; 0 where there is none."""
    experts, entries = kept.shape
    merged[:] = _NOTHING
    agreeing = np.zeros(entries, np.float32)
    for n in range(experts):
        row = kept[n]
        for i in range(entries):
            vote = row[i] * signs[i]
            merged[i] += vote if vote >= F32(0) else F32(0)
            agreeing[i] += F32(1) if vote > F32(0) else F32(0)
    for i in range(entries):
        count = agreeing[i]
        merged[i] = merged[i] * signs[i] / (count if count > F32(1) else F32(1))


@kernel
def max_agreeing(kept: ndarray, signs: ndarray, merged: ndarray) -> None:
    """The largest kept_np in magnitude of those whose sign is the elected one; 0 where none is."""
    experts, entries = kept.shape
    merged[:] = F32(0)
    for n in range(experts):
        row = kept[n]
        for i in range(entries):
            vote = row[i] * signs[i]
            merged[i] = vote if vote > merged[i] else merged[i]
    for i in range(entries):
        merged[i] *= signs[i]


@kernel
def weighted_mean_agreeing(
    kept: ndarray, signs: ndarray, weights: ndarray, merged: ndarray
) -> None:
    """`sum_agreeing` over the sum of the weights (fp32) of the experts that agree."""
    experts, entries = kept.shape
    merged[:] = _NOTHING
    divisor = np.zeros(entries, np.float32)
    for n in range(experts):
        row, weight = kept[n], weights[n]
        for i in range(entries):
            vote = row[i] * signs[i]
            merged[i] += vote if vote >= F32(0) else F32(0)
            divisor[i] += F32(vote > F32(0)) * weight
    for i in range(entries):
        merged[i] = merged[i] * signs[i] / (divisor[i] + F32(divisor[i] == F32(0)))


@kernel
def reduce_either(
    kept: ndarray, entries: ndarray, mean: bool, largest: bool, either: ndarray
) -> None:
    """What the experts of either sign come to at a few entries: their mean, largest, or sum.

    Args:
        kept: As for `elect_by_mass`.
        entries: Which; int64.
        mean: Whether it is the mean.
        largest: Whether it is the one of largest magnitude.
        either: Filled with what the positive ones make and the negative ones; fp32 (2, entry).
    """
    for side in range(2):
        sign = F32(1 - 2 * side)
        for i in range(entries.size):
            total, agreeing = F32(0), F32(0)
            for n in range(kept.shape[0]):
                vote = kept[n, entries[i]] * sign
                if vote > F32(0):
                    total = max(total, vote) if largest else total + vote
                    agreeing += F32(1)
            total *= sign
            either[side, i] = total / agreeing if mean and agreeing > F32(0) else total


@kernel
def _sum_of_signs(signs: ndarray) -> int:
    total = np.int32(0)
    for i in range(signs.size):
        total += np.int32(signs[i])
    return int(total)


@kernel
def _words(entries: int) -> int:
    return -(-entries // _WORD)
