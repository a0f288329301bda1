"""SCE (Wan et al. 2024): select where experts differ, weight by squares, erase minorities.

As in the authors' code, what is left is divided by the weights of the experts that agree; their
report adds it up.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._electing import Ballot
from personae.methods._entries import Rank, Seen, Undecided, guess_windows, most_counted, narrowed
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Pass, Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site


@merge_method(paper="arXiv:2408.07990")
class SCE(RowWise):
    """Keep the entries on which experts vary most, elect signs, average by squares what agrees.

    Select, of each tensor: the fraction `select_topk` of the entries whose variance over experts is
    not 0. Calculate: w_n = Σ τ_n² of these over the sum of all experts'. Erase what disagrees with
    the sign of Σ_n τ_n (0 counts as +): Σ w_n τ_n / Σ w_n of the rest.

    Returns:
        The merged task vector, fp32.
    """

    default_scope: ClassVar = "tensor"
    usual_passes: ClassVar = 1
    least_squares: ClassVar[float] = 0.0
    """Sum of the experts' mean squares at which all weigh the same."""

    select_topk: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Fraction of entries kept, those of largest variance (τ)."
    )

    def passes(self, experts: int) -> Passes:
        """Those for the smallest deviation that is selected, and the squares of what is."""
        if self.select_topk < 1:
            return (yield from self._select(experts))

        def squares(vectors: Tensor | DeltaBlocks, _: Any, __: Site) -> Tensor:
            total = np.zeros((experts, 1, 1))
            for _, deltas in delta_blocks(vectors):
                for own, delta in zip(total, deltas, strict=True):
                    kernels.add_inner_products(delta[None, None], own[None])
            return torch.from_numpy(total[:, 0, 0])

        return {"threshold": torch.zeros(1), "squares": (yield Pass("squares", squares))}

    def _select(self, experts: int) -> Passes:
        """Deviations are counted, and squares added up, at and above each that it may be."""
        rank = Rank(0, self.select_topk, lambda entries: int(entries * self.select_topk))
        (window,) = yield from guess_windows([rank], _deviations, 1 + experts, "tensor")
        squares = torch.zeros(experts, dtype=torch.float64)
        most = most_counted(1 + experts, "tensor")

        def count(vectors: Tensor | DeltaBlocks, _: Any, __: Site) -> Tensor:
            counts = np.zeros((1 + experts, 2 + window.bins))
            for _, deltas in delta_blocks(vectors):
                kernels.count_apart(deltas, window.low, window.high, window.shift, counts)
            return torch.from_numpy(counts)

        while not window.found:
            counts = yield Pass("thresholds", count, term_bytes=most)
            before, window = window, narrowed(rank, counts[0].long(), window)
            place = 2 + ((window.low - before.low) >> before.shift)
            squares = counts[1:, 1] + counts[1:, max(place, 2) :].sum(dim=1)
            del counts  # not held beside the next
        threshold = torch.tensor([window.magnitude])
        return {"threshold": threshold, "squares": squares * threshold.isfinite()}

    def working(self, experts: int) -> int:
        """Signs, places and, while these are elected, a mark; the sums take less."""
        return 4 + 8 + 1

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        least = least_apart(float(statistics["threshold"]), blocks.experts)
        weights = self._weights(statistics, site)
        for _, deltas in blocks:
            select(deltas, least)
            yield _mean_of_agreeing(deltas, weights)

    def _weights(self, statistics: Statistics, site: Site) -> Float[ndarray, " expert"]:
        squares = statistics["squares"].numpy()
        total = squares.sum()
        if total <= self.least_squares * math.prod(site.shape):
            return np.full(len(squares), 1 / len(squares), np.float32)
        return (squares / total).astype(np.float32)


def _mean_of_agreeing(
    deltas: Float[ndarray, "expert entry"], weights: Float[ndarray, " expert"]
) -> Float[ndarray, " entry"]:
    """The weighted mean of the experts that agree with the elected sign; may work in the deltas."""
    signs = _elected(deltas)
    merged = np.empty(deltas.shape[1], np.float32)
    deltas *= weights[:, None]
    kernels.weighted_mean_agreeing(deltas, signs, weights, merged)
    return merged


def _elected(deltas: Float[ndarray, "expert entry"]) -> Float[ndarray, " entry"]:
    """The signs of the sums, 0 counting as +."""
    ballot = Ballot(deltas, "mass")
    ballot.give_undecided(1)
    return ballot.signs


def select(deltas: Float[ndarray, "expert entry"], least: float) -> None:
    """Leave the entries whose squares apart reach `least_apart`; 0 elsewhere."""
    if least:
        kernels.keep_apart(deltas, least)


def least_apart(threshold: float, experts: int) -> float:
    """The smallest sum of squares apart whose deviation, rounded to fp32, reaches the threshold.

    To the bit: an entry is selected as if its own deviation were compared.
    """
    if not 0 < threshold < math.inf:
        return threshold
    near = experts * threshold * threshold
    low, high = (int(np.float64(near * each).view(np.int64)) for each in (1 - 1e-6, 1 + 1e-6))
    while low < high:
        middle = (low + high) // 2
        if np.float32(np.sqrt(np.int64(middle).view(np.float64) * (1 / experts))) >= threshold:
            high = middle
        else:
            low = middle + 1
    return float(np.int64(low).view(np.float64))


def deviation(deltas: Float[ndarray, "expert entry"]) -> Float[ndarray, " entry"]:
    """The standard deviation over experts: as the variance orders, in more even magnitudes."""
    found = np.empty(deltas.shape[1], np.float32)
    kernels.deviations(deltas, found)
    return found


def _deviations(_: Any, __: Site) -> Seen:
    def seen(_: int, deltas: Float[ndarray, "expert entry"]) -> Sequence[ndarray]:
        found = deviation(deltas)
        return [found[found > 0]]

    return seen


sce = as_function(SCE)
