"""Singular values of the stack against those of one expert (appendix D of the DRM paper).

Were all N experts alike, σ_i(C) would be √N σ_i(ΔW_t). With E_j = ΔW_j - ΔW_t, Weyl's inequality
on C Cᵀ = Σ_j ΔW_j ΔW_jᵀ gives |σ_i(C)² - N σ_i(ΔW_t)²| ≤ Σ_j (2 ‖ΔW_t‖ ‖E_j‖ + ‖E_j‖²), and
division by √N σ_i(ΔW_t) the bound. The norms are spectral: the tightest for which this holds.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from personae.methods.analyses._findings import Findings, Side, oriented


def singular_value_bound(
    stack: Float[Tensor, "expert out in"], *, direction: Side = "horizontal"
) -> Findings:
    """Singular values of the stack, what copies of each expert would have, and the bound on both.

    Args:
        stack: One task vector per expert; fp32, computed in fp64.
        direction: As in DRM.

    Returns:
        `stack`: σ_i(C), descending. For each expert `copies`: √N σ_i(ΔW_t), and `bound`, null
        where σ_i(ΔW_t) is 0 (below 1e-12 of its largest). `largest_deviation`: the largest
        |σ_i(C) - √N σ_i(ΔW_t)| relative to σ₁(C); `largest_share`: its largest share of the bound,
        which is 1 at most.
    """
    exact = oriented(stack, direction).double()
    experts = len(exact)
    together = torch.linalg.svdvals(torch.cat(list(exact), dim=1))
    alone = torch.linalg.svdvals(exact)
    count = alone.shape[1]
    copies = experts**0.5 * alone
    gaps = torch.stack([torch.linalg.matrix_norm(exact - one, ord=2) for one in exact])
    slack = (2 * alone[:, :1] * gaps + gaps.square()).sum(dim=1, keepdim=True)
    sound = alone > 1e-12 * alone[:, :1]
    bound = torch.where(sound, slack / torch.where(sound, copies, 1), torch.inf)
    deviation = (together[:count] - copies).abs()
    used = torch.where(bound > 0, deviation / bound, 0)
    top = float(together[0]) or 1.0
    return {
        "stack": together.tolist(),
        "copies": copies.tolist(),
        "bound": [[b if b < torch.inf else None for b in row] for row in bound.tolist()],
        "largest_deviation": float(deviation.max()) / top,
        "largest_share": float(used.max()),
    }
