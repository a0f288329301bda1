"""Sums over the experts, in their order: how entries are cut into blocks changes nothing."""

from typing import Any

import numpy as np
from numpy import ndarray

from personae.kernels._compile import as_bits, as_number, kernel
from personae.kernels.stored import F32, U32

_IN_CACHE = 1 << 10
"""Entries that are summed at once in fp64."""
_WORD = 8
_ALL = U32(0xFFFF_FFFF)
"""The bits that stay of what is kept."""
_APART = 64
"""Products that are added to sums of their own, all at once: a register holds several."""


@kernel
def weighted_sum(deltas: ndarray, weights: ndarray, total: ndarray) -> None:
    """Σ_n w_n τ_n; every product and every sum is rounded once."""
    first, weight = deltas[0], weights[0]
    for i in range(total.size):
        total[i] = first[i] * weight
    for n in range(1, deltas.shape[0]):
        row, weight = deltas[n], weights[n]
        for i in range(total.size):
            total[i] += row[i] * weight


@kernel
def multi_task_vector(deltas: ndarray, total: ndarray) -> None:
    """Σ_n τ_n in fp64."""
    total[:] = 0.0
    for n in range(deltas.shape[0]):
        row = deltas[n]
        for i in range(total.size):
            total[i] += np.float64(row[i])


@kernel
def keep_marked(
    deltas: ndarray,
    thresholds: ndarray,
    at_least: int,
    scale: float,
    total: ndarray,
    merged: ndarray,
) -> None:
    """Scale · τ_MTL where |τ_n| > threshold_n · |τ_MTL - τ_n| for at least so many experts.

    In fp64: near a threshold, the order of experts must not decide.
    """
    marks = np.zeros(total.size, np.int32)
    for n in range(deltas.shape[0]):
        row, threshold = deltas[n], thresholds[n]
        for i in range(total.size):
            value = np.float64(row[i])
            marks[i] += abs(value) > abs(total[i] - value) * threshold
    for i in range(total.size):
        merged[i] = F32(total[i] * scale * np.float64(marks[i] >= at_least))


@kernel
def deviations(deltas: ndarray, found: ndarray) -> None:
    """The standard deviation of each entry over the experts, in fp64, rounded once."""
    experts, entries = deltas.shape
    means, totals = np.empty(_IN_CACHE), np.empty(_IN_CACHE)
    for start in range(0, entries, _IN_CACHE):
        wanted = found[start : start + _IN_CACHE]
        total = totals[: wanted.size]
        _squares_apart(deltas[:, start : start + _IN_CACHE], means, total)
        for i in range(total.size):
            wanted[i] = _deviation(total[i], experts)


@kernel
def keep_apart(deltas: ndarray, least: float) -> None:
    """Leave the entries of all experts whose squares apart reach `least`; 0 elsewhere.

    These are the squared differences from the entry's mean over the experts, added up, in fp64: the
    square of `deviations` times the number of experts.
    """
    experts, entries = deltas.shape
    means, totals = np.empty(_IN_CACHE), np.empty(_IN_CACHE)
    kept = np.empty(_IN_CACHE, np.uint32)
    for start in range(0, entries, _IN_CACHE):
        block = deltas[:, start : start + _IN_CACHE]
        total = totals[: block.shape[1]]
        _squares_apart(block, means, total)
        for i in range(total.size):
            kept[i] = _ALL if total[i] >= least else U32(0)
        for n in range(experts):
            row = block[n]
            for i in range(total.size):
                row[i] = as_number(as_bits(row[i]) & kept[i])


