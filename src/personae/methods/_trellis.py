"""Vectors as integers on a trellis in a code of fixed models (see `kernels.trellis`).

A model is what a Gaussian vector comes to at one step: how often which integer is found. Its
frequencies are integers, and so is all arithmetic that reads a code: it is the same everywhere.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae.errors import PackError

_TOTAL = 4096
"""What a model's frequencies add up to, each but that of 0 counted for both signs."""
_LEAST_STATE, _STATES_END = 1 << 23, 1 << 31
_LOSS = np.log2(1 + 2.0**-11)
"""Bits that a symbol may cost over the logarithm of its frequency, as the state is an integer."""
STATE_BYTES = 4
"""Bytes of a code beside its symbols: the last state."""
MOST_SYMBOL_BITS = 13
"""No symbol costs so much."""


class Model(NamedTuple):
    """How a vector is quantised and coded.

    Attributes:
        step: In standard deviations of the vector.
        weight: Squared steps that a bit has to save.
        kept: Share of a Gaussian's squared norm that it keeps.
        rate: Bits a number then takes.
        even: Of 4096, those of 0, 2, 4 …, negative ones as often, where the state has even numbers.
        odd: Of 0, 1, 3, 5 … where it has odd ones.
    """

    step: float
    weight: float
    kept: float
    rate: float
    even: tuple[int, ...]
    odd: tuple[int, ...]


MODELS = (
    Model(0.85, 0.5, 0.741, 1.09, (3236, 424, 5, 1), (28, 1980, 53, 1)),
    Model(0.75, 0.5, 0.807, 1.3, (2812, 625, 15, 1, 1), (2, 1926, 117, 3, 1)),
    Model(0.65, 0.45, 0.867, 1.56, (2356, 819, 49, 1, 1), (2, 1791, 244, 11, 1)),
    Model(0.55, 0.45, 0.91, 1.83, (1880, 968, 130, 8, 1, 1), (2, 1632, 380, 33, 1, 1)),
    Model(0.43, 0.45, 0.947, 2.22, (1472, 1000, 259, 46, 5, 1, 1), (2, 1313, 592, 125, 15, 1, 1)),
    Model(
        *(0.38, 0.4, 0.96, 2.41),
        (1304, 957, 344, 81, 9, 3, 1, 1),
        (2, 1159, 660, 177, 44, 5, 1, 1),
    ),
    Model(
        *(0.25, 0.45, 0.983, 3.03),
        (836, 755, 479, 236, 108, 39, 10, 1, 1, 1),
        (2, 790, 632, 389, 151, 55, 20, 7, 2, 1),
    ),
    Model(
        *(0.165, 0.45, 0.993, 3.63),
        (496, 528, 414, 345, 244, 128, 78, 32, 19, 6, 3, 1, 1, 1),
        (2, 547, 505, 404, 251, 154, 86, 49, 28, 11, 9, 1, 1, 1),
    ),
)
"""Found by `benchmarks/trellis_models.py`; readers hold them too, so that none may change."""
_STRETCHES = (0.88, 1.0, 1.15, 1.35)
"""Steps tried over those of the model: tails heavier than a Gaussian's want longer ones."""


def quantise(
    vector: Float[Tensor, " length"], model: int, worth: float, price: float
) -> tuple[Int8[Tensor, " length"], float]:
    """The integers of a vector that are worth most, and what they cost.

    Args:
        vector: fp32, on the CPU.
        model: Its place in `MODELS`.
        worth: What its direction would be worth if nothing was lost.
        price: Of a byte.

    Returns:
        The integers, not all 0 unless the vector is; and bytes, no fewer than they take.
    """
    values = vector.contiguous().numpy()
    bits, chosen = _bits()[model], MODELS[model]
    norm = float(np.square(values, dtype=np.float64).sum())
    step = chosen.step * (norm / max(len(values), 1)) ** 0.5
    best, found, cost = -np.inf, np.zeros(len(values), np.int8), 0.0
    while norm and not found.any():
        for stretch in _STRETCHES:
            path = np.empty(len(values), np.int8)
            path_bits = kernels.follow(values, stretch * step, chosen.weight, bits, path)
            integers = path.astype(np.float64)
            length = integers @ integers
            gain = worth * (integers @ values) ** 2 / (length * norm) if length else 0.0
            if length and gain - price * path_bits / 8 > best:
                best = gain - price * path_bits / 8
                found, cost = path, path_bits / 8
        step /= 2  # what was short beside the step came to nothing
    return torch.from_numpy(found), cost


