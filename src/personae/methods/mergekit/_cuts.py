"""Exactly k entries kept of a tensor: of those that tie with the k-th, the first in order.

mergekit sorts and takes k, which of the tied entries its sort leaves open. Differences of bf16
weights are round numbers, so that a twentieth of a tensor may tie. Where the last one kept lies is
found by passes that count ties by position, as thresholds are by passes that count magnitudes.
"""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._entries import Fill, PerExpert
from personae.methods._entries import trimmer as trimmer_of_ties
from personae.methods._method import Pass, one_each
from personae.methods._site import Site
from personae.ops.select import kept_count

BINS = 1 << 16
NO_CUT = torch.iinfo(torch.int64).max
"""The cut of an expert whose ties are all kept."""


class _Span(NamedTuple):
    """Where a cut lies: in one of so many bins of `width` positions from `start` on."""

    start: int = 0
    width: int = 0  # not known before the first pass: that of the whole tensor
    before: int = 0
    """Tied entries that may be kept from `start` on; not known before the first pass either."""


def find_cuts(
    density: PerExpert, thresholds: Float[Tensor, " expert"], experts: int
) -> Generator[Pass, Tensor, Int64[Tensor, " expert"]]:
    """Find the position from which on entries that equal the threshold are dropped.

    Passes are over one tensor alone: positions are those in the tensor.

    Args:
        density: Fraction of entries kept.
        thresholds: The k-th largest magnitude of each expert.
        experts: How many there are.
    """
    densities, limits = one_each(density, experts), thresholds.tolist()
    cuts = torch.full((experts,), NO_CUT)
    # Zeros that tie with the k-th are zero either way.
    open_spans = {n: _Span() for n in range(experts) if densities[n] < 1 and limits[n] > 0}

    def count(vectors: Tensor | DeltaBlocks, _: Any, site: Site) -> Tensor:
        counts = np.zeros((len(open_spans), 2 + BINS), np.int64)
        for start, deltas in delta_blocks(vectors):
            for (n, span), counted in zip(sorted(open_spans.items()), counts, strict=True):
                width = span.width or -(-math.prod(site.shape) // BINS)
                first = site.start + start - span.start
                kernels.count_ties(deltas[n], np.float32(limits[n]), first, width, counted)
        return torch.from_numpy(counts)

    while open_spans:
        counted = yield Pass("ties", count)
        for (n, span), counts in zip(sorted(open_spans.items()), counted, strict=True):
            entries, above, ties = int(counts[0]), int(counts[1]), counts[2:].cumsum(0)
            kept = span.before if span.width else kept_count(entries, densities[n]) - above
            width = span.width or -(-entries // BINS)
            del open_spans[n]
            if kept >= int(ties[-1]):
                continue
            index = int(torch.searchsorted(ties, kept, right=True))
            start = span.start + index * width
            if width == 1:
                cuts[n] = start
            else:
                left = kept - (int(ties[index - 1]) if index else 0)
                open_spans[n] = _Span(start, -(-width // BINS), left)
    return cuts


def trimmer(
    thresholds: Float[Tensor, " expert"],
    cuts: Int64[Tensor, " expert"],
    weights: tuple[float, ...],
    site: Site,
) -> Fill:
    """What is above the threshold is kept, and what ties with it up to the cut."""
    levels, places = thresholds.tolist(), cuts.tolist()
    trim = trimmer_of_ties(thresholds, weights)

    def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
        for row, level, cut in zip(deltas, levels, places, strict=True):
            first = max(0, cut - site.start - start)
            if first < row.size:
                kernels.drop_ties(row, np.float32(level), first)
        trim(start, deltas)

    return fill
