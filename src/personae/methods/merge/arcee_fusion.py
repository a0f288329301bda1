"""Arcee Fusion (mergekit): take from one expert the entries whose change matters most.

The importance of an entry is its change times how far its row has moved, both rows read as
probabilities. An entry is taken where that is an outlier: above the median by 1.5 interquartile
ranges. mergekit finds the quartiles of large tensors in a random million of their entries; here in
all of them. No paper has it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from personae.errors import MethodError
from personae.methods._deltas import DeltaBlocks
from personae.methods._entries import Rank, Seen, Undecided, find_magnitudes
from personae.methods._merge import RowWise, as_function
from personae.methods._method import Passes, Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.methods.merge.slerp import between_two

_SMALLEST = 1e-8


@merge_method(paper="https://github.com/arcee-ai/mergekit")
class ArceeFusion(RowWise):
    """Take the entries of one expert that are important, and the base's elsewhere.

    Importance: |θ_1 - θ_0| · KL(p_1 ‖ p_0), p the softmax of the entry's row, 1e-8 added. Of each
    tensor, entries count that reach the median + 1.5 (third quartile - first quartile).

    Returns:
        The model, fp32.
    """

    needs: ClassVar = "models"
    takes: ClassVar = 2
    order_free: ClassVar = False
    whole_rows: ClassVar = True
    default_scope: ClassVar = "tensor"
    usual_passes: ClassVar = 2

    def check(self, experts: int, has_base: bool) -> str:
        """More or fewer models than two."""
        return between_two(self.name, experts, has_base)

    def working(self, experts: int) -> int:
        """The two models, their softmax, and what is made of these, in fp64."""
        return 7 * 8

    def passes(self, experts: int) -> Passes:
        """Those for the quartiles of the importance of a tensor's entries."""

        def seen(_: Any, site: Site) -> Seen:
            return lambda _, models: [importance(models, site)]

        def place(share: float, entries: int) -> int:
            return entries - int(share * (entries - 1)) if entries else 0

        shares = (0.25, 0.5, 0.75)
        ranks = [Rank(0, 1 - share, partial(place, share)) for share in shares]
        return {"quartiles": (yield from find_magnitudes(ranks, seen))}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        first, median, third = statistics["quartiles"].tolist()
        threshold = median + 1.5 * (third - first)
        for _, models in blocks:
            base, expert = models
            yield np.where(importance(models, site) >= threshold, expert, base)


def importance(models: Float[ndarray, "2 entry"], site: Site) -> Float[ndarray, " entry"]:
    """Of each entry of whole rows of the base and an expert: change times divergence.

    Raises:
        MethodError: if one is beyond float32.
    """
    base, expert = models.reshape(2, -1, site.row_entries).astype(np.float64)
    q, p = _softmax(base) + _SMALLEST, _softmax(expert) + _SMALLEST
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    found = np.abs((expert - base) * divergence).reshape(-1)
    if found.max(initial=0) > np.finfo(np.float32).max:
        raise MethodError(
            f"Tensor '{site.name}': the importance of an entry (its change times the divergence of "
            f"its row) is {found.max():.3g}, which exceeds the range of float32, although the "
            "models are finite. Is the expert one of this base?"
        )
    return found.astype(np.float32)


def _softmax(rows: Float[ndarray, "row entry"]) -> Float[ndarray, "row entry"]:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


arcee_fusion = as_function(ArceeFusion)
