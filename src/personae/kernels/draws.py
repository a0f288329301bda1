"""Entries dropped at random, by the numbers of PCG64 as NumPy draws them, four in a word."""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import Number, kernel, multiply_add
from personae.kernels.stored import F32

U64 = np.uint64
_MULTIPLIER = U64(0x2360_ED05_1FC6_5DA4), U64(0x4385_DF64_9FCC_F645)


@kernel
def drop(row: ndarray, state: ndarray, skipped: int, kept: int, factor: Number) -> None:
    """Multiply what is kept by the factor, and everything else by 0.

    Args:
        row: Entries of one expert, overwritten; fp32.
        state: Of PCG64, state and increment, the upper half of each first: uint64 (4), advanced by
            as many words as are begun.
        skipped: Numbers of the first word that are passed over, 0 to 3.
        kept: An entry is kept if its number, of 16 bits, is below this.
        factor: fp32.
    """
    numbers = numbers_of(state, skipped, row.size)
    for i in range(row.size):
        row[i] = F32(1 if numbers[i] < kept else 0) * row[i] * factor


@kernel
def numbers_of(state: ndarray, skipped: int, count: int) -> ndarray:
    """So many numbers of 16 bits, uint16; see `drop`."""
    words = np.empty((skipped + count + 3) // 4, np.uint64)
    high, low, increment = state[0], state[1], (state[2], state[3])
    for word in range(words.size):
        high, low = multiply_add(high, low, _MULTIPLIER, increment)
        mixed, turn = high ^ low, high >> U64(58)
        words[word] = (mixed >> turn) | (mixed << ((U64(64) - turn) & U64(63)))
    state[0], state[1] = high, low
    return words.view(np.uint16)[skipped : skipped + count]
