"""Decom-Renorm-Merge (DRM): prune, elect and average in a basis that all experts share.

[ΔW₁ … ΔW_N] = U Σ [V₁ᵀ … V_Nᵀ] (DRM-H; DRM-V stacks downwards), each row of V_tᵀ is brought to
length 1, the lengths going to Σ_t, and the entries are merged as in TIES.

Where paper and published code differ, the numbers come from the code: directions of σ ≤ 1 % of σ₁
are dropped, and the tensors that are no linear layers are merged by sign election. Departs from the
code where it is at fault: exactly round(density · entries) are kept, experts without any change
cause no NaN, and `auto:orthogonality` compares cosines, so that it does not count directions.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.methods._entries import Undecided
from personae.methods._merge import MatrixWise, Side, as_function, stacked_memory
from personae.methods._method import Pass, Passes, Statistics, one_each
from personae.methods._registry import merge_method
from personae.methods._site import Site
from personae.ops.select import largest
from personae.ops.stacks import StackedSVD, stacked_rank, stacked_svd

Direction = Literal["horizontal", "vertical", "auto:rank", "auto:orthogonality"]
Share = Annotated[float, Field(ge=0, lt=1)]

RANK_TOLERANCE_OF_AUTO = 0.1
"""σ / σ₁ above which `auto:rank` counts a direction, as the published code does."""


@merge_method(paper="arXiv:2505.23117")
class DRM(MatrixWise):
    """Decompose all experts jointly, renormalise, merge entries of the joint basis.

    With A_t the entries of Σ_t V_tᵀ that pruning leaves and election agrees with, the result is
    scale · U Σ_t weight_t A_t / max(1, #{t : A_t ≠ 0}).

    Returns:
        The merged task vector, fp32. Zero where no expert has changed anything.
    """

    degenerates: ClassVar = "averaging if prune, elect and disjoint are all off and weight is 1"
    usual_passes: ClassVar = 1
    model_wide: ClassVar = ("others", "elect")

    direction: Direction = Field(
        default="horizontal",
        description=(
            "Stack weights (out, in) side by side (`horizontal`) or on top of each other "
            "(`vertical`), or choose for each tensor: `auto:rank` takes the stack with fewer "
            "directions of σ > 0.1 σ₁; `auto:orthogonality` takes the stack whose blocks V_t (or "
            "U_t, without Σ) overlap less, by the mean of |cosine| over pairs of flattened "
            "blocks. In a tie: vertical."
        ),
    )
    density: Density = Field(default=0.2, description="Fraction of entries kept by pruning.")
    pruning: Literal["joint", "individual"] = Field(
        default="joint", description="Whether one threshold holds for all experts or one for each."
    )
    renormalise: bool = Field(
        default=True,
        description="Whether pruning compares rows of unit length, or the entries of V_tᵀ.",
    )
    prune: bool = Field(default=True, description="Whether entries are pruned at all.")
    elect: bool = Field(
        default=True,
        description=(
            "Whether entries that disagree with the sign of Σ_t A_t are dropped; undecided ones "
            "take the sign that most entries elect."
        ),
    )
    disjoint: bool = Field(
        default=True,
        description="Whether to divide by the number of experts left at an entry, or by all.",
    )
    rank_tolerance: Share = Field(
        default=0.01,
        description=(
            "Directions of σ ≤ this · σ₁ are dropped (paper: none, code: 0.01); 0 drops the "
            "numerical null space alone."
        ),
    )
    rank_drop: Share = Field(
        default=0.0,
        description="Fraction of the remaining directions dropped, the smallest first (κ).",
    )
    scale: float = Field(default=1.0, description="Multiplier on the result.")
    weight: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "Multiplier on each expert as it is averaged (λ_t in the paper). It has no part in "
            "pruning, election and counting: an expert of weight 0 still votes and counts."
        ),
    )
    others: Literal["code", "paper"] = Field(
        default="code",
        description=(
            "Tensors that are not linear layers. `code`: elect and average as above without "
            "pruning; undecided entries take the majority over all these tensors. `paper`: Σ_t "
            "weight_t τ_t / N."
        ),
    )
    qkv: Literal["stacked", "split"] = Field(
        default="stacked",
        description=("Whether fused Q, K, V weights are one matrix, or three merged apart."),
    )

    def passes(self, experts: int) -> Passes:
        """One pass over all but linear layers: the sign that most of their entries elect."""
        if self.others == "paper" or not self.elect:
            return {}

        def vote(vectors: Tensor, _: Any, __: Site) -> Int64[Tensor, ""]:
            return elected(vectors).sum().long()

        majority = yield Pass("majority", vote, applies=_is_not_linear)
        return {"majority": majority.sign()}

    def equivariant(self, site: Site) -> Side:
        """DRM-H sees only U of what is on the left.

        U enters the result by U · (what is done to V_t) alone, so an orthogonal matrix from the
        left turns U and nothing else. A block of Q, K, V must not be mixed with others.
        """
        if site.kind != "linear" or self.direction.startswith("auto"):
            return "none"
        left = (self.direction == "horizontal") != site.transposed
        split = site.stacked_qkv() if self.qkv == "split" else ()
        if split and split[0].axis == (0 if left else 1):
            return "none"
        return "left" if left else "right"

    def memory(self, site: Site, experts: int) -> int:
        """Of one decomposition, or of both where they are compared."""
        one = stacked_memory(site, experts, stack=16, tall=37)
        return 2 * one if self.direction == "auto:orthogonality" else one

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        weights = one_each(self.weight, len(task_vectors))
        if site.kind != "linear":
            chosen = (self.elect, self.disjoint) if self.others == "code" else (False, False)
            majority = statistics["majority"] if statistics else None
            return self.scale * combine(task_vectors, weights, *chosen, majority)
        merged: list[Tensor] = []
        split = site.stacked_qkv() if self.qkv == "split" else ()
        for block in split or [None]:
            stack = task_vectors
            if block:
                stack = stack.narrow(block.axis + 1, block.start, block.stop - block.start)
            stack, stored_in_out = (stack.mT, True) if site.transposed else (stack, False)
            svd, vertical = decompose(stack, self.direction, self.rank_tolerance)
            svd = svd.cut(kept_rank(len(svd.values), self.rank_drop))
            entries = (
                pruned(svd, self.density, self.pruning, self.renormalise)
                if self.prune
                else svd.coordinates
            )
            product = svd.basis @ combine(entries, weights, self.elect, self.disjoint)
            merged.append(product.T if vertical != stored_in_out else product)
        whole = torch.cat(merged, dim=split[0].axis) if split else merged[0].contiguous()
        return whole.mul_(self.scale)


drm = as_function(DRM)


def _is_not_linear(_: Any, site: Site) -> bool:
    return site.kind != "linear"


def decompose(
    stack: Float[Tensor, "expert out in"], direction: Direction, rank_tolerance: float
) -> tuple[StackedSVD, bool]:
    """The joint decomposition in one direction, and whether it is that of the transposes."""
    if direction == "auto:orthogonality":
        across = stacked_svd(stack, rank_tolerance)
        down = stacked_svd(stack.mT, rank_tolerance)
        return (across, False) if overlap(across) < overlap(down) else (down, True)
    if direction == "auto:rank":
        ranks = [stacked_rank(side, RANK_TOLERANCE_OF_AUTO) for side in (stack, stack.mT)]
        direction = "horizontal" if ranks[0] < ranks[1] else "vertical"
    vertical = direction == "vertical"
    return stacked_svd(stack.mT if vertical else stack, rank_tolerance), vertical


def overlap(svd: StackedSVD) -> float:
    """Mean |cosine| over pairs of flattened blocks V_t; 0 for a single expert or empty blocks."""
    experts = len(svd.coordinates)
    blocks = (svd.coordinates / svd.values[:, None]).flatten(1)
    lengths = blocks.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    blocks = blocks / lengths[:, None]
    cosines = (blocks @ blocks.T).abs().fill_diagonal_(0)
    return float(cosines.sum()) / max(1, experts * (experts - 1))


def kept_rank(rank: int, rank_drop: float) -> int:
    """Directions left of `rank`: ⌊(1 − κ) · rank⌋, at least 1."""
    return min(rank, max(1, int((1 - rank_drop) * rank + 1e-9)))


def rows_of_unit_length(svd: StackedSVD) -> Float[Tensor, "expert rank in"]:
    """Ṽ_tᵀ: each row of V_tᵀ brought to length 1; rows of zeros stay zero."""
    floor = torch.finfo(torch.float32).tiny
    return svd.coordinates / svd.lengths.clamp(min=floor)[:, :, None]


def pruned(
    svd: StackedSVD, density: float, pruning: str, renormalise: bool
) -> Float[Tensor, "expert rank in"]:
    """Σ_t V_tᵀ where pruning keeps Ṽ_tᵀ (or V_tᵀ), zero elsewhere.

    Exactly round(density · entries) are kept, at least one: over all experts or of each.
    """
    compared = rows_of_unit_length(svd) if renormalise else svd.coordinates / svd.values[:, None]
    groups = [compared] if pruning == "joint" else list(compared)
    marks = [largest(group, kept_entries(group.numel(), density)) for group in groups]
    kept = marks[0] if pruning == "joint" else torch.stack(marks)
    for target, entries, kept_of in zip(compared, svd.coordinates, kept, strict=True):
        torch.mul(entries, kept_of, out=target)
    return compared


def kept_entries(numel: int, density: float) -> int:
    """Entries that pruning keeps: round(density · numel), at least 1 of any."""
    return min(numel, max(1, round(density * numel)))


def elected(entries: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """The sign of the sum over experts, 1, -1 or 0; in fp64, so that their order cannot flip it."""
    total = torch.zeros_like(entries[0], dtype=torch.float64)
    for of_expert in entries:
        total.add_(of_expert)
    return total.sign_().float()


def combine(
    entries: Float[Tensor, "expert *shape"],
    weights: Sequence[float],
    elect: bool,
    disjoint: bool,
    majority: Tensor | None = None,
) -> Float[Tensor, "*shape"]:
    """Elect a sign per entry and average what agrees; without `elect`, average everything.

    Undecided entries take the sign `majority`, by default the one most of these entries elect.
    """
    signs = None
    if elect:
        signs = elected(entries)
        signs.masked_fill_(signs == 0, float(signs.sum().sign() if majority is None else majority))
    total = torch.zeros_like(entries[0], memory_format=torch.contiguous_format)
    count, room = torch.zeros_like(total), torch.empty_like(total)
    for of_expert, weight in zip(entries, weights, strict=True):
        agreeing = of_expert
        if signs is not None:
            agreeing = torch.mul(of_expert, signs, out=room).clamp_(min=0)
        total.add_(agreeing, alpha=weight)
        if disjoint:
            count.add_(torch.sign(agreeing, out=room).abs_())  # faster than comparing with 0
    if signs is not None:
        total.mul_(signs)
    return total.div_(count.clamp_(min=1)) if disjoint else total.div_(len(entries))
