"""The quantiser of DTS: every value becomes its sign and a magnitude level.

Within a set (a matrix, a vector) the positive and the negative values are each split into a
small and a large half, and each of these groups is given one scale (arXiv:2512.01461, thresholding
and scaling). A code holds its group: bit 0 is set for negative values, bit 1 for large ones.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from personae.ops.chunks import CHUNK, by_chunks, keep_first
from personae.ops.select import kth_magnitude

Split = Literal["rank", "median", "none"]
"""How a sign is split: exact halves, strictly above the median, or not at all (one bit a code)."""

Scales = Literal["rms", "mean", "one"]
"""What stands for a group: the root mean square of its values, their mean magnitude, or 1."""

_CHUNK = 1 << 18
"""Values in fp64 at a time."""


class Levels(NamedTuple):
    """Group codes, and the scale (a magnitude, 0 if empty) of group `code` at `scales[:, code]`."""

    codes: UInt8[Tensor, "set element"]
    scales: Float[Tensor, "set group"]


def groups(split: Split) -> int:
    """Number of groups, hence of scales, in a set."""
    return 2 if split == "none" else 4


def quantise(sets: Float[Tensor, "set element"], *, split: Split, scales: Scales) -> Levels:
    """Code every value by the group it is in; each row is a set with scales of its own.

    Exact zeros are in no group: they have code 0 and no influence on any scale, and the caller
    has to note where they are.

    Args:
        sets: fp32 values.
        split: How the values of one sign are split into small and large.
        scales: What stands for a group.
    """
    codes = (sets < 0).view(torch.uint8)
    sizes = sets.new_zeros(len(sets), groups(split))
    for values, code, size in zip(sets, codes, sizes, strict=True):
        for negative in (0, 1):
            _quantise_sign(values, negative, code, size, split, scales)
    return Levels(codes, sizes)


def _quantise_sign(
    values: Float[Tensor, " element"],
    negative: int,
    code: UInt8[Tensor, " element"],
    size: Float[Tensor, " group"],
    split: Split,
    scales: Scales,
) -> None:
    """Fill in what the values of one sign come to."""
    sign = -1 if negative else 1  # values of the other one become 0
    magnitudes = by_chunks(lambda part: (sign * part).clamp_(min=0), values.dtype, values)
    large = upper_half(magnitudes, split)
    size[negative] = _scale(magnitudes, (magnitudes > 0) ^ large, scales)
    if split != "none":
        size[negative + 2] = _scale(magnitudes, large, scales)
        code |= large.view(torch.uint8) << 1


def dequantise(levels: Levels) -> Float[Tensor, "set element"]:
    """Put its signed scale in the place of every code."""
    values = levels.scales.new_empty(levels.codes.shape)
    for row, codes, of_code in zip(values, levels.codes, signed(levels.scales), strict=True):
        for target, part in zip(row.split(CHUNK), codes.split(CHUNK), strict=True):
            torch.index_select(of_code, 0, part.int(), out=target)
    return values


def signed(scales: Float[Tensor, "*set group"]) -> Float[Tensor, "*set group"]:
    """What the codes of a set stand for: its scales, with their signs."""
    values = scales.clone()
    values[..., 1::2].neg_()
    return values


def upper_half(magnitudes: Float[Tensor, " element"], split: Split) -> Bool[Tensor, " element"]:
    """Mark the large ones among the n magnitudes that are not 0.

    `rank` marks exactly `⌊n/2⌋`; of equal magnitudes at the boundary, those first in index order.
    `median` marks all strictly above the median: fewer, if equal magnitudes lie across the
    boundary. `none` marks none.
    """
    half = int((magnitudes > 0).count_nonzero()) // 2
    if split == "none" or half == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    least, tied = kth_magnitude(magnitudes, half)
    large = magnitudes > least
    ties = magnitudes == least
    # With more ties than places among the upper half, the median is one of them.
    if split == "rank" or int(ties.count_nonzero()) == tied:
        keep_first(ties, tied)
        large |= ties
    return large


def _scale(
    magnitudes: Float[Tensor, " element"], group: Bool[Tensor, " element"], scales: Scales
) -> float:
    """The scale of the magnitudes marked; fp64 inside, so that neither squares nor sums lose."""
    if scales == "one":
        return 1.0
    total = 0.0
    for values, members in zip(magnitudes.split(_CHUNK), group.split(_CHUNK), strict=True):
        exact = (values * members).double()
        total += float(exact.sum() if scales == "mean" else exact @ exact)
    mean = total / max(int(group.count_nonzero()), 1)
    return mean if scales == "mean" else math.sqrt(mean)
