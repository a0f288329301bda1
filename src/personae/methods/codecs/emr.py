"""EMR-Merging: one unified vector for all tasks; a mask and a rescaler for each.

arXiv:2405.17461. The published numbers came from the code, whose rescaler is a quotient of sums of
each tensor's mean, so that every tensor weighs the same: the default. The paper's formula is one of
sums over the whole model: `rescaler` "global".
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec
from personae.methods._codec import Bits, Codec, Context
from personae.methods._method import Pass, Passes, scalars
from personae.methods._registry import codec
from personae.ops.bits import packed_size
from personae.ops.chunks import by_chunks, chunks
from personae.ops.masks import decode_mask, encode_mask, mask_layout
from personae.ops.parts import cut
from personae.ops.sums import absolute_sum


@codec(paper="arXiv:2405.17461")
class EMR(Codec):
    """A unified vector τ that all tasks share; for each task a mask on it and a scale.

    γ = sgn Σ τ_n, where 0 counts as negative. τ = γ · max |τ_n| over the experts whose sign is γ.
    The mask M_n marks entries where τ_n has the sign of τ, and λ_n = Σ |τ_n| / Σ |M_n τ|, sums over
    tensors of the mean of each. What is decoded is λ_n M_n τ.

    Parts:
        mask, gaps: the entries where the signs agree (see `ops.masks`).
        scale: λ_n, fp32, [1].

    A delta that agrees nowhere has no parts.
    """

    shares: ClassVar = True

    rescaler: Literal["global", "tensor_means"] = Field(
        default="tensor_means",
        description="λ from the mean of each tensor, as in the code, or from sums over the model.",
    )

    def degenerates(self, experts: int) -> str:
        """Two vectors are opposite, so that no entry of the unified one serves both."""
        return "half of each vector: those of two experts are opposite" if experts == 2 else ""

    def share(self, deltas: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """The unified vector: the elected sign with the largest magnitude that has it."""
        return by_chunks(_unified, torch.float32, *deltas).reshape(deltas[0].shape)

    def passes(self) -> Passes:
        """Both sums of the rescaler."""
        told = yield Pass("rescaler", self._sizes, apart=True)
        whole, masked = (
            torch.stack(list(told.values())).sum(dim=0).cpu().tolist() if told else (0, 0)
        )
        return scalars({"scale": whole / masked if masked else 1.0})

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Mark the entries whose sign is that of the unified vector."""
        context = context or self.alone(delta)
        if context.shared is None:
            return {}
        mask = encode_mask(_agree(delta, context.shared))
        scale = context.numbers["scale"]
        return mask | {"scale": delta.new_full((1,), scale)} if mask else {}

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """λ_n M_n τ; parts that do not fit the shape are refused."""
        if not parts or shared is None:
            return torch.zeros(shape)
        scale = cut(parts, "scale", [1])[0]
        delta = torch.zeros(shape, device=shared.device)
        for target, here, own in chunks(delta, decode_mask(parts, delta.numel()), shared):
            target[here] = scale * own[here]
        return delta

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """A mask and a scale."""
        return {
            **mask_layout(torch.Size(shape).numel()),
            "scale": PartSpec.of(torch.float32, 1),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """A bit an element; the rescaler is stored with each tensor and not counted."""
        count = torch.Size(shape).numel()
        return Bits(count, count, 8 * (packed_size(count, 1) + 4) if count else 0)

    def _sizes(self, delta: Float[Tensor, "..."], context: Context) -> Float[Tensor, "2"]:
        """Σ |τ_n| and Σ |M_n τ| of one tensor, or their means; fp64."""
        if context.shared is None:
            masked = torch.zeros_like(delta)
        else:
            masked = by_chunks(
                lambda a, b: b * _agreeing(a, b), torch.float32, delta, context.shared
            )
        sizes = torch.tensor([absolute_sum(part) for part in (delta, masked)], dtype=torch.float64)
        return sizes if self.rescaler == "global" else sizes / delta.numel()


def _unified(*deltas: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
    """The elected sign with the largest magnitude that has it."""
    total = deltas[0].double()
    for delta in deltas[1:]:
        total = total + delta
    elected = torch.where(total > 0, 1.0, -1.0)
    largest = torch.zeros_like(deltas[0])
    for delta in deltas:
        largest = torch.maximum(largest, delta * elected)
    return largest * elected


def _agree(delta: Float[Tensor, "..."], unified: Float[Tensor, "..."]) -> Bool[Tensor, " entry"]:
    """Where neither is 0 and the signs are the same; their product may underflow."""
    return by_chunks(_agreeing, torch.bool, delta, unified)


def _agreeing(one: Float[Tensor, " entry"], other: Float[Tensor, " entry"]) -> Tensor:
    return (one.sign() * other.sign()) > 0