class Writer:
    """Paths in one code; the last one is read first."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._codes: list[ndarray] = []
        self._state = np.array([_LEAST_STATE])

    def add(self, path: Int8[Tensor, " length"], model: int) -> None:
        """Code one more."""
        codes = np.empty(2 * len(path), np.uint8)
        filled = kernels.write_path(path.cpu().numpy(), _first()[model], self._state, codes)
        self._codes.append(codes[:filled].copy())

    def end(self) -> UInt8[Tensor, " byte"]:
        """The code."""
        state = self._state.astype("<u4").view(np.uint8)
        return torch.from_numpy(np.concatenate([*self._codes, state])[::-1].copy())


class Reader:
    """Paths from the last that was written to the first."""

    def __init__(self, codes: UInt8[Tensor, " byte"]) -> None:
        """Begin to read.

        Raises:
            PackError: if no code begins like this.
        """
        self._codes = codes.cpu().contiguous().numpy()
        if len(codes) < STATE_BYTES:
            raise self._damaged()
        state = int.from_bytes(self._codes[:STATE_BYTES].tobytes(), "big")
        self._place = np.array([state, STATE_BYTES])
        if not _LEAST_STATE <= state < _STATES_END:
            raise self._damaged()

    def read(self, length: int, model: int) -> Int8[Tensor, " length"]:
        """The next path; whatever the code is, it is one of this model."""
        path = np.empty(length, np.int8)
        kernels.read_path(self._codes, self._place, _first()[model], _symbols()[model], path)
        return torch.from_numpy(path)

    def end(self) -> None:
        """Nothing may be left.

        Raises:
            PackError: if the code is not one of just the paths that were read.
        """
        if self._place.tolist() != [_LEAST_STATE, len(self._codes)]:
            raise self._damaged()

    def _damaged(self) -> PackError:
        return PackError(
            f"Part 'codes' of {len(self._codes)} bytes is no code of its triplets. The task file "
            "is damaged: fetch or write it again."
        )


@cache
def _widths() -> ndarray:
    """Of 4096, those of each symbol of each model: (model, quantiser, symbol)."""
    most = max(len(model.even) for model in MODELS)
    widths = np.zeros((len(MODELS), 2, 2 * most - 1), np.int64)
    for place, model in enumerate(MODELS):
        for quantiser, (zero, *others) in enumerate((model.even, model.odd)):
            both = np.repeat(others, 2)
            widths[place, quantiser, : 1 + len(both)] = [zero, *both]
    return widths


@cache
def _first() -> ndarray:
    """Where each symbol begins, and 4096."""
    return np.pad(_widths().cumsum(axis=-1), ((0, 0), (0, 0), (1, 0)))


@cache
def _symbols() -> ndarray:
    """The symbol of each of 4096: (model, quantiser, place)."""
    names = np.arange(_widths().shape[-1], dtype=np.uint8)
    return np.array([[np.repeat(names, row) for row in rows] for rows in _widths()])


@cache
def _bits() -> list[ndarray]:
    """Of each model what 0, ±1, ±2 … of either quantiser cost at most."""
    tables = [np.array([model.even, model.odd], float) for model in MODELS]
    return [np.log2(_TOTAL / table) + _LOSS for table in tables]
