"""Random numbers that depend on the entry alone: not on how rows are cut, nor on who draws first.

There is one stream for each (seed, tensor, expert), of PCG64; entry i of the tensor uses number i.
"""

import hashlib

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

DRAW_VALUES = 1 << 16
"""A draw is one of so many integers, all as likely; four come out of each word of PCG64."""
_DRAWS_IN_WORD = 4
_LOW = (1 << 64) - 1


def kept_values(density: float) -> int:
    """How many of the `DRAW_VALUES` values keep an entry: nearest to the density, at least 1."""
    return max(1, round(density * DRAW_VALUES))


class Draws:
    """The numbers of one expert's entries in one tensor."""

    def __init__(self, *, seed: int, name: str, expert: int) -> None:
        """Begin the stream.

        Args:
            seed: The recipe's.
            name: The tensor's.
            expert: The expert's place in the recipe.
        """
        digest = hashlib.sha256(f"{seed}/{expert}/{name}".encode()).digest()
        self._stream = np.random.PCG64(int.from_bytes(digest, "little"))
        self._first = self._stream.state
        self._word = -1
        self._state = np.empty(0, np.uint64)

    def at(self, start: int, count: int) -> tuple[UInt64[ndarray, "4"], int]:
        """The state from which the numbers of these entries are drawn, for `kernels.drop`.

        That has to draw them: entries that follow go on from the state where it left it.

        Args:
            start: Flat index, in the tensor, of the first entry.
            count: How many entries.

        Returns:
            State and increment of PCG64, and how many numbers of its next word are before theirs.
        """
        word, skipped = divmod(start, _DRAWS_IN_WORD)
        if word != self._word:
            self._state = self._after(word)
        self._word = word - (-(skipped + count) // _DRAWS_IN_WORD)
        return self._state, skipped

    def _after(self, word: int) -> UInt64[ndarray, "4"]:
        self._stream.state = self._first
        state = self._stream.advance(word).state["state"]
        halves = [half for key in ("state", "inc") for half in _halves(state[key])]
        return np.array(halves, np.uint64)


def _halves(wide: int) -> tuple[int, int]:
    return wide >> 64, wide & _LOW
