"""Entries on which no sign wins, told as tensors are merged and decided once all have voted."""

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor


class Undecided:
    """Entries on which experts vote and none wins, which are merged as if + had the majority.

    Attributes:
        votes: Entries that elect + minus entries that elect -, of all that were merged.
    """

    def __init__(self) -> None:
        """Nothing has been merged."""
        self.votes = 0
        self._places: list[Tensor] = []
        self._negative: list[Tensor] = []

    def add(
        self, votes: int, places: Int64[ndarray, " some"], negative: Float[Tensor, " some"]
    ) -> None:
        """Tell of a block: its votes, which entries are undecided, what - would make of them."""
        self.votes += votes
        self._places.append(torch.from_numpy(places))
        self._negative.append(negative)

    @property
    def places(self) -> Int64[Tensor, " some"]:
        """Flat indices of the undecided entries in what was merged, ascending."""
        return torch.cat(self._places) if self._places else torch.empty(0, dtype=torch.int64)

    @property
    def negative(self) -> Float[Tensor, " some"]:
        """What is merged there if - has the majority; if neither sign has, it is 0."""
        return torch.cat(self._negative) if self._negative else torch.empty(0)
