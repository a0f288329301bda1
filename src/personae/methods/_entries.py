"""What entry-wise methods share: sums, electing and merging, and thresholds of trimming."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks, joined
from personae.methods._merge import Measure, Statistics
from personae.methods._parameters import one_each
from personae.methods._site import Site
from personae.methods._undecided import Undecided
from personae.ops.select import (
    SAMPLE_BINS,
    SAMPLE_FLOOR,
    SAMPLE_SHIFT,
    Window,
    guess,
    kept_count,
    narrow,
)

PerExpert = float | tuple[float, ...]
Elect = Literal["mass", "count"]
Reduce = Literal["mean", "sum", "max"]
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
        total = np.empty(deltas.shape[1], np.float32)
        kernels.weighted_sum(deltas, weights, total)
        if scale != 1:
            total *= np.float32(scale)
        if divisor != 1:
            total /= np.float32(divisor)
        yield total


def mean(task_vectors: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """The mean, summed in the order of experts; that of `Tensor.mean` depends on the shape."""
    experts = len(task_vectors)
    return joined(
        weighted_sums(delta_blocks(task_vectors), 1.0, divisor=float(experts)), task_vectors
    )


class Ballot:
    """The votes on a block of entries.

    Attributes:
        kept: What was kept of each expert, weighted, 0 where nothing was: (expert, entry), fp32.
        signs: The elected signs, 1, -1 or, where nobody votes or wins, 0; fp32.
        undecided: Entries on which experts vote and none wins, ascending.
        majority: Entries that elect + minus entries that elect -.
    """

    def __init__(self, kept: Float[ndarray, "expert entry"], elect: Elect) -> None:
        """Elect; experts vote with the magnitude kept, or one vote each."""
        self.kept = kept
        self.signs = np.empty(kept.shape[1], np.float32)
        places = np.empty(kept.shape[1], np.int64)
        vote = kernels.elect_by_mass if elect == "mass" else kernels.elect_by_count
        found, self.majority = vote(kept, self.signs, places)
        self.undecided = places[:found]

    def give_undecided(self, sign: int) -> None:
        """Give undecided entries this sign: 1, -1, or 0 for none."""
        self.signs[self.undecided] = sign

    def merge(self, reduce: Reduce, scale: float) -> Float[ndarray, " entry"]:
        """Reduce the experts whose sign is the elected one, times `scale`; 0 if there is none."""
        merged = np.empty(self.signs.size, np.float32)
        loops = {
            "mean": kernels.mean_agreeing,
            "sum": kernels.sum_agreeing,
            "max": kernels.max_agreeing,
        }
        loops[reduce](self.kept, self.signs, merged)
        if scale != 1:
            merged *= np.float32(scale)
        return merged

    def merge_undecided(self, reduce: Reduce, scale: float) -> Float[ndarray, "2 undecided"]:
        """What `merge` would make of the undecided entries alone, if they were +, and if -."""
        either = np.empty((2, self.undecided.size), np.float32)
        kernels.reduce_either(self.kept, self.undecided, reduce == "mean", reduce == "max", either)
        if scale != 1:
            either *= np.float32(scale)
        return either


def votes(blocks: DeltaBlocks, fill: Fill, elect: Elect) -> Tensor:
    """Entries that elect + minus entries that elect -: (), int64."""
    total = 0
    for start, deltas in blocks:
        fill(start, deltas)
        total += Ballot(deltas, elect).majority
    return torch.tensor(total)


def merge_elected(
    blocks: DeltaBlocks,
    fill: Fill,
    *,
    elect: Elect,
    reduce: Reduce,
    scale: float,
    statistics: Statistics,
    undecided: Undecided | None,
) -> Iterator[Float[ndarray, " entry"]]:
    """Elect a sign per entry, reduce what is kept and agrees, times `scale`.

    Undecided entries take the sign `majority` of the statistics; if that is not known yet, they
    become 0, and `undecided` is told what the signs would make of them.
    """
    majority = 0 if undecided is not None else int(statistics["majority"])
    for start, deltas in blocks:
        fill(start, deltas)
        ballot = Ballot(deltas, elect)
        if undecided is not None:
            undecided.votes += ballot.majority
            if len(ballot.undecided):
                either = ballot.merge_undecided(reduce, scale)
                undecided.add(start + ballot.undecided, *either)
        elif majority:
            ballot.give_undecided(majority)
        yield ballot.merge(reduce, scale)


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


def find_thresholds(
    density: PerExpert,
    experts: int,
    seen: Callable[[Any, Site], Fill] | None = None,
) -> Generator[Measure, Tensor, Float[Tensor, " expert"]]:
    """Look for the smallest magnitude that each expert keeps: a sample, then one census or more.

    An expert of density 1 has threshold 0 and is not looked at.

    Args:
        density: Fraction of entries kept.
        experts: How many there are.
        seen: `seen(parameters, site)` makes, of the task vectors, what is trimmed.
    """
    densities = one_each(density, experts)
    windows = [Window(0, 1) for _ in densities]
    trimming = [n for n, each in enumerate(densities) if each < 1]

    def blocks(
        vectors: Tensor | DeltaBlocks, own: Any, site: Site
    ) -> Iterator[Float[ndarray, "expert entry"]]:
        fill = None if seen is None else seen(own, site)
        for start, deltas in delta_blocks(vectors):
            if fill is not None:
                fill(start, deltas)
            yield deltas

    def sample(vectors: Tensor | DeltaBlocks, own: Any, site: Site) -> Tensor:
        counts = np.zeros((len(trimming), SAMPLE_BINS), np.int64)
        for deltas in blocks(vectors, own, site):
            for n, counted in zip(trimming, counts, strict=True):
                kernels.sample(deltas[n], SAMPLE_FLOOR, SAMPLE_SHIFT, counted)
        return torch.from_numpy(counts)

    def count(vectors: Tensor | DeltaBlocks, own: Any, site: Site) -> Tensor:
        bins = max(windows[n].bins for n in trimming)
        counts = np.zeros((len(trimming), 2 + bins), np.int64)
        for deltas in blocks(vectors, own, site):
            for n, counted in zip(trimming, counts, strict=True):
                low, high = windows[n]
                kernels.census(deltas[n], low, high, windows[n].shift, counted)
        return torch.from_numpy(counts)

    if trimming:
        sampled = yield Measure("sample", sample, sample=64)
        for n, counts in zip(trimming, sampled, strict=True):
            windows[n] = guess(counts, densities[n])
    while not all(window.found for window in windows):
        counted = yield Measure("thresholds", count)
        for n, counts in zip(trimming, counted, strict=True):
            entries = int(counts[0])
            k = kept_count(entries, densities[n])
            windows[n] = narrow(counts, windows[n], k) if entries else Window(0, 1)
    return torch.tensor([window.magnitude for window in windows])
