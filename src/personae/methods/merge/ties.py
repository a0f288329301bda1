"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, merge what agrees.

Departs from the original code in three small things. Its `kthvalue` rule keeps one entry more than
asked; here exactly k count, and entries that tie with the k-th are kept too, as a stream has no
first. Entries without a winner become 0 if the model as a whole has none either (there: negative).
Votes are summed in fp64, so that the order of experts cannot flip a sign.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from personae._types import Density
from personae.methods._registry import Pass, merge_method
from personae.ops.select import (
    HIGH_BINS,
    LOW_BINS,
    count_high,
    count_low,
    find_bin,
    kept_count,
    kth_magnitude,
    magnitude,
)

_BLOCK = 1 << 16  # entries of each expert worked on at once: small enough for the cache

Statistics = Mapping[str, Tensor]


def _passes(parameters: Any) -> tuple[Pass, ...]:
    """Three rounds over the model: two find each expert's threshold, one the majority sign."""
    if parameters.scope == "tensor":
        return ()
    return (
        Pass("bins", _start_bins, _update_bins, _finish_bins),
        Pass("thresholds", _start_thresholds, _update_thresholds, _finish_thresholds),
        Pass("majority", _start_majority, _update_majority, _finish_majority),
    )


@merge_method(paper="arXiv:2306.01708", order_free=True, passes=_passes)
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
        statistics: For `scope="model"`: `thresholds` (expert,), fp32, and `majority` (), int64.

    Returns:
        The merged task vector, fp32; entries that no expert keeps are 0.
    """
    if scope == "tensor":
        statistics = _tensor_statistics(task_vectors, density, elect)
    assert statistics is not None, "ties over the whole model needs its statistics"
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


def _tensor_statistics(
    task_vectors: Float[Tensor, "expert *shape"], density: float, elect: str
) -> Statistics:
    """The same statistics as the passes gather, of one tensor alone."""
    k = kept_count(task_vectors[0].numel(), density)
    found = [kth_magnitude(vector, k)[0] if k else 0.0 for vector in task_vectors]
    thresholds = torch.tensor(found, dtype=torch.float32)
    majority = _majority_votes(task_vectors, thresholds, elect).sign()
    return {"thresholds": thresholds, "majority": majority}


def _start_bins(experts: int) -> Int64[Tensor, "expert 65536"]:
    return torch.zeros(experts, HIGH_BINS, dtype=torch.int64)


def _update_bins(state: Tensor, task_vectors: Tensor, _: Any, __: Statistics) -> Tensor:
    state = state.to(task_vectors.device)
    for counts, vector in zip(state, task_vectors, strict=True):
        count_high(counts, vector)
    return state


def _finish_bins(state: Tensor, parameters: Any, _: Statistics) -> Int64[Tensor, "expert 2"]:
    """The bin of each expert's k-th largest magnitude, and its rank in that bin."""
    k = kept_count(int(state[0].sum()), parameters.density)
    return torch.tensor([find_bin(counts, k) for counts in state.cpu()])


def _start_thresholds(experts: int) -> Int64[Tensor, "expert 32768"]:
    return torch.zeros(experts, LOW_BINS, dtype=torch.int64)


def _update_thresholds(
    state: Tensor, task_vectors: Tensor, _: Any, statistics: Statistics
) -> Tensor:
    state = state.to(task_vectors.device)
    highs = statistics["bins"][:, 0].tolist()
    for counts, vector, high in zip(state, task_vectors, highs, strict=True):
        count_low(counts, vector, high)
    return state


def _finish_thresholds(state: Tensor, _: Any, statistics: Statistics) -> Float[Tensor, " expert"]:
    bins = statistics["bins"].tolist()
    found = zip(state.cpu(), bins, strict=True)
    return torch.tensor([magnitude(high, find_bin(low, rank)[0]) for low, (high, rank) in found])


def _start_majority(_: int) -> Int64[Tensor, ""]:
    return torch.zeros((), dtype=torch.int64)


def _update_majority(
    state: Tensor, task_vectors: Tensor, parameters: Any, statistics: Statistics
) -> Tensor:
    votes = _majority_votes(task_vectors, statistics["thresholds"], parameters.elect)
    return state.to(task_vectors.device) + votes


def _finish_majority(state: Tensor, _: Any, __: Statistics) -> Int64[Tensor, ""]:
    return state.sign()
