"""What entry-wise methods share: sums, thresholds of trimming, and what stays undecided."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae._memory import uninitialised
from personae.methods._deltas import DeltaBlocks, delta_blocks, joined
from personae.methods._method import Pass, Scope, Statistics, one_each
from personae.methods._site import Site
from personae.ops.select import (
    MOST_PATTERNS,
    SAMPLE_BINS,
    SAMPLE_FLOOR,
    SAMPLE_SHIFT,
    TOP,
    Window,
    guess,
    kept_count,
    narrow,
)

MOST_TOLD = 1 << 12
"""Undecided entries that are told of at once."""


class Undecided:
    """Entries on which experts vote and none wins, merged before the majority is known.

    Attributes:
        votes: Entries that elect + minus entries that elect -, of all that were merged.
        count: Undecided entries that were told of.
    """

    def __init__(self) -> None:
        """Nothing has been merged."""
        self.votes = self.count = 0
        self._told: list[tuple[ndarray, ndarray, ndarray]] = []

    def add(
        self,
        places: Int64[ndarray, " some"],
        positive: Float[ndarray, " some"],
        negative: Float[ndarray, " some"],
    ) -> int:
        """Tell which entries are undecided, at least one, and what each sign would make of them.

        Returns:
            The sign that they get so far: 1, -1 or, as here, 0 for none.
        """
        self.count += len(places)
        self._told.append((places, positive, negative))
        return 0

    @property
    def places(self) -> Int64[ndarray, " some"]:
        """Flat indices of the undecided entries in what was merged, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(told[0] for told in self._told)])

    @property
    def positive(self) -> Float[ndarray, " some"]:
        """What is to be merged there if + has the majority."""
        return np.concatenate([np.empty(0, np.float32), *(told[1] for told in self._told)])

    @property
    def negative(self) -> Float[ndarray, " some"]:
        """What is to be merged there if - has the majority."""
        return np.concatenate([np.empty(0, np.float32), *(told[2] for told in self._told)])


PerExpert = float | tuple[float, ...]
Fill = Callable[[int, Float[ndarray, "expert entry"]], None]
"""`fill(start, deltas)` leaves, of deltas that begin at that entry, what is kept and weighted."""


def weighted_sums(
    blocks: DeltaBlocks, weight: PerExpert, scale: float = 1.0, divisor: float = 1.0
) -> Iterator[Float[ndarray, " entry"]]:
    """Σ w_n τ_n in the order of experts, times `scale`, over `divisor`.

    Every product, every sum and the quotient are rounded once.
    """
    weights = np.asarray(one_each(weight, blocks.experts), np.float32)
    for _, deltas in blocks:
        yield weighted_sum(deltas, weights, scale, divisor)


def weighted_sum(
    deltas: Float[ndarray, "expert entry"],
    weights: Float[ndarray, " expert"],
    scale: float = 1.0,
    divisor: float = 1.0,
) -> Float[ndarray, " entry"]:
    """The same of one block. A loop that yields what it holds by no name holds one block of it."""
    total = np.empty(deltas.shape[1], np.float32)
    kernels.weighted_sum(deltas, weights, total)
    if scale != 1:
        total *= np.float32(scale)
    if divisor != 1:
        total /= np.float32(divisor)
    return total


