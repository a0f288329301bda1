"""Which entries are marked: a bit each, or the gaps between them where that takes fewer bytes.

Both are one code (Golomb 1966, Rice 1979). The gap before each marked entry, g = q·2ᵏ + r, becomes
q zeros and a one, and r beside them in k bits. With k = 0 that is the mask itself, a bit an entry.
At a density of 3 % it takes 0.2 bits an entry, 2 % above the entropy.
"""

from math import log2

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from personae._types import Layout, Parts, PartSpec
from personae.errors import PackError
from personae.ops.bits import pack, pack_planes, packed_size, planes_size, unpack, unpack_planes
from personae.ops.parts import part


def encode_mask(mask: Bool[Tensor, " entry"]) -> Parts:
    """Code a mask in the fewest bytes.

    Returns:
        `mask`, uint8: a bit an entry, 1 for marked ones; or, with `gaps`, the q of each gap in
        unary. `gaps`, uint8: the r of each gap, as planes of bits; absent for k = 0. Nothing if
        nothing is marked.
    """
    marked = mask.nonzero().flatten()
    if not len(marked):
        return {}
    best, plain = 0, packed_size(len(mask), 1)
    skipped = torch.diff(marked, prepend=marked.new_full((1,), -1)) - 1
    for bits in _worth_trying(len(mask), len(marked)):
        size = _size(skipped, bits)
        best, plain = (bits, size) if size < plain else (best, plain)
    if not best:
        return {"mask": pack(mask.to(torch.uint8), 1)}
    ends = ((skipped >> best) + 1).cumsum(0) - 1
    unary = mask.new_zeros(int(ends[-1]) + 1, dtype=torch.uint8)
    unary[ends] = 1
    return {"mask": pack(unary, 1), "gaps": pack_planes(skipped & (1 << best) - 1, best)}


def decode_mask(parts: Parts, count: int) -> Int64[Tensor, " marked"]:
    """Undo `encode_mask` for a mask of `count` entries: the indices of those marked, ascending.

    Raises:
        PackError: if the parts fit no mask of so many entries.
    """
    if "gaps" not in parts:
        return unpack(part(parts, "mask"), count, 1).nonzero().flatten()
    unary = part(parts, "mask")
    ends = unpack(unary, 8 * len(unary), 1).nonzero().flatten()
    marked = len(ends)
    # No remainder is longer than an index: a longer one, from anybody's file, would overflow.
    bits = min(len(parts["gaps"]) // max(packed_size(marked, 1), 1), count.bit_length())
    quotients = torch.diff(ends, prepend=ends.new_full((1,), -1)) - 1
    skipped = (quotients << bits) + unpack_planes(parts["gaps"], marked, bits)
    if float((skipped + 1).sum(dtype=torch.float64)) > count:
        raise PackError(
            f"A mask marks entries beyond the {count} there are. The task file is damaged or was "
            "coded for another shape: fetch or write it again."
        )
    return (skipped + 1).cumsum(0) - 1


def mask_layout(count: int) -> Layout:
    """The parts of a mask of `count` entries.

    Gaps stand only where both parts together take less than a bit an entry.
    """
    bits = PartSpec(torch.uint8, 1, packed_size(count, 1))
    return {"mask": bits, "gaps": bits._replace(optional=True)}


def mask_size(count: int, marked: int) -> int:
    """Most bytes that a mask of `count` entries takes of which at most `marked` are marked."""
    if not marked:
        return 0
    bounds = [
        packed_size(marked + (count - marked >> bits), 1) + planes_size(marked, bits)
        for bits in _worth_trying(count, marked)
    ]
    return min(packed_size(count, 1), *bounds) if bounds else packed_size(count, 1)


def _worth_trying(count: int, marked: int) -> range:
    """Values of k about the best one: remainders as long as the mean gap."""
    near = int(log2(count / marked))
    return range(max(near - 1, 1), near + 2) if 2 * marked < count else range(0)


def _size(skipped: Int64[Tensor, " marked"], bits: int) -> int:
    """Bytes of the code with remainders of so many bits."""
    unary = int((skipped >> bits).sum()) + len(skipped)
    return packed_size(unary, 1) + planes_size(len(skipped), bits)
