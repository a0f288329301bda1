"""Electing one sign an entry, and merging the experts that agree with it (TIES, steps 2 and 3).

Sums go over the experts in order, entry by entry, so that how entries are cut into blocks changes
nothing. NumPy compares five times as fast as torch on one core, torch multiplies and takes signs
faster than NumPy; hence both, on the same memory.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

Elect = Literal["mass", "count"]
Reduce = Literal["mean", "sum", "max"]

_MOST_ENTRIES = 1 << 24
"""So many signs add up exactly in fp32."""
_EXACT = 2.0**-100
"""Rounding of whole numbers: none."""


class Ballot:
    """Room for the votes on a block of entries, made once and filled again for every block.

    Attributes:
        kept: What was kept of each expert, weighted, 0 where nothing was: (expert, entry), fp32.
            The caller fills it; `keep_agreeing` overwrites it.
        signs: The elected signs, 1, -1 or, where nobody votes, 0; fp32.
    """

    def __init__(self, experts: int, entries: int) -> None:
        """Make room for blocks of exactly so many entries."""
        assert entries <= _MOST_ENTRIES, "a block is short"
        self.kept: Float[Tensor, "expert entry"] = torch.empty(experts, entries)
        self.signs: Float[Tensor, " entry"] = torch.empty(entries)
        self._total = torch.empty(entries)
        self._spare = torch.empty(entries)
        self._agreeing = np.empty(entries, np.min_scalar_type(experts))
        self._flags = np.empty(entries, bool)

    def majority_votes(self, elect: Elect) -> int:
        """Entries that elect + minus entries that elect -; undecided ones have no vote."""
        self.elect(elect, majority=0)
        return int(self.signs.sum())

    def merge(self, elect: Elect, majority: int, reduce: Reduce) -> Float[Tensor, " entry"]:
        """Reduce, entry by entry, the experts whose sign is the elected one; 0 if there is none.

        Args:
            elect: As in `elect`.
            majority: As in `elect`.
            reduce: What becomes of entries that agree.

        Returns:
            fp32; overwritten by the next block.
        """
        self.elect(elect, majority)
        self.keep_agreeing()
        if reduce == "max":
            return torch.amax(self.kept, dim=0, out=self._total).mul_(self.signs)
        total = self.sum_of_kept().mul_(self.signs)
        return total.div_(self._count()) if reduce == "mean" else total

    def elect(self, elect: Elect, majority: int) -> None:
        """Find the sign that wins each entry.

        Sums within rounding of 0 are summed again in fp64: the order of experts flips no sign.

        Args:
            elect: Whether experts vote with the magnitude kept, or one vote each.
            majority: The sign (1, -1 or 0) of entries on which experts vote and none wins.
        """
        if elect == "mass":
            self.sum_of_kept()
            experts = len(self.kept)
            doubtful = self._near_zero(experts * (experts + 2) * 2.0**-23)
        else:
            torch.sign(self.kept[0], out=self._total)
            for row in self.kept[1:]:
                self._total.add_(torch.sign(row, out=self._spare))
            doubtful = self._near_zero(_EXACT)
        torch.sign(self._total, out=self.signs)
        if len(doubtful):
            votes = self.kept.numpy()[:, doubtful].astype(np.float64)
            sums = np.sign((votes if elect == "mass" else np.sign(votes)).sum(axis=0))
            self.signs.numpy()[doubtful] = np.where(sums == 0, majority, sums)

    def keep_agreeing(self) -> None:
        """Leave of `kept` the magnitudes of the entries that have the elected sign; 0 elsewhere."""
        for row in self.kept:
            row.mul_(self.signs).relu_()

    def sum_of_kept(self) -> Float[Tensor, " entry"]:
        """Σ of `kept` in the order of the experts; overwritten by whatever is done next."""
        if len(self.kept) == 1:
            return self._total.copy_(self.kept[0])
        torch.add(self.kept[0], self.kept[1], out=self._total)
        for row in self.kept[2:]:
            self._total.add_(row)
        return self._total

    def _near_zero(self, rounding: float) -> Int64[ndarray, " some"]:
        """Entries on which experts vote and whose total may be 0 but for rounding; a few more.

        Args:
            rounding: What rounding may make of a total, in units of the largest vote.
        """
        # All bits that any expert has make a number no less than each of theirs, 0 if all are; or
        # none at all (NaN), and then nothing is trusted.
        largest = self._spare
        bits = largest.view(torch.int32).copy_(self.kept[0].view(torch.int32))
        for row in self.kept[1:]:
            bits.bitwise_or_(row.view(torch.int32))
        trusted = torch.mul(self._total, 1 / rounding, out=self.signs).abs_()
        np.greater_equal(trusted.numpy(), largest.abs_().numpy(), out=self._flags)
        return np.flatnonzero(np.logical_not(self._flags, out=self._flags))

    def _count(self) -> Float[Tensor, " entry"]:
        """How many experts agree, at least 1."""
        self._agreeing.fill(0)
        for row in self.kept.numpy():
            self._agreeing += np.greater(row, 0, out=self._flags).view(np.uint8)
        np.copyto(self._spare.numpy(), self._agreeing)
        return self._spare.clamp_min_(1)