def mean(task_vectors: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """The mean, summed in the order of experts; that of `Tensor.mean` depends on the shape."""
    experts = len(task_vectors)
    return joined(
        weighted_sums(delta_blocks(task_vectors), 1.0, divisor=float(experts)), task_vectors
    )


def trimmer(thresholds: Float[Tensor, " expert"], weight: PerExpert) -> Fill:
    """Keeps the entries whose magnitude reaches the threshold, times the weight."""
    limits = limits_of(thresholds)
    weights = np.asarray(one_each(weight, len(thresholds)), np.float32)

    def fill(_: int, deltas: Float[ndarray, "expert entry"]) -> None:
        kernels.trim(deltas, limits, weights)

    return fill


def limits_of(thresholds: Float[Tensor, " expert"]) -> Float[ndarray, " expert"]:
    """The numbers just below the thresholds: what is above them is kept."""
    return torch.nextafter(thresholds, torch.zeros_like(thresholds)).numpy()


def between(statistics: Statistics, weight: PerExpert) -> Fill:
    """Keeps the entries whose magnitude lies within the bounds, times the weight."""
    highest = statistics["highest"].numpy()
    trim = trimmer(statistics["lowest"], weight)

    def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
        for row, high in zip(deltas, highest, strict=True):
            if high < np.inf:
                row[np.abs(row) > high] = 0
        trim(start, deltas)

    return fill


def find_bounds(
    density: PerExpert, gamma: PerExpert, experts: int, least: int = 1
) -> Generator[Pass, Tensor, dict[str, Tensor]]:
    """Find the bounds between which each expert's entries are kept, ties included.

    Of so many entries the fraction gamma, the largest, is left out; the next ones are kept, the
    fraction density. Fewer are left out where density needs them; at density 1 none is.

    Args:
        density: Fraction of entries kept.
        gamma: Fraction of entries that are too large.
        experts: How many there are.
        least: Entries that are kept at least.
    """

    def counts(density: float, gamma: float, entries: int) -> tuple[int, int]:
        kept = min(max(int(density * entries), least), entries)
        return min(int(gamma * entries), entries - kept), kept

    def lowest(density: float, gamma: float, entries: int) -> int:
        dropped, kept = counts(density, gamma, entries)
        return dropped + kept if kept else 0

    def highest(density: float, gamma: float, entries: int) -> int:
        return counts(density, gamma, entries)[0] + 1

    shares = list(zip(one_each(density, experts), one_each(gamma, experts), strict=True))
    cut = [n for n, (kept, _) in enumerate(shares) if kept < 1]
    ranks = [Rank(n, min(sum(shares[n]), 1.0), partial(lowest, *shares[n])) for n in cut]
    ranks += [Rank(n, shares[n][1], partial(highest, *shares[n])) for n in cut]
    found = yield from find_magnitudes(ranks)
    bounds = {"lowest": torch.zeros(experts), "highest": torch.full((experts,), torch.inf)}
    bounds["lowest"][cut], bounds["highest"][cut] = found[: len(cut)], found[len(cut) :]
    return bounds


class Rank(NamedTuple):
    """Which of the magnitudes of a row of entries is wanted, from the largest.

    Attributes:
        row: Of the rows that are counted: the experts, unless something else is.
        fraction: About which fraction of the entries it is from the top.
        place: Which of so many entries it is, from 1; for 0 infinity is found.
    """

    row: int
    fraction: float
    place: Callable[[int], int]


Rows = Float[ndarray, "row entry"] | Sequence[Float[ndarray, " entry"]]
Seen = Callable[[int, Float[ndarray, "expert entry"]], Rows]
"""`seen(start, deltas)` makes the rows that are counted; it may work in the deltas."""


def find_thresholds(
    density: PerExpert,
    experts: int,
    seen: Callable[[Any, Site], Seen] | None = None,
    scope: Scope = "model",
) -> Generator[Pass, Tensor, Float[Tensor, " expert"]]:
    """Find the smallest magnitude that each expert keeps.

    An expert of density 1 has threshold 0 and is not counted.

    Args:
        density: Fraction of entries kept.
        experts: How many there are.
        seen: `seen(parameters, site)` makes, of the task vectors, what is trimmed.
        scope: What the passes are over.
    """
    thresholds = torch.zeros(experts)
    ranks = [
        Rank(n, each, partial(kept_count, density=each))
        for n, each in enumerate(one_each(density, experts))
        if each < 1
    ]
    thresholds[[rank.row for rank in ranks]] = yield from find_magnitudes(ranks, seen, scope)
    return thresholds


def find_magnitudes(
    ranks: Sequence[Rank],
    seen: Callable[[Any, Site], Seen] | None = None,
    scope: Scope = "model",
) -> Generator[Pass, Tensor, Float[Tensor, " rank"]]:
    """Find magnitudes by their rank: a pass over a sample, then one or more.

    Args:
        ranks: Which.
        seen: `seen(parameters, site)` makes what is counted, where that is not the task vectors.
        scope: What the passes are over.
    """
    windows = yield from guess_windows(ranks, seen, len(ranks), scope)
    while not all(window.found for window in windows):
        bounds = [(window.low, window.high, window.shift) for window in windows]
        bins = max(window.bins for window in windows)
        count = partial(_count, seen, [rank.row for rank in ranks], bounds, bins)
        counted = yield Pass("thresholds", count, term_bytes=most_counted(len(ranks), scope))
        windows = [narrowed(*three) for three in zip(ranks, counted, windows, strict=True)]
        del counted  # not held beside the next
    return torch.tensor([window.magnitude for window in windows])


def guess_windows(
    ranks: Sequence[Rank],
    seen: Callable[[Any, Site], Seen] | None,
    rows: int,
    scope: Scope,
) -> Generator[Pass, Tensor, list[Window]]:
    """Windows that hold magnitudes of these ranks, but for bad luck: by a pass over a sample.

    Args:
        ranks: Which.
        seen: See `find_magnitudes`.
        rows: How many the passes that follow will count.
        scope: What the passes are over.
    """

    def sample(vectors: Tensor | DeltaBlocks, own: Any, site: Site) -> Tensor:
        counts = np.zeros((len(ranks), SAMPLE_BINS), np.int64)
        for found in _rows(seen, vectors, own, site):
            for rank, counted in zip(ranks, counts, strict=True):
                kernels.sample(found[rank.row], SAMPLE_FLOOR, SAMPLE_SHIFT, counted)
        return torch.from_numpy(counts)

    if not ranks:
        return []
    sampled = yield Pass("sample", sample, sample=64, term_bytes=most_counted(rows, scope))
    most = most_patterns(scope)
    return [guess(counts, r.fraction, most) for r, counts in zip(ranks, sampled, strict=True)]


def narrowed(rank: Rank, counts: Int64[Tensor, " counts"], window: Window) -> Window:
    """A window, narrowed by what was counted in it; of no entry the magnitude is 0."""
    entries = int(counts[0])
    place = rank.place(entries)
    none = Window(TOP, TOP + 1) if entries else Window(0, 1)
    return narrow(counts, window, place) if place else none


def most_counted(rows: int, scope: Scope) -> int:
    """Bytes of what a pass counts at most, of so many rows."""
    return rows * (2 + most_patterns(scope)) * np.dtype(np.int64).itemsize


def most_patterns(scope: Scope) -> int:
    """Patterns that are counted one by one: more of one tensor, whose sample tells less."""
    return 2 * MOST_PATTERNS if scope == "tensor" else MOST_PATTERNS


def _count(
    seen: Callable[[Any, Site], Seen] | None,
    rows: Sequence[int],
    bounds: Sequence[tuple[int, int, int]],
    bins: int,
    vectors: Tensor | DeltaBlocks,
    own: Any,
    site: Site,
) -> Tensor:
    """The counts of `kernels.count_magnitudes` for each of some rows, within bounds of its own."""
    counts = uninitialised((len(rows), 2 + bins), torch.int64).zero_().numpy()
    for found in _rows(seen, vectors, own, site):
        for row, (low, high, shift), counted in zip(rows, bounds, counts, strict=True):
            kernels.count_magnitudes(found[row], low, high, shift, counted)
    return torch.from_numpy(counts)


def _rows(
    seen: Callable[[Any, Site], Seen] | None, vectors: Tensor | DeltaBlocks, own: Any, site: Site
) -> Iterator[Rows]:
    make = None if seen is None else seen(own, site)
    for start, deltas in delta_blocks(vectors, own.row_entries(site)):
        yield deltas if make is None else make(start, deltas)
