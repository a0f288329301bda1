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

FEW = 1 << 15
"""Entries without a winner that are looked at together; of some models all are such."""
_MOST_ENTRIES = 1 << 24
"""So many signs add up exactly in fp32."""
_EXACT = 2.0**-100
"""Rounding of whole numbers: none."""


def few_at_once(entries: Int64[ndarray, " some"]) -> list[Int64[ndarray, " few"]]:
    """Entries cut so that what is done with them takes little memory; nothing if there are none."""
    return [entries[at : at + FEW] for at in range(0, len(entries), FEW)]


class Ballot:
    """Room for the votes on a block of entries, made once and filled again for every block.

    Attributes:
        kept: What was kept of each expert, weighted, 0 where nothing was: (expert, entry), fp32.
            The caller fills it; `keep_agreeing` overwrites it.
        signs: The elected signs, 1, -1 or, where nobody votes or wins, 0; fp32.
        undecided: Entries on which experts vote and none wins, ascending; of the last election.
    """

    def __init__(self, experts: int, entries: int) -> None:
        """Make room for blocks of exactly so many entries."""
        assert entries <= _MOST_ENTRIES, "a block is short"
        self.kept: Float[Tensor, "expert entry"] = torch.empty(experts, entries)
        self.signs: Float[Tensor, " entry"] = torch.empty(entries)
        self.undecided: Int64[ndarray, " some"] = np.empty(0, np.int64)
        self._total = torch.empty(entries)
        self._spare = torch.empty(entries)
        self._agreeing = np.empty(entries, np.min_scalar_type(experts))
        self._flags = np.empty(entries, bool)

    def elect(self, elect: Elect) -> None:
        """Find the sign that wins each entry.

        Sums within rounding of 0 are summed again in fp64: the order of experts flips no sign.

        Args:
            elect: Whether experts vote with the magnitude kept, or one vote each.
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
        self.undecided = doubtful
        if len(doubtful):
            for some in few_at_once(doubtful):
                votes = self.kept.numpy()[:, some].astype(np.float64)
                sums = np.sign((votes if elect == "mass" else np.sign(votes)).sum(axis=0))
                self.signs.numpy()[some] = sums
            self.undecided = doubtful[self.signs.numpy()[doubtful] == 0]

    def majority_votes(self) -> int:
        """Entries that elected + minus entries that elected -; before undecided ones are given."""
        return int(self.signs.sum())

    def give_undecided(self, majority: int) -> None:
        """Give undecided entries this sign: 1, -1, or 0 for none."""
        self.signs.numpy()[self.undecided] = majority

    def merged_alone(
        self, entries: Int64[ndarray, " some"], majority: int, reduce: Reduce
    ) -> Float[Tensor, " some"]:
        """What `merge` would make of these entries alone if this were their sign; fp32."""
        alone = Ballot(len(self.kept), len(entries))
        torch.index_select(self.kept, 1, torch.from_numpy(entries), out=alone.kept)
        alone.signs.fill_(majority)
        return alone.merge(reduce)

    def merge(self, reduce: Reduce) -> Float[Tensor, " entry"]:
        """Reduce, entry by entry, the experts whose sign is the elected one; 0 if there is none.

        Returns:
            fp32; overwritten by the next block.
        """
        self.keep_agreeing()
        if reduce == "max":
            return torch.amax(self.kept, dim=0, out=self._total).mul_(self.signs)
        total = self.sum_of_kept().mul_(self.signs)
        return total.div_(self._count()) if reduce == "mean" else total

    def keep_agreeing(self) -> None:
        """Leave of `kept` the magnitudes of the entries that have the elected sign; 0 elsewhere."""
        self.kept.mul_(self.signs).relu_()

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
        # All bits that some experts have make a number no less than each of theirs, 0 if all are;
        # or none at all (NaN), and then nothing is trusted. The last expert may be left out: it is
        # added to the sum of the others, and what rounds is that sum, not the last addition.
        first, *others = self.kept[: max(1, len(self.kept) - 1)].view(torch.int32)
        largest = self._spare
        bits = largest.view(torch.int32)
        if len(self.kept) < 3:
            bits.copy_(first)
        else:
            torch.bitwise_or(first, others[0], out=bits)
        for row in others[1:]:
            bits.bitwise_or_(row)
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
