"""Which entries are marked: a bit each, or the gaps between them where that takes fewer bytes.

Both are one code (Golomb 1966, Rice 1979). The gap before each marked entry, g = q·2ᵏ + r, becomes
q zeros and a one, and r beside them in k bits. With k = 0 that is the mask itself, a bit an entry.
At a density of 3 % it takes 0.2 bits an entry, 2 % above the entropy.
"""

from collections.abc import Iterator
from math import log2

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from personae._types import Layout, Parts, PartSpec
from personae.errors import PackError
from personae.ops.bits import (
    dtype_of_width,
    pack,
    pack_planes,
    packed_size,
    planes_size,
    unpack,
    unpack_planes,
)
from personae.ops.chunks import chunks
from personae.ops.parts import part


def encode_mask(mask: Bool[Tensor, " entry"]) -> Parts:
    """Code a mask in the fewest bytes.

    Returns:
        `mask`, uint8: a bit an entry, 1 for marked ones; or, with `gaps`, the q of each gap in
        unary. `gaps`, uint8: the r of each gap, as planes of bits; absent for k = 0. Nothing if
        nothing is marked.
    """
    marked = int(mask.count_nonzero())
    if not marked:
        return {}
    best, plain, length = 0, packed_size(len(mask), 1), 0
    tried = _worth_trying(len(mask), marked)
    unaries = dict.fromkeys(tried, marked)
    for skipped in _gaps(mask) if tried else ():
        for bits in tried:
            unaries[bits] += int((skipped >> bits).sum())
    for bits, unary_bits in unaries.items():
        size = packed_size(unary_bits, 1) + planes_size(marked, bits)
        best, plain, length = (bits, size, unary_bits) if size < plain else (best, plain, length)
    if not best:
        return {"mask": pack(mask.view(torch.uint8), 1)}
    unary = mask.new_zeros(length, dtype=torch.uint8)
    rests = mask.new_empty(marked, dtype=dtype_of_width(best))
    place = done = 0
    for skipped in _gaps(mask):
        ends = ((skipped >> best) + 1).cumsum(0) + (place - 1)
        unary[ends] = 1
        rests[done : done + len(ends)] = skipped & (1 << best) - 1
        place, done = int(ends[-1]) + 1, done + len(ends)
    return {"mask": pack(unary, 1), "gaps": pack_planes(rests, best)}


def decode_mask(parts: Parts, count: int) -> Bool[Tensor, " entry"]:
    """Undo `encode_mask` for a mask of `count` entries.

    Raises:
        PackError: if the parts fit no mask of so many entries.
    """
    if "gaps" not in parts:
        return unpack(part(parts, "mask"), count, 1).view(torch.bool)
    unary = unpack(part(parts, "mask"), 8 * len(part(parts, "mask")), 1).view(torch.bool)
    marked = int(unary.count_nonzero())
    # No remainder is longer than an index: a longer one, from anybody's file, would overflow.
    bits = min(len(parts["gaps"]) // max(packed_size(marked, 1), 1), count.bit_length())
    rests = unpack_planes(parts["gaps"], marked, bits)
    mask = torch.zeros(count, dtype=torch.bool, device=rests.device)
    place = done = 0
    for quotients in _gaps(unary):
        steps = (quotients << bits) + rests[done : done + len(quotients)] + 1
        if place + float(steps.sum(dtype=torch.float64)) > count:
            raise PackError(
                f"A mask marks entries beyond the {count} there are. The task file is damaged or "
                "was coded for another shape: fetch or write it again."
            )
        ends = steps.cumsum(0) + (place - 1)
        mask[ends] = True
        place, done = int(ends[-1]) + 1, done + len(ends)
    return mask


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


def _gaps(mask: Bool[Tensor, " entry"]) -> Iterator[Int64[Tensor, " marked"]]:
    """Entries skipped before each marked one, a chunk at a time; chunks without one are skipped."""
    start, last = 0, -1
    for (some,) in chunks(mask):
        marked = some.nonzero().flatten() + start
        start += len(some)
        if len(marked):
            yield torch.diff(marked, prepend=marked.new_full((1,), last)) - 1
            last = int(marked[-1])
