"""What mergekit's methods of task vectors share: a part is left, norms restored, signs elected."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae import kernels
from personae._types import Density
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._dropping import (
    beyond_certainty,
    dropped_sums,
    dropper,
    rank_bytes,
    rank_dropper,
)
from personae.methods._electing import Ballot
from personae.methods._entries import Fill, Undecided, between, find_bounds
from personae.methods._merge import RowWise
from personae.methods._method import Pass, Passes, Statistics, one_each
from personae.methods._site import Site
from personae.ops.sums import SUM_BINS, total

_SMALLEST_NORM = 1e-7
_SMALLEST_DIVISOR = 1e-8


def l1_share(blocks: DeltaBlocks, fill: Fill) -> Int64[Tensor, "expert 2 bins"]:
    """Sums of magnitudes of each expert, whole and of what `fill` keeps (see `ops.sums.total`)."""
    sums = np.zeros((blocks.experts, 2, SUM_BINS), np.int64)
    for start, deltas in blocks:
        _add_magnitudes(deltas, sums[:, 0])
        fill(start, deltas)
        _add_magnitudes(deltas, sums[:, 1])
    return torch.from_numpy(sums)


def _add_magnitudes(
    deltas: Float[ndarray, "expert entry"], sums: Int64[ndarray, "expert bins"]
) -> None:
    for row, own in zip(deltas, sums, strict=True):
        kernels.sum_magnitudes(row, own)


def rescaled(
    weights: Sequence[float],
    densities: Sequence[float],
    sums: Int64[Tensor, "expert 2 bins"] | None,
) -> tuple[float, ...]:
    """Weights times what restores each expert's L1 norm.

    As there, nothing is restored at density 1, nor where a norm is below 1e-7.
    """
    if sums is None:
        return tuple(weights)
    factors: list[float] = []
    for weight, density, (before, after) in zip(weights, densities, sums, strict=True):
        norm, left = total(before), total(after)
        keeps_all = density == 1 or min(norm, left) < _SMALLEST_NORM
        factors.append(weight if keeps_all else weight * norm / left)
    return tuple(factors)


class Sparsified(RowWise):
    """Leave a part of each task vector, weight it, and add up: all, or what agrees in sign."""

    default_scope: ClassVar = "tensor"
    usual_passes: ClassVar = 1
    elects: ClassVar[bool] = True

    weight: float | tuple[float, ...] = Field(
        description="Coefficient of each expert, applied before signs are elected."
    )
    density: Density | tuple[Density, ...] = Field(
        default=1.0, description="Fraction of entries kept of each tensor."
    )
    normalize: bool = Field(
        default=False,
        description=(
            "Whether to divide by the sum of the weights, of those that agree where signs are "
            "elected."
        ),
    )
    rescale: bool = Field(
        default=False, description="Whether what is kept of a tensor gets the L1 norm of the whole."
    )
    lambda_: float = Field(default=1.0, alias="lambda", description="Multiplier on the result.")

    @abstractmethod
    def fill(self, site: Site, statistics: Statistics, weights: tuple[float, ...]) -> Fill:
        """Leaves a part of the task vectors, weighted; 0 elsewhere."""
        ...

    def find(self, experts: int) -> Passes:
        """The passes that `fill` needs; by default none."""
        yield from ()
        return {}

    def passes(self, experts: int) -> Passes:
        """The passes of `find`, and one for the norms if they are restored."""
        found = yield from self.find(experts)
        if not self.rescale or all(each == 1 for each in one_each(self.density, experts)):
            return found

        def norms(vectors: Tensor | DeltaBlocks, own: Sparsified, site: Site) -> Tensor:
            blocks = delta_blocks(vectors, own.row_entries(site))
            return l1_share(blocks, own.fill(site, found, (1.0,) * experts))

        return {**found, "norms": (yield Pass("norms", norms))}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        experts = blocks.experts
        weights, densities = one_each(self.weight, experts), one_each(self.density, experts)
        fill = self.fill(site, statistics, rescaled(weights, densities, statistics.get("norms")))
        if self.elects:
            return consensus(blocks, fill, weights, normalize=self.normalize, scale=self.lambda_)
        divisor = sum(weights) if self.normalize else 1.0
        divided = self.lambda_ if abs(divisor) < _SMALLEST_DIVISOR else self.lambda_ / divisor
        return dropped_sums(blocks, fill, divided)


class Dropping(Sparsified):
    """What is dropped is drawn; results agree with mergekit's in distribution."""

    order_free: ClassVar = False

    rescale: bool = Field(
        default=True, description="Whether what is kept of a tensor gets the L1 norm of the whole."
    )
    seed: int = Field(default=0, description="Of the masks.")

    def fill(self, site: Site, statistics: Statistics, weights: tuple[float, ...]) -> Fill:
        """Drops at random, as in `dare`, and weighs what is kept."""
        return dropper(
            site,
            density=self.density,
            weight=weights,
            rescale=False,
            seed=self.seed,
            experts=len(weights),
        )


