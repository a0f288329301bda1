"""What entry-wise methods share: sums, thresholds of trimming, and what stays undecided."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks, joined
from personae.methods._method import Pass, one_each
from personae.methods._site import Site
from personae.ops.select import (
    SAMPLE_BINS,
    SAMPLE_FLOOR,
    SAMPLE_SHIFT,
    Window,
    guess,
    kept_count,
    narrow,
)


class Undecided:
    """Entries on which experts vote and none wins, which are merged as if neither sign did: to 0.

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
    ) -> None:
        """Tell which entries are undecided, at least one, and what each sign would make of them."""
        self.count += len(places)
        self._told.append((places, positive, negative))

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
) -> Generator[Pass, Tensor, Float[Tensor, " expert"]]:
    """Find the smallest magnitude that each expert keeps: a pass over a sample, then one or more.

    An expert of density 1 has threshold 0 and is not counted.

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
        for start, deltas in delta_blocks(vectors, own.row_entries(site)):
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
                kernels.count_magnitudes(deltas[n], low, high, windows[n].shift, counted)
        return torch.from_numpy(counts)

    if trimming:
        sampled = yield Pass("sample", sample, sample=64)
        for n, counts in zip(trimming, sampled, strict=True):
            windows[n] = guess(counts, densities[n])
    while not all(window.found for window in windows):
        counted = yield Pass("thresholds", count)
        for n, counts in zip(trimming, counted, strict=True):
            entries = int(counts[0])
            k = kept_count(entries, densities[n])
            windows[n] = narrow(counts, windows[n], k) if entries else Window(0, 1)
    return torch.tensor([window.magnitude for window in windows])
