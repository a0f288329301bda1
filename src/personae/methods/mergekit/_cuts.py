"""Exactly k entries kept of a tensor: of those that tie with the k-th, the first in order.

mergekit sorts and takes k, which of the tied entries its sort leaves open. Differences of bf16
weights are round numbers, so that a twentieth of a tensor may tie. Where the last one kept lies is
found by looks that count ties by position, as thresholds are by looks that count magnitudes.
"""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from personae.methods._entries import Fill, PerExpert, limits_of, trim
from personae.methods._merge import Measure
from personae.methods._parameters import one_each
from personae.methods._site import Site
from personae.ops.select import kept_count

BINS = 1 << 16
NO_CUT = torch.iinfo(torch.int64).max
"""The cut of an expert whose ties are all kept."""


class _Span(NamedTuple):
    """Where a cut lies: in one of so many bins of `width` positions from `start` on."""

    start: int = 0
    width: int = 0  # not known before the first look: that of the whole tensor
    before: int = 0
    """Tied entries that may be kept from `start` on; not known before the first look either."""


def find_cuts(
    density: PerExpert, thresholds: Float[Tensor, " expert"], experts: int
) -> Generator[Measure, Tensor, Int64[Tensor, " expert"]]:
    """Look for the position from which on entries that equal the threshold are dropped.

    Looks at one tensor alone: positions are those in the tensor.

    Args:
        density: Fraction of entries kept.
        thresholds: The k-th largest magnitude of each expert.
        experts: How many there are.
    """
    densities, limits = one_each(density, experts), thresholds.tolist()
    cuts = torch.full((experts,), NO_CUT)
    # Zeros that tie with the k-th are zero either way.
    open_spans = {n: _Span() for n in range(experts) if densities[n] < 1 and limits[n] > 0}

    def count(vectors: Tensor, _: Any, site: Site) -> Tensor:
        shares = [
            _count(vectors[n], limits[n], span, site) for n, span in sorted(open_spans.items())
        ]
        return torch.stack(shares)

    while open_spans:
        counted = yield Measure("ties", count)
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


def _count(
    entries: Float[Tensor, "..."], threshold: float, span: _Span, site: Site
) -> Int64[Tensor, " counts"]:
    """Entries, those above the threshold, and those that equal it in each bin of the span."""
    width = span.width or -(-math.prod(site.shape) // BINS)
    magnitudes = entries.detach().reshape(-1).cpu().abs()
    places = (magnitudes == threshold).nonzero()[:, 0].numpy() + (site.start - span.start)
    places = places[(places >= 0) & (places < BINS * width)]
    counts = np.zeros(2 + BINS, np.int64)
    counts[:2] = magnitudes.numel(), int((magnitudes > threshold).sum())
    counts[2:] = np.bincount(places // width, minlength=BINS)
    return torch.from_numpy(counts)


def trimmer(
    thresholds: Float[Tensor, " expert"],
    cuts: Int64[Tensor, " expert"],
    weights: tuple[float, ...],
    site: Site,
) -> Fill:
    """For `ballots`: what is above the threshold is kept, and what ties with it up to the cut."""
    limits, levels, places = limits_of(thresholds), thresholds.tolist(), cuts.tolist()

    def fill(start: int, rows: list[Tensor], kept: Tensor) -> None:
        trim(rows, limits, weights, kept)
        for row, target, level, cut in zip(rows, kept, levels, places, strict=True):
            first = max(0, cut - site.start - start)
            if first < len(row):
                target[first:].masked_fill_(row[first:].abs() == level, 0)

    return fill
