"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, merge what agrees.

Departs from the original code in three small things. Its `kthvalue` rule keeps one entry more than
asked; here exactly k count, and entries that tie with the k-th are kept too, as a stream has no
first. Entries without a winner become 0 if the model as a whole has none either (there: negative).
Votes are summed in fp64, so that the order of experts cannot flip a sign.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from personae._types import Density
from personae.methods._merge import Gathering, Measure, Statistics
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.ops.select import (
    HIGH_BINS,
    LOW_BINS,
    count_high,
    count_low,
    find_bin,
    kept_count,
    magnitude,
)

_BLOCK = 1 << 16  # entries of each expert worked on at once: small enough for the cache


def _gather(parameters: Any, experts: int) -> Gathering:
    """Three looks: two find each expert's threshold by counting, one the majority sign."""
    counts = yield Measure("bins", lambda vectors, _, __: _each(_count_high, vectors))
    k = kept_count(int(counts[0].sum()), parameters.density)
    bins = [find_bin(of_expert, k) for of_expert in counts]

    def count_low_bits(vectors: Tensor, _: Any, __: Site) -> Tensor:
        highs = [high for high, _ in bins]
        return torch.stack([_count_low(v, h) for v, h in zip(vectors, highs, strict=True)])

    lows = yield Measure("thresholds", count_low_bits)
    found = zip(lows, bins, strict=True)
    thresholds = torch.tensor([magnitude(h, find_bin(low, rank)[0]) for low, (h, rank) in found])

    def vote(vectors: Tensor, _: Any, __: Site) -> Tensor:
        return _majority_votes(vectors, thresholds, parameters.elect)

    majority = yield Measure("majority", vote)
    assert experts == len(thresholds)
    return {"thresholds": thresholds, "majority": majority.sign()}


@merge_method(
    paper="arXiv:2306.01708",
    order_free=True,
    entrywise=everywhere,
    gather=_gather,
    looks=3,
    model_wide=("density", "scope", "elect"),
)
def ties(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    density: Density = 0.2,
    scope: Literal["model", "tensor"] = "model",
    reduce: Literal["mean", "sum", "max"] = "mean",
    elect: Literal["mass", "count"] = "mass",
    scale: float = 1.0,
    statistics: Statistics | None = None,
) -> Float[Tensor, "*shape"]:
    """Trim each task vector, elect one sign per entry, merge the entries that agree.

    Trim: τ̂_n keeps the `density` largest magnitudes of τ_n. Elect: σ_p = sgn Σ_n τ̂_np; entries
    whose sum is 0 take the majority sgn Σ_p σ_p. Merge: over A_p = {n : sgn τ̂_np = σ_p ≠ 0}.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        density: Fraction of entries kept of each expert (K in the paper).
        scope: Whether an expert is trimmed, and the majority taken, over the whole model (as
            in the paper) or over each tensor apart.
        reduce: Mean, sum or largest magnitude of the entries that agree.
        elect: Whether experts vote with their magnitudes (as in the paper) or one vote each.
        scale: Multiplier on the result (λ in the paper).
        statistics: `thresholds` (expert,), fp32, and `majority` (), int64, over the scope.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """
    assert statistics is not None, "ties needs its thresholds"
    thresholds = statistics["thresholds"]
    majority = float(statistics["majority"])
    merged = torch.empty_like(task_vectors[0], memory_format=torch.contiguous_format)
    blocks = _trimmed_blocks(task_vectors, thresholds)
    for trimmed, target in zip(blocks, merged.view(-1).split(_BLOCK), strict=True):
        signs = _elect(trimmed, elect)
        signs.masked_fill_(signs == 0, majority)
        target.copy_(scale * _merge(trimmed, signs, reduce))
    return merged


def _trimmed_blocks(
    task_vectors: Float[Tensor, "expert *shape"], thresholds: Float[Tensor, " expert"]
) -> Iterator[Float[Tensor, "expert entry"]]:
    """Zero what lies below each expert's threshold, a block of entries at a time."""
    # hardshrink zeroes what is at most its limit: the number just below the threshold. It is
    # thirty times faster than where().
    limits = torch.nextafter(thresholds, torch.zeros_like(thresholds)).tolist()
    entries = task_vectors.reshape(len(task_vectors), task_vectors[0].numel())
    for block in entries.split(_BLOCK, dim=1):
        rows = zip(block, limits, strict=True)
        yield torch.stack([functional.hardshrink(row, limit) for row, limit in rows])


def _elect(trimmed: Float[Tensor, "expert entry"], elect: str) -> Float[Tensor, " entry"]:
    """The sign that wins each entry: 1, -1, or 0 if none does."""
    votes = trimmed if elect == "mass" else trimmed.sign()
    return votes.sum(dim=0, dtype=torch.float64).sign().float()


def _merge(
    trimmed: Float[Tensor, "expert entry"], signs: Float[Tensor, " entry"], reduce: str
) -> Float[Tensor, " entry"]:
    """Merge, entry by entry, the experts whose sign is the elected one."""
    gains = _reduce(trimmed.clamp(min=0), reduce)
    losses = _reduce((-trimmed).clamp(min=0), reduce)
    return gains * signs.clamp(min=0) + losses * signs.clamp(max=0)


def _reduce(magnitudes: Float[Tensor, "expert entry"], reduce: str) -> Float[Tensor, " entry"]:
    """Reduce the magnitudes of one sign over the experts that have any; 0 if none has."""
    if reduce == "max":
        return magnitudes.amax(dim=0)
    total = magnitudes.sum(dim=0)
    return total if reduce == "sum" else total / magnitudes.sign().sum(dim=0).clamp(min=1)


def _majority_votes(
    task_vectors: Float[Tensor, "expert *shape"], thresholds: Float[Tensor, " expert"], elect: str
) -> Int64[Tensor, ""]:
    """Σ_p σ_p over the entries of one tensor: positive minus negative ones."""
    votes = torch.zeros((), dtype=torch.int64, device=task_vectors.device)
    for trimmed in _trimmed_blocks(task_vectors, thresholds):
        votes += _elect(trimmed, elect).sum().long()
    return votes


def _each(count: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    return torch.stack([count(vector) for vector in vectors])


def _count_high(vector: Tensor) -> Int64[Tensor, "65536"]:
    counts = torch.zeros(HIGH_BINS, dtype=torch.int64, device=vector.device)
    count_high(counts, vector)
    return counts


def _count_low(vector: Tensor, high: int) -> Int64[Tensor, "32768"]:
    counts = torch.zeros(LOW_BINS, dtype=torch.int64, device=vector.device)
    count_low(counts, vector, high)
    return counts
