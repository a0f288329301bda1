"""Effect of dropping directions (appendix of the DRM paper): what is left of stack and merge.

The paper reports accuracy, flat until κ is about 0.8. Without a task to measure on, this tells how
much energy of the stack goes and how far the merged matrix moves.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods.analyses._findings import Findings, Side, oriented
from personae.methods.merge.drm import Share, combine, kept_rank, pruned
from personae.ops.stacks import StackedSVD, stacked_svd

DROPS = tuple(n / 10 for n in range(10))


def rank_drop(
    stack: Float[Tensor, "expert out in"],
    *,
    direction: Side = "horizontal",
    density: Density = 0.2,
    pruning: Literal["joint", "individual"] = "joint",
    rank_tolerance: Share = 0.01,
) -> Findings:
    """Energy kept and change of the DRM merge as κ goes from 0 to 0.9.

    Args:
        stack: One task vector per expert; fp32.
        direction: As in DRM.
        density: As in DRM.
        pruning: As in DRM.
        rank_tolerance: As in DRM; drops what lies below before κ does.

    Returns:
        Lists over κ: `rank_drop`, `rank`, `energy` (Σσ² kept over Σσ² of the stack), `change`
        (‖ΔW(κ) - ΔW(0)‖² / ‖ΔW(0)‖²) and `cosine` of the merged matrices; `rank_tolerance_energy`:
        the energy that the tolerance alone leaves.
    """
    stack = oriented(stack, direction)
    svd = stacked_svd(stack, rank_tolerance)
    energies = svd.values.double().square()
    whole = float(stack.double().square().sum()) or 1.0
    ranks = [kept_rank(len(energies), drop) for drop in DROPS]
    merges = [_merged(svd.cut(rank), density, pruning).double() for rank in ranks]
    first = float(merges[0].norm()) or 1.0
    left = [float(energies[:rank].sum()) / whole for rank in ranks]
    return {
        "rank_drop": list(DROPS),
        "rank": ranks,
        "energy": left,
        "change": [float((merged - merges[0]).norm() / first) ** 2 for merged in merges],
        "cosine": [
            float((merged * merges[0]).sum() / (first * (merged.norm() or 1.0)))
            for merged in merges
        ],
        "rank_tolerance_energy": left[0],
    }


def _merged(svd: StackedSVD, density: float, pruning: str) -> Float[Tensor, "out in"]:
    entries = pruned(svd, density, pruning, renormalise=True)
    equal = torch.ones(len(entries)).tolist()
    return svd.basis @ combine(entries, equal, elect=True, disjoint=True)