Epsilon = Annotated[float, Field(ge=0)]


class DroppingByRank(Dropping):
    """The same, where the rank of an entry's magnitude in its row says how likely it is kept."""

    whole_rows: ClassVar = True

    epsilon: Epsilon | tuple[Epsilon, ...] = Field(
        default=0.15,
        description="The smallest entry of a row is kept with probability density - epsilon, the "
        "largest with density + epsilon.",
    )

    def check(self, experts: int, has_base: bool) -> str:
        """Probabilities beyond 0 or 1."""
        pairs = zip(one_each(self.density, experts), one_each(self.epsilon, experts), strict=True)
        return beyond_certainty(self.name, pairs)

    def block_bytes(
        self, site: Site, entries: int, experts: int, *, has_reference: bool = True
    ) -> int:
        """See `Entrywise.block_bytes`; and the tables by rank."""
        block = super().block_bytes(site, entries, experts, has_reference=has_reference)
        return block + rank_bytes(site.row_entries, experts)

    def fill(self, site: Site, statistics: Statistics, weights: tuple[float, ...]) -> Fill:
        """Drops at random, as in `della`, and weighs what is kept."""
        experts = len(weights)
        return rank_dropper(
            site,
            density=self.density,
            spread=tuple(2 * each for each in one_each(self.epsilon, experts)),
            weight=weights,
            rescale=False,
            seed=self.seed,
            experts=experts,
        )


Share = Annotated[float, Field(ge=0, lt=1)]


class BetweenOutliers(Sparsified):
    """The smallest entries are dropped, and the very largest."""

    usual_passes: ClassVar = 2

    gamma: Share | tuple[Share, ...] = Field(
        default=0.01, description="Fraction of entries, the largest, that are dropped."
    )

    def find(self, experts: int) -> Passes:
        """Those for the smallest and the largest magnitude kept."""
        return (yield from find_bounds(self.density, self.gamma, experts, least=0))

    def fill(self, site: Site, statistics: Statistics, weights: tuple[float, ...]) -> Fill:
        """Keeps what lies between."""
        return between(statistics, weights)


def consensus(
    blocks: DeltaBlocks, fill: Fill, weights: Sequence[float], *, normalize: bool, scale: float
) -> Iterator[Float[ndarray, " entry"]]:
    """Σ of the entries whose sign is that of Σ w_n δ_n (0 counts as +), over Σ of their w_n."""
    divisors = np.asarray(weights, np.float32)
    for start, deltas in blocks:
        fill(start, deltas)
        ballot = Ballot(deltas, "mass")
        ballot.give_undecided(1)
        merged = np.empty(deltas.shape[1], np.float32)
        if normalize:
            kernels.weighted_mean_agreeing(deltas, ballot.signs, divisors, merged)
        else:
            kernels.sum_agreeing(deltas, ballot.signs, merged)
        merged *= np.float32(scale)
        del ballot  # not held while the next block is voted on
        yield merged
