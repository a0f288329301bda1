"""Exact zeros among coded values, whose codes have no room for them: a plane of bits, or positions.

A solver now and then leaves one exact zero in a singular vector; a position costs 4 bytes there,
where a plane would cost a bit for every value.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae._types import Layout, Parts, PartSpec
from personae.errors import PackError
from personae.ops.bits import pack, packed_size, unpack
from personae.ops.parts import cut

_POSITION_BYTES = 4
_LAST_POSITION = torch.iinfo(torch.int32).max


def encode_zeros(factors: Sequence[Float[Tensor, "..."]]) -> Parts:
    """Say where exact zeros stand, by whichever takes fewer bytes; nothing if there are none.

    Returns:
        {}; or `zeros`, uint8: a bit a value, each factor padded to a byte; or `zero_positions`,
        int32: ascending indices into the values of all factors, one after the other.
    """
    masks = [(factor == 0).flatten() for factor in factors]
    count = sum(int(mask.count_nonzero()) for mask in masks)
    if not count:
        return {}
    plane_bytes = sum(packed_size(len(mask), 1) for mask in masks)
    values = sum(len(mask) for mask in masks)
    if count * _POSITION_BYTES < plane_bytes and values <= _LAST_POSITION:
        return {"zero_positions": torch.cat(masks).nonzero().flatten().to(torch.int32)}
    return {"zeros": torch.cat([pack(mask.to(torch.uint8), 1) for mask in masks])}


def zeros_layout(least: Sequence[int], most: Sequence[int]) -> Layout:
    """The parts of zeros in factors with at least, and at most, so many values each."""
    fewest, largest = (sum(packed_size(count, 1) for count in each) for each in (least, most))
    return {
        "zeros": PartSpec(torch.uint8, fewest, largest, optional=True),
        "zero_positions": PartSpec(torch.int32, 1, (largest - 1) // _POSITION_BYTES, optional=True),
    }


def decode_zeros(parts: Parts, counts: Sequence[int]) -> list[Bool[Tensor, " _"] | None]:
    """Masks of the exact zeros of factors with so many values each; None for a factor without.

    Raises:
        PackError: if the parts fit no factors of so many values.
    """
    if "zeros" in parts:
        planes = cut(parts, "zeros", [packed_size(count, 1) for count in counts])
        return [unpack(plane, count, 1).bool() for plane, count in zip(planes, counts, strict=True)]
    if "zero_positions" not in parts:
        return [None] * len(counts)
    positions, values = parts["zero_positions"].long(), sum(counts)
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < values:
        raise PackError(
            f"Part 'zero_positions' names values beyond the {values} there are. The task file is "
            "damaged or was coded for another shape: fetch or write it again."
        )
    whole = torch.zeros(values, dtype=torch.bool, device=positions.device)
    whole[positions] = True
    return list(whole.split(list(counts)))
