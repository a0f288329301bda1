"""Small codes of any number of levels, as many to a byte as fit: digits of base `levels`.

A byte holds the codes c₀ … c_{p-1} as Σ cⱼ · levelsʲ, p the most for which levelsᵖ ≤ 256.
"""

from functools import cache

import torch
from jaxtyping import UInt8
from torch import Tensor

from personae.errors import PackError


def digits_of_byte(levels: int) -> int:
    """Codes that a byte holds."""
    count = 1
    while levels ** (count + 1) <= 256:
        count += 1
    return count


def digits_size(count: int, levels: int) -> int:
    """Bytes that so many codes take."""
    return -(-count // digits_of_byte(levels))


def pack_digits(codes: UInt8[Tensor, " element"], levels: int) -> UInt8[Tensor, " byte"]:
    """Pack codes below `levels`; places left in the last byte are 0."""
    assert codes.numel() == 0 or int(codes.max()) < levels, "a code exceeds its levels"
    count = digits_of_byte(levels)
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % count)).reshape(-1, count)
    packed = padded[:, 0].clone()
    for place in range(1, count):
        packed += padded[:, place] * levels**place
    return packed


def unpack_digits(
    packed: UInt8[Tensor, " byte"], count: int, levels: int
) -> UInt8[Tensor, " element"]:
    """Undo `pack_digits`: the first `count` codes; whatever the bytes are, they are in range.

    Raises:
        PackError: if the number of bytes is not what so many codes take.
    """
    if packed.numel() != digits_size(count, levels):
        raise PackError(
            f"{packed.numel()} bytes of codes, but {count} codes of {levels} levels take "
            f"{digits_size(count, levels)}. The task file is damaged: fetch or write it again."
        )
    table = _table(levels).to(packed.device)
    return table.index_select(0, packed.int()).flatten()[:count]


@cache
def _table(levels: int) -> UInt8[Tensor, "256 code"]:
    """The codes in each of the 256 bytes."""
    places = levels ** torch.arange(digits_of_byte(levels))
    return (torch.arange(256)[:, None] // places % levels).to(torch.uint8)
