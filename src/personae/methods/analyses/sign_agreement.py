"""Sign agreement (section 6.2 and appendix F of the DRM paper): do experts pull one way?

At an entry where P experts are positive and M negative it is max(P, M) / (P + M): 0.5 to 1, and 1
wherever a single expert is left. Most of its level is such counting, not agreement: independent
random signs reach 84.7 % among eight experts of density 0.2. So what random signs would give stands
beside it.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from personae._types import Density
from personae.methods.analyses._findings import Findings, Side, oriented
from personae.methods.merge.drm import Share, kept_entries, rows_of_unit_length
from personae.ops.select import largest
from personae.ops.stacks import stacked_svd

BINS = 5
"""Bins of width 0.1 over [0.5, 1]; the last one holds 1."""


def sign_agreement(
    stack: Float[Tensor, "expert out in"],
    *,
    direction: Side = "horizontal",
    density: Density = 0.2,
    rank_tolerance: Share = 0.01,
) -> Findings:
    """Share of experts with the sign of most, in three spaces, beside that of random signs.

    Args:
        stack: One task vector per expert; fp32.
        direction: As in DRM.
        density: Fraction of entries kept over all experts before signs are counted.
        rank_tolerance: As in DRM.

    Returns:
        For `original` (ΔW pruned), `joint` (Ṽ pruned) and `projected` (the latter back in the
        original space, U Σ_t Ṽ_tᵀ): `agreement` and `random`, means over entries that anyone has
        kept; `histogram`, shares of these entries by agreement; `entries`, how many they are.
    """
    stack = oriented(stack, direction)
    svd = stacked_svd(stack, rank_tolerance)
    rows = rows_of_unit_length(svd)
    rows = rows * largest(rows, kept_entries(rows.numel(), density))
    lengths = torch.linalg.vector_norm(svd.coordinates, dim=2, keepdim=True)
    original = stack * largest(stack, kept_entries(stack.numel(), density))
    return {
        "original": agreement(original),
        "joint": agreement(rows),
        "projected": agreement(svd.basis @ (lengths * rows)),
    }


def agreement(entries: Float[Tensor, "expert ..."]) -> Findings:
    """Agreement in one space; zeros have no sign and do not count."""
    ups, downs = ((side > 0).sum(dim=0).flatten() for side in (entries, -entries))
    voters = ups + downs
    voted = voters > 0
    most = torch.maximum(ups, downs)[voted]
    densities = [float((one != 0).double().mean()) if one.numel() else 0.0 for one in entries]
    shares = most.double() / voters[voted]
    return {
        "agreement": float(shares.mean()) if len(shares) else 0.0,
        "random": random_agreement(densities),
        "histogram": _histogram(most, voters[voted]),
        "entries": len(shares),
    }


def random_agreement(densities: list[float]) -> float:
    """Expected agreement of independent random signs on independent supports of these densities.

    Over the number n of experts at an entry, given n ≥ 1, and k of them positive:
    Σ_n P(n) Σ_k C(n, k) 2^-n max(k, n - k) / n.
    """
    chances = [1.0]
    for density in densities:
        beside = [*[c * (1 - density) for c in chances], 0.0]
        chances = [b + c * density for b, c in zip(beside, [0.0, *chances], strict=True)]
    expected = sum(
        chance * sum(math.comb(n, k) * max(k, n - k) for k in range(n + 1)) / (2**n * n)
        for n, chance in enumerate(chances)
        if n
    )
    anyone = 1 - chances[0]
    return expected / anyone if anyone > 0 else 0.0


def _histogram(most: Int64[Tensor, " entry"], voters: Int64[Tensor, " entry"]) -> list[float]:
    """Share of entries in each bin; in integers, so that 3 of 5 is in the bin that 0.6 begins."""
    bins = ((10 * most) // voters - BINS).clamp(max=BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    return [float(count) / max(1, len(most)) for count in counts]
