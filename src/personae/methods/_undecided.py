"""Entries on which no sign wins, told as tensors are merged and decided once all have voted."""

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray


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
