"""Small codes packed into bytes: 4 two-bit or 8 one-bit codes a byte, lowest bits first.

Codes of any width are packed as planes: all lowest bits, padded to a byte, then all next ones.
"""

from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

from personae.errors import PackError
from personae.ops.chunks import CHUNK, by_chunks, chunks

Width = Literal[1, 2]
"""Bits a code takes."""


def packed_size(count: int, width: Width) -> int:
    """Bytes that `count` codes take, the last byte padded."""
    return -(-count * width // 8)


def pack(codes: UInt8[Tensor, " element"], width: Width) -> UInt8[Tensor, " byte"]:
    """Pack codes below `2**width`; code `i` starts at bit `i * width % 8` of its byte.

    Returns:
        `packed_size(len(codes), width)` bytes; the unused high bits of the last one are 0.
    """
    assert codes.numel() == 0 or int(codes.max()) < 1 << width, "a code exceeds its width"
    per_byte = 8 // width
    padding = -codes.numel() % per_byte
    if padding:
        codes = torch.cat([codes, codes.new_zeros(padding)])
    columns = codes.reshape(-1, per_byte).unbind(dim=1)
    packed = columns[0].clone()
    for place, column in enumerate(columns[1:], 1):
        packed |= column << (place * width)
    return packed


def unpack(packed: UInt8[Tensor, " byte"], count: int, width: Width) -> UInt8[Tensor, " element"]:
    """Undo `pack`: the first `count` codes.

    Raises:
        PackError: if the number of bytes is not what `count` codes take.
    """
    _check_size(packed, count, width)
    return _looked_up(packed, _table(width).to(packed.device))[:count]


def unpack_values(
    packed: UInt8[Tensor, " byte"], count: int, width: Width, values: Float[Tensor, " code"]
) -> Float[Tensor, " element"]:
    """`values[unpack(packed, count, width)]`, in one step.

    Raises:
        PackError: if the number of bytes is not what `count` codes take.
    """
    _check_size(packed, count, width)
    return _looked_up(packed, values[_table(width).to(packed.device).int()])[:count]


def planes_size(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take as planes."""
    return width * packed_size(count, 1)


def pack_planes(codes: Integer[Tensor, " element"], width: int) -> UInt8[Tensor, " byte"]:
    """Pack codes below `2**width`, one plane of bits after the other, lowest bits first."""
    assert codes.numel() == 0 or int(codes.max()) < 1 << width, "a code exceeds its width"
    planes = [
        pack(by_chunks(lambda part, place=place: part >> place & 1, torch.uint8, codes), 1)
        for place in range(width)
    ]
    return torch.cat(planes) if planes else codes.new_zeros(0, dtype=torch.uint8)


def dtype_of_width(width: int) -> torch.dtype:
    """The narrowest dtype that holds codes of so many bits."""
    return torch.uint8 if width <= 8 else torch.int32 if width < 32 else torch.int64


def unpack_planes(
    packed: UInt8[Tensor, " byte"], count: int, width: int
) -> Integer[Tensor, " element"]:
    """Undo `pack_planes`, in the narrowest dtype.

    Raises:
        PackError: if the number of bytes is not what `count` codes take.
    """
    if packed.numel() != planes_size(count, width):
        raise PackError(
            f"{packed.numel()} bytes of codes, but {count} codes of {width} bits take "
            f"{planes_size(count, width)}. The task file is damaged: fetch or write it again."
        )
    codes = torch.zeros(count, dtype=dtype_of_width(width), device=packed.device)
    for place, plane in enumerate(packed.split(max(packed_size(count, 1), 1))):
        for target, bits in chunks(codes, unpack(plane, count, 1)):
            target |= bits.to(codes.dtype) << place
    return codes


def _check_size(packed: UInt8[Tensor, " byte"], count: int, width: Width) -> None:
    """Check that there are as many bytes as so many codes take.

    Raises:
        PackError: if not.
    """
    if packed.numel() != packed_size(count, width):
        raise PackError(
            f"{packed.numel()} bytes of codes, but {count} codes of {width} bit take "
            f"{packed_size(count, width)}. The task file is damaged: fetch or write it again."
        )


def _looked_up(
    packed: UInt8[Tensor, " byte"], table: Shaped[Tensor, "256 code"]
) -> Shaped[Tensor, " element"]:
    """What each byte stands for, one after the other."""
    found = table.new_empty(len(packed), table.shape[1])
    for target, part in zip(found.split(CHUNK), packed.split(CHUNK), strict=True):
        torch.index_select(table, 0, part.int(), out=target)
    return found.flatten()


@cache
def _table(width: Width) -> UInt8[Tensor, "256 code"]:
    """The codes in each of the 256 bytes."""
    places = torch.arange(0, 8, width)
    return (torch.arange(256)[:, None] >> places & (1 << width) - 1).to(torch.uint8)
