"""Exact selection by magnitude, without sorting: count the bits of the magnitudes.

Without its sign bit an fp32 number, read as an integer, orders as its magnitude does. Counting how
often each value of the 16 high bits occurs finds the bin of the k-th largest; counting the 15 low
bits inside that bin finds it exactly. Counts are integers, so they can be gathered over tensors in
a stream, in any order. All values must be finite.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

_LOW_BITS = 15
HIGH_BINS = 1 << 16
LOW_BINS = 1 << _LOW_BITS
_CHUNK = 1 << 18


def kept_count(numel: int, density: float) -> int:
    """Entries that a density keeps of `numel`: rounded down as the papers' codes do, at least 1.

    The 1e-9 undoes products such as 0.29 * 100 = 28.999…; an empty tensor keeps none.
    """
    return min(numel, max(1, math.floor(density * numel + 1e-9)))


def count_high(counts: Int64[Tensor, "65536"], tensor: Float[Tensor, "..."]) -> None:
    """Add, in place, how often each value of the high magnitude bits occurs in the tensor."""
    for bits in _magnitude_bits(tensor):
        _count(counts, bits >> _LOW_BITS)


def count_low(counts: Int64[Tensor, "32768"], tensor: Float[Tensor, "..."], high: int) -> None:
    """Add, in place, the counts of the low bits of those entries whose high bits are `high`."""
    for bits in _magnitude_bits(tensor):
        _count(counts, bits[bits >> _LOW_BITS == high] & (LOW_BINS - 1))


def find_bin(counts: Int64[Tensor, " bins"], k: int) -> tuple[int, int]:
    """Find the k-th largest (from 1): its bin, and its rank (from 1) among those in that bin."""
    at_least = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(at_least, k))
    found = len(counts) - 1 - steps
    return found, k - int(at_least[steps] - counts[found])


def magnitude(high: int, low: int) -> float:
    """Rebuild the fp32 magnitude with these high and low bits."""
    bits = torch.tensor(high << _LOW_BITS | low, dtype=torch.int32)
    return bits.view(torch.float32).item()


def kth_magnitude(tensor: Float[Tensor, "..."], k: int) -> tuple[float, int]:
    """Find the k-th largest magnitude (from 1, at most numel) of a tensor of fp32 or narrower.

    Returns:
        The magnitude, and how many of the entries that equal it are among the k largest.
    """
    high_counts = torch.zeros(HIGH_BINS, dtype=torch.int64, device=tensor.device)
    count_high(high_counts, tensor)
    high, rank = find_bin(high_counts, k)
    low_counts = torch.zeros(LOW_BINS, dtype=torch.int64, device=tensor.device)
    count_low(low_counts, tensor, high)
    low, tied = find_bin(low_counts, rank)
    return magnitude(high, low), tied


def _magnitude_bits(tensor: Float[Tensor, "..."]) -> Iterator[Int32[Tensor, " chunk"]]:
    """The 31 magnitude bits as integers, a chunk at a time so that no full copy is made."""
    assert tensor.dtype.itemsize <= 4, "magnitudes are selected in fp32"
    for chunk in tensor.reshape(-1).split(_CHUNK):
        yield chunk.float().view(torch.int32) & 0x7FFFFFFF


def _count(counts: Int64[Tensor, " bins"], bins: Int32[Tensor, " chunk"]) -> None:
    index = bins.long()
    counts.scatter_add_(0, index, torch.ones_like(index))
