"""Peak memory of what is done with one tensor: plans add it up, and `--memory` bounds it.

Each figure is of what the code holds at once, from the dtypes in the headers, the codec and the
shape; files that are mapped are not memory.
"""

from collections.abc import Iterable, Sequence
from math import prod

from personae._types import TensorSpec
from personae.family.chunks import CHUNK_ENTRIES, rows_of
from personae.methods import Block, Codec
from personae.ops.chunks import chunk_bytes


def checking_bytes(spec: TensorSpec) -> int:
    """Of reading a tensor, looking for NaN and Inf, and its fingerprint; fp8 is looked at in fp32.

    The fingerprint is of the bytes as they were read.
    """
    return spec.nbytes + (4 * spec.numel if spec.dtype.itemsize == 1 and spec.is_floating else 0)


def delta_bytes(numel: int) -> int:
    """Of reading a delta: fp32, and on the way blocks of rows of both models."""
    return 4 * numel + 12 * min(numel, CHUNK_ENTRIES)


def scanning_bytes(spec: TensorSpec) -> int:
    """Of the first pass over a tensor of an adapter: as a model has it, then its delta."""
    return max(checking_bytes(spec), delta_bytes(spec.numel))


def comparing_bytes(reference: TensorSpec, experts: Iterable[TensorSpec]) -> int:
    """Of the first pass over a tensor of the reference, and over the same one of the experts.

    A block of rows of the reference, and of one expert at a time, as they are stored and in fp32,
    and their difference.
    """
    own = max((spec.dtype.itemsize for spec in experts), default=0)
    entries = max((rows.numel for rows in rows_of(reference)), default=0)
    return entries * (reference.dtype.itemsize + own + 12)


def sharing_bytes(numel: int, experts: int) -> int:
    """Of computing what all tasks share of one tensor: every delta, and the result."""
    return 4 * (experts + 1) * numel + max(12 * min(numel, CHUNK_ENTRIES), 2 * chunk_bytes(numel))


def coding_bytes(codecs: Sequence[Codec], spec: TensorSpec) -> int:
    """Of coding one tensor of an expert with each of the codecs, one after the other."""
    numel = spec.numel
    if codecs[0].treats(spec) != "code":  # a copy and what is decoded, if it is kept exact
        return max(delta_bytes(numel), 12 * numel + chunk_bytes(numel))
    blocks = codecs[0].blocks(spec) or (Block(0, 0, 1),)
    most = 0
    for block in blocks:
        shape = block.shape_in(spec.shape) if spec.shape else ()
        # A block of columns is copied, of the delta as of what is shared.
        cut_out = 4 * prod(shape) * (1 + codecs[0].shares) if block.axis else 0
        most = max(most, cut_out + max(codec.working_bytes(shape) for codec in codecs))
    return max(delta_bytes(numel), 4 * numel + most)


def rebuilding_bytes(codec: Codec, spec: TensorSpec, ranks: Sequence[int]) -> int:
    """Of adding a decoded delta to the reference's values, and casting the sum.

    Args:
        codec: What decodes it.
        spec: The reference's tensor.
        ranks: Of its blocks, as stored; none if it is not coded.
    """
    numel = spec.numel
    if not ranks:
        return 2 * spec.nbytes
    return (
        chunk_bytes(numel)
        + spec.nbytes
        + max(8 * numel, *(codec.decoding_bytes(spec.shape, rank) for rank in ranks))
    )
