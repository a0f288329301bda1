"""Electing one sign an entry, and merging what agrees: steps 2 and 3 of TIES."""

from abc import abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._entries import MOST_TOLD, Fill, Undecided
from personae.methods._merge import RowWise
from personae.methods._method import Pass, Passes, Statistics
from personae.methods._site import Site

Elect = Literal["mass", "count"]
Reduce = Literal["mean", "sum", "max"]


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

    def give_undecided(self, sign: int, places: Int64[ndarray, " some"] | None = None) -> None:
        """Give undecided entries, or some of them, this sign: 1, -1, or 0 for none."""
        self.signs[self.undecided if places is None else places] = sign

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

    def merge_undecided(
        self, places: Int64[ndarray, " some"], reduce: Reduce, scale: float
    ) -> Float[ndarray, "2 some"]:
        """What `merge` would make of some of the undecided entries, if they were +, and if -."""
        either = np.empty((2, places.size), np.float32)
        kernels.reduce_either(self.kept, places, reduce == "mean", reduce == "max", either)
        if scale != 1:
            either *= np.float32(scale)
        return either


def _a_few_at_once(places: Int64[ndarray, " undecided"]) -> Iterator[Int64[ndarray, " some"]]:
    """The same, in order: what is told of them is several times as large as they are."""
    for start in range(0, places.size, MOST_TOLD):
        yield places[start : start + MOST_TOLD]


class Electing(RowWise):
    """Leave a part of each task vector, elect one sign per entry, merge the entries that agree.

    Undecided entries (sum 0) take the majority sign of the model or tensor.
    """

    can_decide_late: ClassVar = True
    counts_experts: ClassVar = False

    weight: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "Coefficient of what is left of each expert, applied before signs are elected. The "
            "mean divides by the number of experts that agree, not by the sum of their weights: "
            "if all weights are 2, the result doubles. A negative weight negates."
        ),
    )
    reduce: Reduce = Field(
        default="mean", description="Mean, sum or largest magnitude of the entries that agree."
    )
    elect: Elect = Field(
        default="mass",
        description=(
            "Whether experts vote with their magnitudes (as in the TIES paper) or one vote each."
        ),
    )
    scale: float = Field(default=1.0, description="Multiplier on the result (λ in the papers).")

    @abstractmethod
    def fill(self, site: Site, experts: int, statistics: Statistics) -> Fill:
        """Leaves of the task vectors what votes, weighted; 0 elsewhere."""
        ...

    def find(self, experts: int) -> Passes:
        """The passes that `fill` needs; by default none."""
        yield from ()
        return {}

    def working(self, experts: int) -> int:
        """Signs, places, and the sums and numbers of the experts that agree, or the votes."""
        return 4 + 8 + 4 + 4

    def is_late(self) -> bool:
        """With magnitudes votes seldom cancel; with one vote each they often do."""
        return self.elect == "mass"

    def passes(self, experts: int) -> Passes:
        """The passes of `find`, and one for the majority sign."""
        found = yield from self.find(experts)
        return {**found, **(yield from self._majority(experts, found))}

    def _majority(self, experts: int, found: Statistics) -> Generator[Pass, Any, dict[str, Tensor]]:
        def vote(vectors: Tensor | DeltaBlocks, own: Electing, site: Site) -> Tensor:
            total, fill = 0, own.fill(site, experts, found)
            for start, deltas in delta_blocks(vectors, own.row_entries(site)):
                fill(start, deltas)
                total += Ballot(deltas, own.elect).majority
            return torch.tensor(total)

        if experts == 1:  # is never outvoted
            return {"majority": torch.tensor(0)}
        majority = yield Pass("majority", vote, late=True)
        return {} if majority is None else {"majority": majority.sign()}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`.

        While the majority is not known, `undecided` is told what the signs would make of undecided
        entries, and says which they get so far.
        """
        majority = 0 if undecided is not None else int(statistics["majority"])
        fill = self.fill(site, blocks.experts, statistics)
        for start, deltas in blocks:
            fill(start, deltas)
            yield self._merge_block(start, deltas, majority, undecided)

    def _merge_block(
        self,
        start: int,
        deltas: Float[ndarray, "expert entry"],
        majority: int,
        undecided: Undecided | None,
    ) -> Float[ndarray, " entry"]:
        """One block of what is left; its votes are not held while the next one is voted on."""
        ballot = Ballot(deltas, self.elect)
        if undecided is not None:
            undecided.votes += ballot.majority
            for some in _a_few_at_once(ballot.undecided):
                either = ballot.merge_undecided(some, self.reduce, self.scale)
                ballot.give_undecided(undecided.add(start + some, *either), some)
        elif majority:
            ballot.give_undecided(majority)
        return ballot.merge(self.reduce, self.scale)
