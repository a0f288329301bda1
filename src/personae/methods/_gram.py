"""Linear methods that find their coefficients in the models: a tensor's Gram matrix tells them."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import Linear, Scope
from personae.methods._method import Pass, Passes, Statistics
from personae.methods._site import Site


class FromGram(Linear):
    """Σ c_n x_n of what it is given, models or task vectors; c from all inner products ⟨x_n, x_m⟩.

    Lengths and angles are all that is needed of a tensor: one pass in fp64, and a second to sum.
    """

    rows: ClassVar[tuple[int, int]] = (0, 16)
    usual_passes: ClassVar[int] = 1
    default_scope: ClassVar[Scope] = "tensor"

    @abstractmethod
    def solve(self, gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
        """The coefficients, from the inner products of one tensor of each model."""
        ...

    def coefficients(self, experts: int) -> None:
        """They are another tensor by tensor."""
        return None

    def passes(self, experts: int) -> Passes:
        """One pass: the inner products."""
        gram = yield Pass("inner products", _inner_products)
        return {"coefficients": torch.from_numpy(self.solve(gram.numpy()))}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        return weighted_sums(blocks, tuple(statistics["coefficients"].tolist()))


def _inner_products(vectors: Tensor | DeltaBlocks, _: Any, __: Site) -> Tensor:
    blocks = delta_blocks(vectors)
    gram = torch.zeros(blocks.experts, blocks.experts, dtype=torch.float64)
    for _, block in blocks:
        exact = torch.from_numpy(block).double()
        gram += exact @ exact.T
    return gram


def lengths(gram: Float64[ndarray, "model model"]) -> Float64[ndarray, " model"]:
    """The models' Euclidean norms."""
    return np.sqrt(np.diagonal(gram))


def cosines(gram: Float64[ndarray, "model model"]) -> Float64[ndarray, "model model"]:
    """Cosines of the angles between models; 0 with one that is all zeros."""
    norms = lengths(gram)
    norms[norms == 0] = np.inf
    return np.clip(gram / np.outer(norms, norms), -1, 1)
