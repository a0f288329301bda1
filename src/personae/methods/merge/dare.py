"""DARE (Yu et al. 2024): drop entries of the task vectors at random, add up what is left.

The paper states the fraction dropped; here `density` is the fraction kept. Departs from its code:
masks are drawn for each tensor, expert and entry apart, not by a shared generator, so that the
order of the work does not matter (with another seed, name or place of an expert they differ). What
DTS's tables call DARE is density 0.4 without rescaling, of exactly that many entries.
"""

from jaxtyping import Float
from torch import Tensor

from personae._types import Density
from personae.methods._dropping import dropped_sum, dropper
from personae.methods._registry import everywhere, merge_method
from personae.methods._site import Site


@merge_method(
    paper="arXiv:2311.03099",
    order_free=False,
    entrywise=everywhere,
    aliases=("dare_linear",),
)
def dare(
    task_vectors: Float[Tensor, "expert *shape"],
    *,
    density: Density | tuple[Density, ...] = 0.4,
    weight: float | tuple[float, ...] = 1.0,
    rescale: bool = True,
    scale: float = 1.0,
    seed: int = 0,
    site: Site | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop entries at random, rescale the rest, add them up: scale · Σ w_n m_n τ_n / density_n.

    Args:
        task_vectors: One task vector per expert, stacked in recipe order; fp32.
        density: Probability that an entry is kept (1 - p of the paper), to the nearest 1/65536.
        weight: Coefficient of each expert; not divided by their sum.
        rescale: Whether what is kept is divided by the density, so that its expectation is τ_n.
        scale: Multiplier on the result.
        seed: Of the masks: same seed, same model.
        site: Which tensor, and from which entry on.

    Returns:
        The merged task vector, fp32.
    """
    assert site is not None, "dare needs to know which entries it is given"
    experts = len(task_vectors)
    fill = dropper(
        site, density=density, weight=weight, rescale=rescale, seed=seed, experts=experts
    )
    return dropped_sum(task_vectors, fill, scale)
