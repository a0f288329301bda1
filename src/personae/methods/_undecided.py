"""Entries on which no sign wins, told as tensors are merged and decided once all have voted."""

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor


class Undecided:
    """Entries on which experts vote and none wins, which are merged as if neither sign did: to 0.

    Attributes:
        votes: Entries that elect + minus entries that elect -, of all that were merged.
        count: Undecided entries that were told of.
    """

    def __init__(self) -> None:
        """Nothing has been merged."""
        self.votes = self.count = 0
        self._places: list[Tensor] = []
        self._positive: list[Tensor] = []
        self._negative: list[Tensor] = []

    def add(
        self,
        places: Int64[ndarray, " some"],
        positive: Float[Tensor, " some"],
        negative: Float[Tensor, " some"],
    ) -> None:
        """Tell which entries are undecided, at least one, and what each sign would make of them."""
        self.count += len(places)
        self._places.append(torch.from_numpy(places))
        self._positive.append(positive)
        self._negative.append(negative)

    @property
    def places(self) -> Int64[Tensor, " some"]:
        """Flat indices of the undecided entries in what was merged, ascending."""
        return torch.cat(self._places) if self._places else torch.empty(0, dtype=torch.int64)

    @property
    def positive(self) -> Float[Tensor, " some"]:
        """What is to be merged there if + has the majority."""
        return torch.cat(self._positive) if self._positive else torch.empty(0)

    @property
    def negative(self) -> Float[Tensor, " some"]:
        """What is to be merged there if - has the majority."""
        return torch.cat(self._negative) if self._negative else torch.empty(0)