@kernel
def count_apart(deltas: ndarray, low: int, high: int, shift: int, counts: ndarray) -> None:
    """Count entries by their deviation as `count_magnitudes` does, and add up their squares.

    Entries whose deviation is 0 are passed over.

    Args:
        deltas: Of all experts, overwritten; fp32.
        low: The lowest pattern of a deviation that is looked at closely.
        high: The pattern above the last such.
        shift: log2 of the patterns in a bin.
        counts: Added to, fp64 (1 + expert, 2 + bins): how many entries there are, at or above
            `high`, and in each bin; for each expert the squares of those above, and in each bin.
    """
    experts, entries = deltas.shape
    low_, high_ = U32(max(low, 1)), U32(high)
    span = U32(high_ - low_)
    means, totals = np.empty(_IN_CACHE), np.empty(_IN_CACHE)
    patterns, inside = np.empty(_IN_CACHE, np.uint32), np.empty(_IN_CACHE, np.uint8)
    for start in range(0, entries, _IN_CACHE):
        block = deltas[:, start : start + _IN_CACHE]
        total = totals[: block.shape[1]]
        _squares_apart(block, means, total)
        some, above = np.int32(0), np.int32(0)
        inside[:] = 0
        for i in range(total.size):
            pattern = as_bits(_deviation(total[i], experts))
            patterns[i] = pattern
            some += pattern > U32(0)
            above += pattern >= high_
            inside[i] = U32(pattern - low_) < span
        counts[0, 0] += some
        counts[0, 1] += above
        marked = inside.view(np.uint64)
        for word in range(marked.size):
            if marked[word]:
                for i in range(word * _WORD, word * _WORD + _WORD):
                    if inside[i]:
                        place = 2 + (np.int64(patterns[i] - U32(low)) >> shift)
                        counts[0, place] += 1.0
                        for n in range(experts):
                            counts[1 + n, place] += np.float64(block[n, i]) * np.float64(
                                block[n, i]
                            )
        for i in range(total.size):
            patterns[i] = _ALL if patterns[i] >= high_ else U32(0)
        for n in range(experts):
            row = block[n]
            for i in range(total.size):
                row[i] = as_number(as_bits(row[i]) & patterns[i])
            counts[1 + n, 1] += _inner_product(row, row)


@kernel
def _squares_apart(deltas: ndarray, means: ndarray, total: ndarray) -> None:
    """Σ_n (τ_n - mean)² of each entry of a block; `means` is room for the means."""
    experts = deltas.shape[0]
    share = 1.0 / experts
    mean = means[: total.size]
    first = deltas[0]
    for i in range(total.size):
        mean[i] = np.float64(first[i])
    for n in range(1, experts):
        row = deltas[n]
        for i in range(total.size):
            mean[i] += np.float64(row[i])
    for i in range(total.size):
        mean[i] *= share
        apart = np.float64(first[i]) - mean[i]
        total[i] = apart * apart
    for n in range(1, experts):
        row = deltas[n]
        for i in range(total.size):
            apart = np.float64(row[i]) - mean[i]
            total[i] += apart * apart


@kernel
def _deviation(squares: float, experts: int) -> Any:
    """Of an entry with these squares apart, rounded once."""
    return F32(np.sqrt(squares * (1.0 / experts)))


@kernel
def add_inner_products(vectors: ndarray, gram: ndarray) -> None:
    """Add, of each row, the inner products of all models' vectors, in fp64.

    Args:
        vectors: Models' entries, (model, row, entry), fp32.
        gram: What is added to, (row, model, model), fp64.
    """
    models, rows, _ = vectors.shape
    for r in range(rows):
        for n in range(models):
            for m in range(n, models):
                total = _inner_product(vectors[n, r], vectors[m, r])
                gram[r, n, m] += total
                if n != m:
                    gram[r, m, n] += total


@kernel
def _inner_product(first: ndarray, second: ndarray) -> float:
    whole = first.size // _APART * _APART
    sums = np.zeros(_APART)
    for start in range(0, whole, _APART):
        left = first[start : start + _APART]
        right = second[start : start + _APART]
        for i in range(_APART):
            sums[i] += np.float64(left[i]) * np.float64(right[i])
    for i in range(whole, first.size):
        sums[i - whole] += np.float64(first[i]) * np.float64(second[i])
    total = 0.0
    for i in range(_APART):
        total += sums[i]
    return total
