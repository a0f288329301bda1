"""What the DARE methods share: entries dropped at random, and what is left made up for it."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from personae import kernels
from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Fill, PerExpert
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


def dropped_sums(
    blocks: DeltaBlocks, fill: Fill, scale: float
) -> Iterator[Float[ndarray, " entry"]]:
    """What `fill` keeps of the experts, added up in their order, times `scale`."""
    ones = np.ones(blocks.experts, np.float32)
    for start, deltas in blocks:
        fill(start, deltas)
        total = np.empty(deltas.shape[1], np.float32)
        kernels.weighted_sum(deltas, ones, total)
        total *= np.float32(scale)
        yield total
