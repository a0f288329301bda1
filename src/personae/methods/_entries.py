"""What entry-wise methods share: rows of entries a block at a time, and thresholds of trimming."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae.methods._merge import Measure, Statistics
from personae.methods._parameters import one_each
from personae.methods._site import Site
from personae.methods._undecided import Undecided
from personae.ops.select import Window, census, guess, kept_count, narrow, sample_counts
from personae.ops.signs import Ballot, Elect, Reduce, few_at_once

PerExpert = float | tuple[float, ...]
Fill = Callable[[int, list[Float[Tensor, " entry"]], Float[Tensor, "expert entry"]], None]
"""`fill(start, rows, kept)` writes what is kept of rows that begin at that entry."""

BLOCK = 1 << 19
"""Entries of each expert worked on at once: few enough for the last cache, many beside the cost of
a call."""


def blocks(
    task_vectors: Float[Tensor, "expert *shape"],
) -> Iterator[tuple[int, list[Float[Tensor, " entry"]]]]:
    """Cut the experts into blocks that fit the cache: the first entry, and a row an expert (views).

    On the CPU: these methods read each entry a few times, which does not pay for its way to
    another device.
    """
    entries = task_vectors.detach().reshape(len(task_vectors), task_vectors[0].numel()).cpu()
    for start in range(0, entries.shape[1], BLOCK):
        yield start, list(entries[:, start : start + BLOCK])


def weighted_sum(
    task_vectors: Float[Tensor, "expert *shape"], weight: PerExpert
) -> Float[Tensor, "*shape"]:
    """Σ w_n τ_n in the order of experts; every product and every sum is rounded once."""
    weights = one_each(weight, len(task_vectors))
    total = torch.empty(task_vectors[0].numel())
    product = torch.empty(min(BLOCK, len(total)))
    for start, rows in blocks(task_vectors):
        target = total[start : start + BLOCK]
        torch.mul(rows[0], weights[0], out=target)
        for row, each in zip(rows[1:], weights[1:], strict=True):
            target += row if each == 1 else torch.mul(row, each, out=product[: len(row)])
    return total.reshape(task_vectors.shape[1:]).to(task_vectors.device)


def mean(task_vectors: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """The mean, summed in the order of experts; that of `Tensor.mean` depends on the shape."""
    return weighted_sum(task_vectors, 1.0).div_(len(task_vectors))


def ballots(
    task_vectors: Float[Tensor, "expert *shape"], fill: Fill
) -> Iterator[tuple[slice, Ballot]]:
    """Blocks whose votes are in."""
    ballot = None
    for start, rows in blocks(task_vectors):
        if ballot is None or ballot.kept.shape[1] != len(rows[0]):
            ballot = Ballot(len(rows), len(rows[0]))
        fill(start, rows, ballot.kept)
        yield slice(start, start + len(rows[0])), ballot


def votes_by_mass(parameters: Any) -> bool:
    """Whether experts vote with magnitudes, which seldom cancel; one vote each often does."""
    return parameters.elect == "mass"


def votes(task_vectors: Float[Tensor, "expert *shape"], fill: Fill, elect: Elect) -> Tensor:
    """Entries that elect + minus entries that elect -: (), int64."""
    total = 0
    for _, ballot in ballots(task_vectors, fill):
        ballot.elect(elect)
        total += ballot.majority_votes()
    return torch.tensor(total)


def merge_elected(
    task_vectors: Float[Tensor, "expert *shape"],
    fill: Fill,
    *,
    elect: Elect,
    reduce: Reduce,
    scale: float,
    statistics: Statistics,
    undecided: Undecided | None,
) -> Float[Tensor, "*shape"]:
    """Elect a sign per entry, reduce what is kept and agrees, times `scale`.

    Undecided entries take the sign `majority` of the statistics; if that is not known yet, they
    become 0, and `undecided` is told what the signs would make of them.
    """
    majority = 0 if undecided is not None else int(statistics["majority"])
    merged = torch.empty(task_vectors[0].numel())
    for block, ballot in ballots(task_vectors, fill):
        ballot.elect(elect)
        if undecided is not None:
            undecided.votes += ballot.majority_votes()
            for some in few_at_once(ballot.undecided):
                undecided.add(
                    block.start + some,
                    ballot.merged_alone(some, 1, reduce).mul_(scale),
                    ballot.merged_alone(some, -1, reduce).mul_(scale),
                )
        ballot.give_undecided(majority)
        torch.mul(ballot.merge(reduce), scale, out=merged[block])
    return merged.reshape(task_vectors.shape[1:]).to(task_vectors.device)


def trim(
    rows: list[Float[Tensor, " entry"]],
    limits: list[float],
    weights: tuple[float, ...],
    kept: Float[Tensor, "expert entry"],
) -> None:
    """Write the entries whose magnitude is above the limit, times the weight; 0 for the others."""
    for row, limit, weight, target in zip(rows, limits, weights, kept, strict=True):
        torch.hardshrink(row, limit, out=target)  # thirty times as fast as where()
        if weight != 1:
            target.mul_(weight)


def limits_of(thresholds: Float[Tensor, " expert"]) -> list[float]:
    """The numbers just below the thresholds: what is above them is kept."""
    return torch.nextafter(thresholds, torch.zeros_like(thresholds)).tolist()


def _as_given(vectors: Tensor, _: Any, __: Site) -> Tensor:
    return vectors


def find_thresholds(
    density: PerExpert,
    experts: int,
    seen: Callable[[Tensor, Any, Site], Tensor] = _as_given,
) -> Generator[Measure, Tensor, Float[Tensor, " expert"]]:
    """Look for the smallest magnitude that each expert keeps: a sample, then one census or more.

    An expert of density 1 has threshold 0 and is not looked at.

    Args:
        density: Fraction of entries kept.
        experts: How many there are.
        seen: `seen(task_vectors, parameters, site)`: what is trimmed, made of the task vectors.
    """
    densities = one_each(density, experts)
    windows = [Window(0, 1) for _ in densities]
    trimming = [n for n, each in enumerate(densities) if each < 1]

    def sample(vectors: Tensor, own: Any, site: Site) -> Tensor:
        vectors = seen(vectors, own, site)
        return torch.stack([sample_counts(vectors[n]) for n in trimming])

    def count(vectors: Tensor, own: Any, site: Site) -> Tensor:
        vectors = seen(vectors, own, site)
        bins = max(windows[n].bins for n in trimming)
        return torch.stack([census(vectors[n], windows[n], bins) for n in trimming])

    if trimming:
        sampled = yield Measure("sample", sample, sample=64)
        for n, counts in zip(trimming, sampled, strict=True):
            windows[n] = guess(counts, densities[n])
    while not all(window.found for window in windows):
        counted = yield Measure("thresholds", count)
        for n, counts in zip(trimming, counted, strict=True):
            entries = int(counts[0])
            k = kept_count(entries, densities[n])
            windows[n] = narrow(counts, windows[n], k) if entries else Window(0, 1)
    return torch.tensor([window.magnitude for window in windows])
