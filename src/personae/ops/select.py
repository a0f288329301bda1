"""Exact selection by magnitude over a stream, without sorting and (nearly) without counting.

Without its sign bit an fp32 number, read as an integer, orders as its magnitude does: its pattern.
A sample guesses a window of patterns that holds the k-th largest. One pass then counts the
entries above the window and, of those few inside it, each pattern (each bin of patterns if it is
wide). That gives the k-th exactly, or a narrower window, or tells that the guess was wrong and on
which side to look again. Counts are integers: they can be added over tensors in any order.
All values must be finite.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt32
from numpy import ndarray
from torch import Tensor

from personae.errors import MethodError

TOP = 0x7F80_0000
"""The pattern of infinity, above that of every finite magnitude."""
MOST_PATTERNS = 1 << 17
"""Patterns of a window that are counted one by one; in a wider one that waits for the next pass,
and few bins are cheaper to add up."""
SAMPLE_BINS = 1 << 14
SLACK = 6.0
"""Standard deviations of a sampled rank that the guessed window reaches to either side: rows of a
tensor are not alike, so that their sample is worse than one of independent entries."""

_COARSE_BITS = 12
SAMPLE_SHIFT = 14  # a sampled bin: 2^14 patterns, 512 to the octave
SAMPLE_FLOOR = (127 - 32) << 23  # the pattern of 2^-32: bins reach from there to 1
_CHUNK = 1 << 18
_STEP = 64
_FEW = 1 << 14  # entries of which none needs to be sampled
_MOST_HELD = 1 << 20  # patterns of a window that are sorted; of more the window is narrowed


class Window(NamedTuple):
    """The patterns low ≤ pattern < high, counted in bins of 2^shift; `most` of them one by one."""

    low: int
    high: int
    most: int = MOST_PATTERNS

    @property
    def shift(self) -> int:
        """log2 of the patterns in a bin."""
        patterns = self.high - self.low
        return 0 if patterns <= self.most else (patterns - 1).bit_length() - _COARSE_BITS

    @property
    def bins(self) -> int:
        """How many bins it has, the last one maybe cut short."""
        return -(-(self.high - self.low) >> self.shift)

    @property
    def found(self) -> bool:
        """Whether it is one pattern, that of the k-th largest magnitude."""
        return self.high - self.low == 1

    @property
    def magnitude(self) -> float:
        """The lowest magnitude in it."""
        return float(np.uint32(self.low).view(np.float32))


def kept_count(numel: int, density: float) -> int:
    """Entries that a density keeps of `numel`: rounded down as the papers' codes do, at least 1.

    The 1e-9 undoes products such as 0.29 * 100 = 28.999…; an empty tensor keeps none.
    """
    return min(numel, max(1, math.floor(density * numel + 1e-9)))


def sample_counts(entries: Float[Tensor, "..."]) -> Int64[Tensor, " bins"]:
    """Coarse histogram of magnitudes, for `guess`: 512 bins an octave from 2^-32 to 1."""
    counts = np.zeros(SAMPLE_BINS, np.int64)
    for patterns in _patterns(entries):
        bins = np.maximum(patterns, SAMPLE_FLOOR).astype(np.int64)
        bins = np.minimum((bins - SAMPLE_FLOOR) >> SAMPLE_SHIFT, SAMPLE_BINS - 1)
        counts += np.bincount(bins, minlength=SAMPLE_BINS)
    return torch.from_numpy(counts)


def guess(counts: Int64[Tensor, " bins"], density: float, most: int = MOST_PATTERNS) -> Window:
    """Window around the magnitude that this fraction of a sample reaches.

    Its low end is that of a bin: differences of bf16 weights are round numbers, heaped there.
    """
    at_least = counts.numpy()[::-1].cumsum()  # bins from the top
    sampled = int(at_least[-1])
    rank = density * sampled
    slack = SLACK * math.sqrt(rank * (1 - density)) + 1
    low, high = 0, TOP
    if rank + slack < sampled:
        low = _edge(int(np.searchsorted(at_least, rank + slack)) + 1)
    if rank - slack > 0:
        index = int(np.searchsorted(at_least, rank - slack))
        inside = int(counts[SAMPLE_BINS - 1 - index])
        deeper = (at_least[index] - (rank - slack)) / inside
        bottom = _edge(index + 1)
        high = bottom + math.ceil((_edge(index) - bottom) * deeper) + 1
    return Window(low, min(high, TOP), most)


def count_magnitudes(
    entries: Float[Tensor, "..."], window: Window, bins: int
) -> Int64[Tensor, " counts"]:
    """How many entries there are, how many lie above the window, and in each of its bins.

    Args:
        entries: Of fp32 or narrower, finite.
        window: Where to look closely.
        bins: At least `window.bins`; the rest stays 0.

    Returns:
        int64: entries, entries at or above `window.high`, then a count for each bin.
    """
    counts = np.zeros(2 + bins, np.int64)
    counts[0] = entries.numel()
    for above, patterns in _inside(entries, window):
        counts[1] += above
        offsets = np.subtract(patterns, np.uint32(window.low), out=patterns)
        np.add.at(counts[2:], offsets >> np.uint32(window.shift), 1)
    return torch.from_numpy(counts)


def narrow(counts: Int64[Tensor, " counts"], window: Window, k: int) -> Window:
    """The bin of counts that holds the k-th largest (from 1), or the side of it to look on."""
    above, inside = int(counts[1]), counts[2:].numpy()
    if above >= k:
        return _beside(window, above=True)
    below = above + int(inside.sum()) - k  # of those inside, how many lie below the k-th
    if below < 0:
        return _beside(window, above=False)
    index = int(np.searchsorted(inside.cumsum(), below, side="right"))
    low = window.low + (index << window.shift)
    return window._replace(low=low, high=min(low + (1 << window.shift), window.high))


def kth_magnitude(tensor: Float[Tensor, "..."], k: int) -> tuple[float, int]:
    """Find the k-th largest magnitude (from 1, at most numel) of a tensor of fp32 or narrower.

    Returns:
        The magnitude, and how many of the entries that equal it are among the k largest.
    """
    entries = tensor.reshape(-1)
    assert 1 <= k <= len(entries), f"{k} of {len(entries)}"
    few = len(entries) <= _FEW
    window = Window(0, TOP) if few else guess(sample_counts(entries[::_STEP]), k / len(entries))
    while True:
        above, inside, found = 0, 0, list[ndarray]()
        for count, patterns in _inside(entries, window):
            above, inside = above + count, inside + len(patterns)
            found = [*found, patterns] if inside <= _MOST_HELD else []
        if not above < k <= above + inside:
            window = _beside(window, above >= k)
        elif window.found:
            return window.magnitude, k - above
        elif inside <= _MOST_HELD:
            break
        else:
            window = narrow(count_magnitudes(entries, window, window.bins), window, k)
    near = np.concatenate(found)
    place = above + len(near) - k
    near.partition(place)
    low = int(near[place])
    return Window(low, low + 1).magnitude, k - above - int(np.count_nonzero(near > low))


def largest(tensor: Float[Tensor, "*shape"], k: int) -> Bool[Tensor, "*shape"]:
    """Mark exactly k entries, those of largest magnitude; of equal ones the first in order.

    Args:
        tensor: fp32 or narrower.
        k: From 0 to numel.
    """
    if k == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    threshold, tied = kth_magnitude(tensor, k)
    pattern = np.float32(threshold).view(np.uint32)
    marked = np.empty(tensor.numel(), bool)
    start = 0
    for patterns in _patterns(tensor):
        np.greater_equal(patterns, pattern, out=marked[start : start + len(patterns)])
        start += len(patterns)
    if np.count_nonzero(marked) > k:
        equal = (tensor.abs().reshape(-1) == threshold).nonzero()[:, 0]
        marked[equal[tied:].cpu().numpy()] = False
    return torch.from_numpy(marked).reshape(tensor.shape).to(tensor.device)


def _inside(
    entries: Float[Tensor, "..."], window: Window
) -> Iterator[tuple[int, UInt32[ndarray, " near"]]]:
    """A chunk at a time: how many entries lie above the window, and the patterns in it."""
    for patterns in _patterns(entries):
        above = patterns >= np.uint32(window.high)
        inside = patterns >= np.uint32(window.low)
        inside ^= above
        yield int(np.count_nonzero(above)), patterns[inside]


def _beside(window: Window, above: bool) -> Window:
    """All that lies on one side of a window that missed.

    Raises:
        MethodError: if there is nothing above it but what is not finite.
    """
    if above and window.high >= TOP:
        raise MethodError(
            "Magnitudes that are compared exceed the range of float32, although the models are "
            "finite. Give smaller weights, or densities that are not as small."
        )
    return (
        window._replace(low=window.high, high=TOP)
        if above
        else window._replace(low=0, high=window.low)
    )


def _edge(index: int) -> int:
    """Upper end of a sampled bin, counted from the top; the outermost bins reach to the ends."""
    if index == 0:
        return TOP
    return 0 if index == SAMPLE_BINS else SAMPLE_FLOOR + ((SAMPLE_BINS - index) << SAMPLE_SHIFT)


def _patterns(entries: Float[Tensor, "..."]) -> Iterator[ndarray]:
    """The patterns, a chunk at a time, in an array (uint32) that may be overwritten."""
    assert entries.dtype.itemsize <= 4, "magnitudes are selected in fp32"
    room = np.empty(_CHUNK, np.uint32)
    for chunk in entries.detach().reshape(-1).split(_CHUNK):
        bits = chunk.float().cpu().view(torch.int32).numpy().view(np.uint32)
        yield np.bitwise_and(bits, np.uint32(0x7FFF_FFFF), out=room[: len(bits)])
