"""TIES-Merging (Yadav et al. 2023): trim, elect a sign, merge what agrees.

Departs from the original code in three small things. Its `kthvalue` rule keeps one entry more than
asked; here exactly k count, and entries that tie with the k-th are kept too, as a stream has no
first. Entries without a winner become 0 if the model as a whole has none either (there: negative).
Votes within rounding of a tie are summed in fp64, so that the order of experts cannot flip a sign.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._entries import PerExpert, ballots, find_thresholds, limits_of, trim
from personae.methods._merge import Gathering, Measure, Statistics
from personae.methods._parameters import one_each
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site
from personae.ops.signs import Ballot


def _gather(parameters: Any, experts: int) -> Gathering:
    """Looks that find each expert's threshold, and one for the majority sign."""
    thresholds = yield from find_thresholds(parameters.density, experts)
    limits = limits_of(thresholds)

    def vote(vectors: Tensor, own: Any, _: Site) -> Tensor:
        blocks = _trimmed(vectors, limits, own.weight)
        return torch.tensor(sum(ballot.majority_votes(own.elect) for _, ballot in blocks))

    # A single expert is never outvoted.
    majority = (yield Measure("majority", vote)) if experts > 1 else torch.tensor(0)
    return {"thresholds": thresholds, "majority": majority.sign()}


@merge_method(
    paper="arXiv:2306.01708",
    order_free=True,
    entrywise=everywhere,
    gather=_gather,
    looks=2,
    model_wide=("density", "scope"),
)
def ties(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    density: Density | tuple[Density, ...] = 0.2,
    weight: float | tuple[float, ...] = 1.0,
    scope: Literal["model", "tensor"] = "model",
    reduce: Literal["mean", "sum", "max"] = "mean",
    elect: Literal["mass", "count"] = "mass",
    scale: float = 1.0,
    statistics: Statistics | None = None,
) -> Float[Tensor, "*shape"]:
    """Trim each task vector, elect one sign per entry, merge the entries that agree.

    Trim: τ̂_n has the `density` largest magnitudes of τ_n, times w_n. Elect: σ_p = sgn Σ_n τ̂_np;
    undecided entries (sum 0) take the majority sgn Σ_p σ_p. Merge: the τ̂_np whose sign is σ_p.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        density: Fraction of entries kept of each expert (K in the paper).
        weight: Coefficient of each expert's trimmed task vector, before signs are elected: it
            weighs its vote and its share. The mean divides by how many agree, not by their
            weights, so that weights that are all 2 double the result; a negative one negates.
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
    limits = limits_of(statistics["thresholds"])
    majority = int(statistics["majority"])
    merged = torch.empty(task_vectors[0].numel())
    for block, ballot in _trimmed(task_vectors, limits, weight):
        torch.mul(ballot.merge(elect, majority, reduce), scale, out=merged[block])
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)


def _trimmed(
    task_vectors: Float[Tensor, "expert *shape"], limits: list[float], weight: PerExpert
) -> Iterator[tuple[slice, Ballot]]:
    weights = one_each(weight, len(task_vectors))

    def fill(_: int, rows: list[Tensor], kept: Tensor) -> None:
        trim(rows, limits, weights, kept)

    return ballots(task_vectors, fill)
