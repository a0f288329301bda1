"""Electing one sign an entry, and merging the experts that agree with it (TIES, steps 2 and 3).

Sums go over the experts in order, entry by entry, so that how entries are cut into blocks changes
nothing. NumPy compares five times as fast as torch on one core, torch clamps four times as fast as
NumPy; hence both, on the same memory.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

Elect = Literal["mass", "count"]
Reduce = Literal["mean", "sum", "max"]


class Ballot:
    """Room for the votes on a block of entries, made once and filled again for every block.

    Attributes:
        kept: What was kept of each expert, weighted, 0 where nothing was: (expert, entry), fp32.
            The caller fills it.
        gains, losses: Σ of the positive, and of the negative, entries kept; fp32.
        ups, downs: How many there are of each.
        up, down: Whether the elected sign is positive, or negative; neither where nobody votes.
    """

    def __init__(self, experts: int, entries: int) -> None:
        """Make room for blocks of exactly so many entries."""
        self.kept: Float[Tensor, "expert entry"] = torch.empty(experts, entries)
        self.gains, self.losses = np.empty((2, entries), np.float32)
        self.ups, self.downs = np.empty((2, entries), np.min_scalar_type(experts))
        self.up, self.down = np.empty((2, entries), bool)
        self._flags = np.empty(entries, bool)
        self._spare = np.empty(entries, np.float32)

    def majority_votes(self, elect: Elect) -> int:
        """Entries that elect + minus entries that elect -; undecided ones have no vote."""
        self.elect(elect, majority=0)
        return int(np.count_nonzero(self.up)) - int(np.count_nonzero(self.down))

    def merge(self, elect: Elect, majority: int, reduce: Reduce) -> Float[Tensor, " entry"]:
        """Reduce, entry by entry, the experts whose sign is the elected one; 0 if there is none.

        Args:
            elect: As in `elect`.
            majority: As in `elect`.
            reduce: What becomes of entries that agree.

        Returns:
            fp32; its memory is that of `gains`.
        """
        self.elect(elect, majority)
        if reduce == "max":
            self.gains[:] = self.kept.amax(dim=0).clamp_min(0)
            self.losses[:] = self.kept.amin(dim=0).clamp_max(0)
        elif reduce == "mean" and elect == "mass":
            self._count()
        total = torch.from_numpy(self.winning())
        if reduce == "mean":
            self.ups *= self.up.view(np.uint8)
            self.downs *= self.down.view(np.uint8)
            np.copyto(self._spare, np.add(self.ups, self.downs, out=self.ups))
            total.div_(torch.from_numpy(self._spare).clamp_min_(1))
        return total

    def elect(self, elect: Elect, majority: int) -> None:
        """Find the sign that wins each entry: `up` and `down`.

        Sums within rounding of 0 are summed again in fp64: the order of experts flips no sign.

        Args:
            elect: Whether experts vote with the magnitude kept, or one vote each.
            majority: The sign (1, -1 or 0) of entries on which experts vote and none wins.
        """
        self._sum()
        if elect == "count":
            self._count()
            np.greater(self.ups, self.downs, out=self.up)
            np.less(self.ups, self.downs, out=self.down)
        else:
            margin = np.float32(-1 - (len(self.kept) + 2) * 2.0**-23)
            np.greater(self.gains, np.multiply(self.losses, margin, out=self._spare), out=self.up)
            np.less(self.losses, np.multiply(self.gains, margin, out=self._spare), out=self.down)
        doubtful = self._doubtful()
        if len(doubtful):
            votes = self.kept.numpy()[:, doubtful].astype(np.float64)
            sums = (votes if elect == "mass" else np.sign(votes)).sum(axis=0)
            self.up[doubtful] = (sums > 0) | ((sums == 0) & (majority > 0))
            self.down[doubtful] = (sums < 0) | ((sums == 0) & (majority < 0))

    def winning(self) -> Float[ndarray, " entry"]:
        """Σ of the entries with the elected sign, in place of `gains`."""
        np.multiply(self.gains, self.up, out=self.gains)
        np.multiply(self.losses, self.down, out=self._spare)
        return np.add(self.gains, self._spare, out=self.gains)

    def _doubtful(self) -> Int64[ndarray, " some"]:
        """Entries on which experts vote for both sides and neither has won yet."""
        np.greater(self.gains, 0, out=self._flags)
        np.greater(self._flags, self.up, out=self._flags)
        np.greater(self._flags, self.down, out=self._flags)
        return np.flatnonzero(self._flags)

    def _sum(self) -> None:
        gains, losses, spare = map(torch.from_numpy, (self.gains, self.losses, self._spare))
        torch.clamp_min(self.kept[0], 0, out=gains)
        torch.clamp_max(self.kept[0], 0, out=losses)
        for row in self.kept[1:]:
            gains.add_(torch.clamp_min(row, 0, out=spare))
            losses.add_(torch.clamp_max(row, 0, out=spare))

    def _count(self) -> None:
        self.ups.fill(0)
        self.downs.fill(0)
        for row in self.kept.numpy():
            self.ups += np.greater(row, 0, out=self._flags).view(np.uint8)
            self.downs += np.less(row, 0, out=self._flags).view(np.uint8)
