"""Dropped percentage (figure 3 of the DRM paper): which basis vectors does pruning take away?

Rows of V_tᵀ of one expert have unequal lengths, as only the rows of all experts together have
length 1. Pruned as they are, short rows vanish and long ones stay whole; renormalised, each loses
about the same share.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods.analyses._findings import Findings, Side, oriented
from personae.methods.merge.drm import Share, kept_entries, rows_of_unit_length
from personae.ops.select import largest
from personae.ops.stacks import stacked_svd


def dropped_percentage(
    stack: Float[Tensor, "expert out in"],
    *,
    direction: Side = "horizontal",
    density: Density = 0.5,
    rank_tolerance: Share = 0.01,
) -> Findings:
    """Percentage of each basis vector that pruning drops, renormalised and as it is.

    Args:
        stack: One task vector per expert; fp32.
        direction: As in DRM.
        density: Fraction of entries kept of each expert by itself.
        rank_tolerance: As in DRM.

    Returns:
        `renormalised` and `as_is`: each `percent`, a list of rows by falling σ for each expert,
        and `spread`, the standard deviation of all of them in points.
    """
    svd = stacked_svd(oriented(stack, direction), rank_tolerance)
    return {
        "renormalised": _dropped(rows_of_unit_length(svd), density),
        "as_is": _dropped(svd.coordinates / svd.values[:, None], density),
    }


def _dropped(rows: Float[Tensor, "expert rank in"], density: float) -> Findings:
    marks = [largest(of_expert, kept_entries(of_expert.numel(), density)) for of_expert in rows]
    percent = 100 - 100 * torch.stack(marks).double().mean(dim=2)
    spread = float(percent.std(correction=0)) if percent.numel() else 0.0
    return {"percent": percent.tolist(), "spread": spread}
