"""Integers on a trellis, and their entropy code: trellis-coded quantisation and range ANS.

An integer comes from one of two quantisers: the even numbers, or the odd ones and 0. Which one
follows from the integers before it (see `_NEXT`), so that each has twice the step of both together,
and a path of integers fills space better than a grid does (Marcellin and Fischer, 1990). Integer
number k of a quantiser q is 2k - q for k > 0, and so with the other sign; k = 0 is 0. Symbol 0 is
0, symbol 2k - 1 is positive and 2k negative.

The code is range ANS (Duda, 2013) by bytes: a state of 31 bits, frequencies that add up to 4096.
"""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import kernel

_STATES = 4
_NEXT = np.array([[0, 2], [2, 0], [1, 3], [3, 1]])
"""The state after an even or odd k. States 0 and 1 have the even integers."""
_BITS = 12
_LEAST = 1 << 23
"""The state's least value; it begins with it, and has it again when all is read."""
_FAR = 1e300


@kernel
def follow(values: ndarray, step: float, weight: float, bits: ndarray, path: ndarray) -> float:
    """The path of least squared error + weight · bits, in units of the step (Viterbi).

    Args:
        values: fp32.
        step: Distance of the integers.
        weight: What a bit costs.
        bits: Of symbols of ±k: (quantiser, k).
        path: Filled with the integers; int8.

    Returns:
        The bits of the path.
    """
    most = bits.shape[1] - 1
    ranks = np.empty((values.size, 2, 2), np.uint8)
    came = np.empty((values.size, _STATES), np.uint8)  # 2 · state before + parity of k
    costs, next_costs = np.full(_STATES, _FAR), np.empty(_STATES)
    costs[0] = 0.0
    least = np.empty((2, 2))
    for i in range(values.size):
        size = abs(np.float64(values[i])) / step
        for q in range(2):
            least[q, 0], least[q, 1] = size * size + weight * bits[q, 0], _FAR
            ranks[i, q, 0] = 0
            lower = max(1, int(min((size + q) / 2, most - 1.0)))
            for k in range(lower, lower + 2):
                off = size - (2 * k - q)
                cost = off * off + weight * bits[q, k]
                if cost < least[q, k & 1]:
                    least[q, k & 1] = cost
                    ranks[i, q, k & 1] = k
        next_costs[:] = _FAR
        for state in range(_STATES):
            for odd in range(2):
                cost = costs[state] + least[state >> 1, odd]
                after = _NEXT[state, odd]
                if cost < next_costs[after]:
                    next_costs[after] = cost
                    came[i, after] = 2 * state + odd
        costs[:] = next_costs
    last, total = np.int64(np.argmin(costs)), 0.0
    for i in range(values.size - 1, -1, -1):
        edge = np.int64(came[i, last])
        last, odd = edge >> 1, edge & 1
        q = last >> 1
        k = np.int64(ranks[i, q, odd])
        integer = 2 * k - q if k else 0
        path[i] = integer if values[i] >= 0 else -integer
        total += bits[q, k]
    return total


@kernel
def write_path(path: ndarray, first: ndarray, state: ndarray, codes: ndarray) -> int:
    """Code a path; it is read before those that were written before it.

    Args:
        path: Integers; int8.
        first: Where symbols begin among 4096: (quantiser, symbol), and 4096 at the end.
        state: Of the code; int64, moved on.
        codes: Filled, in the order from the last to the first; two bytes an integer are enough.

    Returns:
        How many bytes were filled.
    """
    symbols, quantisers = np.empty(path.size, np.uint8), np.empty(path.size, np.uint8)
    at = 0
    for i in range(path.size):
        q, value = at >> 1, np.int64(path[i])
        k = (abs(value) + q) >> 1
        symbols[i] = 2 * k - (value > 0)
        quantisers[i] = q
        at = _NEXT[at, k & 1]
    x, filled = state[0], 0
    for i in range(path.size - 1, -1, -1):
        begins = first[quantisers[i]]
        start = np.int64(begins[symbols[i]])
        width = np.int64(begins[symbols[i] + 1]) - start
        while x >= width << (31 - _BITS):
            codes[filled] = x & 255
            filled += 1
            x >>= 8
        x = (x // width << _BITS) + x % width + start
    state[0] = x
    return filled


@kernel
def read_path(
    codes: ndarray, place: ndarray, first: ndarray, symbols: ndarray, path: ndarray
) -> None:
    """Read the next path; whatever the bytes are, it is one of the model.

    Args:
        codes: uint8.
        place: State and byte, int64; moved on.
        first: Of the path's model: (quantiser, symbol).
        symbols: The symbol of each of 4096: (quantiser, place).
        path: Filled; int8.
    """
    x, at = place[0], place[1]
    state = 0
    for i in range(path.size):
        q, slot = state >> 1, x & ((1 << _BITS) - 1)
        symbol = np.int64(symbols[q, slot])
        start = np.int64(first[q, symbol])
        x = (np.int64(first[q, symbol + 1]) - start) * (x >> _BITS) + slot - start
        while x < _LEAST and at < codes.size:
            x = x << 8 | np.int64(codes[at])
            at += 1
        k = (symbol + 1) >> 1
        size = 2 * k - q if k else 0
        path[i] = size if symbol & 1 else -size
        state = _NEXT[state, k & 1]
    place[0], place[1] = x, at
