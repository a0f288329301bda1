"""Linear methods whose coefficients follow from the models: the Gram matrix of a tensor tells them.

Or those of its rows, or of its columns, each with coefficients of its own.
"""

from abc import abstractmethod
from collections.abc import Iterator
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae.methods._deltas import DeltaBlocks, delta_blocks
from personae.methods._entries import Undecided, weighted_sums
from personae.methods._merge import Linear
from personae.methods._method import Pass, Passes, Scope, Statistics
from personae.methods._site import Site

Span = Literal["tensor", "row", "column"]


class FromGram(Linear):
    """Σ c_n x_n of what it is given, models or task vectors; c from all inner products ⟨x_n, x_m⟩.

    Lengths and angles are all that is needed: one pass in fp64, and a second to sum. Those of rows
    are at hand when the row is.
    """

    usual_passes: ClassVar[int] = 1
    default_scope: ClassVar[Scope] = "tensor"

    @property
    def span(self) -> Span:
        """What has coefficients of its own: a tensor, a row along its last axis, or a column."""
        return "tensor"

    @abstractmethod
    def solve(self, gram: Float64[ndarray, "*vector model model"]) -> Float64[ndarray, "..."]:
        """The coefficients, (*vector, model), from the inner products of one vector of each model.

        Many vectors at once where the span is not the tensor.
        """
        ...

    def coefficients(self, experts: int) -> None:
        """They are another tensor by tensor."""
        return None

    def working(self, experts: int) -> int:
        """Beside sums, products with the coefficients of rows; of columns those in fp64."""
        beside = {"tensor": 0, "row": 4 * experts, "column": 8 * experts + 12}
        return super().working(experts) + beside[self.span]

    def passes(self, experts: int) -> Passes:
        """One pass, for the inner products, unless each row has its own."""
        if self.span == "row":
            return {}
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
        if self.span == "row":
            return self._by_rows(blocks, site)
        if self.span == "column":
            return _by_columns(blocks, statistics["coefficients"].numpy(), site)
        return weighted_sums(blocks, tuple(statistics["coefficients"].tolist()))

    def _by_rows(self, blocks: DeltaBlocks, site: Site) -> Iterator[Float[ndarray, " entry"]]:
        for _, deltas in blocks:
            rows = deltas.reshape(len(deltas), -1, site.row_entries)
            gram = np.zeros((rows.shape[1], len(rows), len(rows)))
            kernels.add_inner_products(rows, gram)
            found = self.solve(gram).astype(np.float32)
            yield (rows * found.T[:, :, None]).sum(axis=0).reshape(-1)


def _by_columns(
    blocks: DeltaBlocks, coefficients: Float64[ndarray, "column model"], site: Site
) -> Iterator[Float[ndarray, " entry"]]:
    factors = coefficients.T.astype(np.float32)
    for start, deltas in blocks:
        yield (deltas * factors[:, _columns(site, start, deltas)]).sum(axis=0)


def _inner_products(vectors: Tensor | DeltaBlocks, own: FromGram, site: Site) -> Tensor:
    blocks = delta_blocks(vectors, own.row_entries(site))
    experts = blocks.experts
    if own.span == "tensor":
        gram = np.zeros((1, experts, experts))
        for _, block in blocks:
            kernels.add_inner_products(block[:, None], gram)
        return torch.from_numpy(gram[0])
    columns = np.zeros((prod(site.shape[1:]), experts, experts))
    for start, block in blocks:
        exact, place = block.astype(np.float64), _columns(site, start, block)
        for n, m in zip(*np.triu_indices(experts), strict=True):
            columns[:, n, m] += np.bincount(place, exact[n] * exact[m], len(columns))
            columns[:, m, n] = columns[:, n, m]
    return torch.from_numpy(columns)


def _columns(
    site: Site, start: int, block: Float[ndarray, "model entry"]
) -> Int64[ndarray, " entry"]:
    """Which column each entry of a block is in: its place along all axes but the first."""
    first = site.start + start
    return np.arange(first, first + block.shape[1]) % prod(site.shape[1:])


def lengths(gram: Float64[ndarray, "*vector model model"]) -> Float64[ndarray, "..."]:
    """The models' Euclidean norms, (*vector, model)."""
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


def cosines(
    gram: Float64[ndarray, "*vector model model"],
) -> Float64[ndarray, "*vector model model"]:
    """Cosines of the angles between models; 0 with one that is all zeros."""
    norms = lengths(gram)
    norms[norms == 0] = np.inf
    return np.clip(gram / (norms[..., :, None] * norms[..., None, :]), -1, 1)


def pairs_of(experts: int) -> tuple[Int64[ndarray, " pair"], Int64[ndarray, " pair"]]:
    """The pairs of two experts, as indices of a Gram matrix."""
    return np.triu_indices(experts, 1)
