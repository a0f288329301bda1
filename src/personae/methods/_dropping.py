"""What the DARE and DELLA methods share: entries dropped at random, the rest making up for them."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int32
from numpy import ndarray

from personae import kernels
from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Fill, PerExpert, weighted_sum
from personae.methods._method import one_each
from personae.methods._site import Site
from personae.ops.draws import DRAW_VALUES, Draws, kept_values


def dropper(
    site: Site, *, density: PerExpert, weight: PerExpert, rescale: bool, seed: int, experts: int
) -> Fill:
    """Keeps entries at random, rescaled and weighted.

    With `rescale` what is kept is divided by the probability of keeping it, exactly that of the
    mask, so that its expectation is the task vector.
    """
    kept_of = [kept_values(each) for each in one_each(density, experts)]
    factors = [
        each * DRAW_VALUES / kept if rescale else each
        for each, kept in zip(one_each(weight, experts), kept_of, strict=True)
    ]
    draws = [
        Draws(seed=seed, name=site.name, expert=n) if kept < DRAW_VALUES else None
        for n, kept in enumerate(kept_of)
    ]

    def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
        for row, kept, factor, numbers in zip(deltas, kept_of, factors, draws, strict=True):
            if numbers is not None:
                state, skipped = numbers.at(site.start + start, row.size)
                kernels.drop(row, state, skipped, kept, np.float32(factor))
            elif factor != 1:
                row *= np.float32(factor)

    return fill


def rank_dropper(
    site: Site,
    *,
    density: PerExpert,
    spread: PerExpert,
    weight: PerExpert,
    rescale: bool,
    seed: int,
    experts: int,
) -> Fill:
    """Keeps entries at random, the large ones of a row rather than the small ones.

    In a row of n entries that of rank r, from 0 for the smallest magnitude to n - 1, is kept with
    probability density + spread · (r / (n - 1) - 1/2), to the nearest 1/65536; what is kept is
    rescaled and weighted as by `dropper`. At density 1 nothing is dropped.
    """
    length = site.row_entries
    per_expert = [one_each(each, experts) for each in (density, spread, weight)]
    draws = [Draws(seed=seed, name=site.name, expert=n) for n in range(experts)]
    tables = [_by_rank(length, *each, rescale=rescale) for each in zip(*per_expert, strict=True)]

    def fill(start: int, deltas: Float[ndarray, "expert entry"]) -> None:
        for row, (kept, factors), numbers in zip(deltas, tables, draws, strict=True):
            state, skipped = numbers.at(site.start + start, row.size)
            kernels.drop_by_rank(row, state, skipped, kept, factors)

    return fill


def _by_rank(
    length: int, density: float, spread: float, weight: float, *, rescale: bool
) -> tuple[Int32[ndarray, " places"], Float[ndarray, " places"]]:
    """Values that keep an entry, and factors, for each mean rank that there can be, twice it."""
    place = np.linspace(-0.5, 0.5, 2 * length - 1) if length > 1 else np.zeros(1)
    kept = np.maximum(1, np.rint((density + spread * place) * DRAW_VALUES)).astype(np.int32)
    if density == 1:
        kept[:] = DRAW_VALUES
    factors = weight * DRAW_VALUES / kept if rescale else np.full(len(kept), weight)
    return kept, factors.astype(np.float32)


def rank_bytes(length: int, experts: int) -> int:
    """Memory that `rank_dropper` takes for rows of so many entries: tables, and a row sorted."""
    return (16 * experts + 32) * length


def beyond_certainty(method: str, ranges: Iterable[tuple[float, float]]) -> str:
    """What is wrong with probabilities density ± half of a width; empty if nothing."""
    for density, half in ranges:
        if density < 1 and not half < density <= 1 - half:
            return (
                f"{method}: entries would be kept with probabilities from {density - half:g} to "
                f"{density + half:g}, which is not between 0 and 1. Give a smaller epsilon."
            )
    return ""


def dropped_sums(
    blocks: DeltaBlocks, fill: Fill, scale: float
) -> Iterator[Float[ndarray, " entry"]]:
    """What `fill` keeps of the experts, added up in their order, times `scale`."""
    ones = np.ones(blocks.experts, np.float32)
    for start, deltas in blocks:
        fill(start, deltas)
        yield weighted_sum(deltas, ones, scale)
