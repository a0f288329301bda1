"""Random masks that depend on the entry alone: not on how rows are cut, nor on who draws first."""

import hashlib

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

DRAW_VALUES = 1 << 16
"""A draw is one of so many integers, all as likely; four come out of each word of PCG64."""
_DRAWS_IN_WORD = 4


def kept_values(density: float) -> int:
    """How many of the `DRAW_VALUES` values keep an entry: nearest to the density, at least 1."""
    return max(1, round(density * DRAW_VALUES))


def keep_mask(
    kept: int, start: int, count: int, *, seed: int, name: str, expert: int
) -> Bool[ndarray, " entry"]:
    """Keep each entry with probability kept / `DRAW_VALUES`, independently.

    There is one stream of draws for each (seed, name, expert); entry i of the tensor uses draw i.

    Args:
        kept: As `kept_values` gives it.
        start: Flat index, in the tensor, of the first entry.
        count: How many entries.
        seed: The recipe's.
        name: The tensor's.
        expert: The expert's place in the recipe.
    """
    digest = hashlib.sha256(f"{seed}/{expert}/{name}".encode()).digest()
    stream = np.random.PCG64(int.from_bytes(digest, "little"))
    word, skipped = divmod(start, _DRAWS_IN_WORD)
    stream.advance(word)
    words = stream.random_raw(-(-(skipped + count) // _DRAWS_IN_WORD))
    draws = words.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]
    return draws < kept
