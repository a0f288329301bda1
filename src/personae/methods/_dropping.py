"""What the DARE methods share: entries dropped at random, and what is left made up for it."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from personae.methods._entries import Fill, PerExpert, blocks
from personae.methods._parameters import one_each
from personae.methods._site import Site
from personae.ops.draws import DRAW_VALUES, keep_mask, kept_values


def dropper(
    site: Site, *, density: PerExpert, weight: PerExpert, rescale: bool, seed: int, experts: int
) -> Fill:
    """`fill(start, rows, kept)` for `ballots`: what is kept of each expert, rescaled and weighted.

    With `rescale` what is kept is divided by the probability of keeping it, exactly that of the
    mask, so that its expectation is the task vector.
    """
    kept_of = [kept_values(each) for each in one_each(density, experts)]
    factors = [
        each * DRAW_VALUES / kept if rescale else each
        for each, kept in zip(one_each(weight, experts), kept_of, strict=True)
    ]

    def fill(start: int, rows: list[Tensor], targets: Tensor) -> None:
        for expert, (row, target) in enumerate(zip(rows, targets, strict=True)):
            kept = kept_of[expert]
            if kept == DRAW_VALUES:
                target.copy_(row)
            else:
                first = site.start + start
                mask = keep_mask(kept, first, len(row), seed=seed, name=site.name, expert=expert)
                np.copyto(target.numpy(), mask)  # numbers multiply faster than flags do
                target.mul_(row)
            if factors[expert] != 1:
                target.mul_(factors[expert])

    return fill


def dropped(
    task_vectors: Float[Tensor, "expert *shape"], fill: Fill
) -> Float[Tensor, "expert entry"]:
    """What `fill` keeps of the experts."""
    kept = torch.empty(len(task_vectors), task_vectors[0].numel())
    for start, rows in blocks(task_vectors):
        fill(start, rows, kept[:, start : start + len(rows[0])])
    return kept


def dropped_sum(
    task_vectors: Float[Tensor, "expert *shape"], fill: Fill, scale: float
) -> Float[Tensor, "*shape"]:
    """What `fill` keeps of the experts, added up in their order, times `scale`."""
    merged = torch.empty(task_vectors[0].numel())
    for start, rows in blocks(task_vectors):
        kept = torch.empty(len(rows), len(rows[0]))
        fill(start, rows, kept)
        total = kept[0]
        for row in kept[1:]:
            total += row
        torch.mul(total, scale, out=merged[start : start + len(total)])
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)
