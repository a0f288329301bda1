"""The words shared by every layer: tensor descriptions and bounded numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

Density = Annotated[float, Field(gt=0, le=1)]
"""Fraction of entries kept, in (0, 1]; never sparsity, never percent."""

RankFraction = Annotated[float, Field(gt=0, le=1)]
"""Singular directions kept as a fraction of min(m, d), in (0, 1]: r of DTS."""


def in_range(number: float) -> bool:
    """Whether a number is finite in float32, in which models are computed."""
    return abs(number) <= torch.finfo(torch.float32).max


Characteristics = Mapping[str, str | Sequence[str]]
"""Task name to what the task is about: class names, or a description."""

Parts = dict[str, Tensor]
"""What a codec stores for one tensor: part name to a 1-D tensor (uint8, int32 or floating)."""


class PartSpec(NamedTuple):
    """What a codec declares of one part before it is read: its dtype, and its number of elements.

    A number is a range where it depends on the values coded; `optional` parts may be missing.
    """

    dtype: torch.dtype
    least: int
    most: int
    optional: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype, count: int) -> "PartSpec":
        """A part of just so many elements."""
        return cls(dtype, count, count)


Layout = dict[str, PartSpec]
"""The parts that a block may have, by name."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations and recipes write it, such as 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of one tensor, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values at this dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Its dtype as configurations write it."""
        return dtype_name(self.dtype)

    @property
    def is_floating(self) -> bool:
        """Whether this is a parameter (floating) rather than an integer buffer."""
        return self.dtype.is_floating_point


class SVD(NamedTuple):
    """A truncated singular value decomposition, `matrix ≈ u @ diag(singular_values) @ vh`.

    Shapes: u (m, k), singular_values (k,) descending, vh (k, d); fp32.
    """

    u: Float[Tensor, "out rank"]
    singular_values: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank in"]
