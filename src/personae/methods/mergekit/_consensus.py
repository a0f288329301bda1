"""What mergekit's `ties` and `dare` methods share: restoring L1 norms, and electing signs."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae import kernels
from personae._types import Density
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._dropping import dropper
from personae.methods._electing import Ballot
from personae.methods._entries import Fill, PerExpert
from personae.methods._merge import RowWise
from personae.methods._method import Pass, Passes
from personae.methods._site import Site
from personae.ops.sums import SUM_BINS, total

_SMALLEST_NORM = 1e-7


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


class Dropping(RowWise):
    """What the DARE methods have in common: which entries are dropped, and what makes up for it."""

    order_free: ClassVar = False
    default_scope: ClassVar = "tensor"
    usual_passes: ClassVar = 1

    weight: float | tuple[float, ...] = Field(description="Coefficient of each expert.")
    density: Density | tuple[Density, ...] = Field(
        default=1.0, description="Probability that an entry is kept."
    )
    normalize: bool = Field(
        default=False,
        description="Whether to divide by the sum of the weights (by 1 if that is below 1e-8).",
    )
    rescale: bool = Field(
        default=True, description="Whether what is kept of a tensor gets the L1 norm of the whole."
    )
    lambda_: float = Field(default=1.0, alias="lambda", description="Multiplier on the result.")
    seed: int = Field(default=0, description="Of the masks.")

    def passes(self, experts: int) -> Passes:
        """One pass, for the norms of what is kept, if they are restored."""
        if not self.rescale:
            return {}

        def norms(vectors: Tensor | DeltaBlocks, own: "Dropping", site: Site) -> Tensor:
            return l1_share(delta_blocks(vectors), own.fill(site, experts, 1.0))

        return {"norms": (yield Pass("norms", norms))}

    def fill(self, site: Site, experts: int, weight: PerExpert) -> Fill:
        """Drops at random, as in `dare`, and weighs what is kept."""
        return dropper(
            site,
            density=self.density,
            weight=weight,
            rescale=False,
            seed=self.seed,
            experts=experts,
        )


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
        yield merged
