"""BitDelta without its distillation: the sign of every entry, and one scale a matrix.

arXiv:2402.10193. There the scales are then trained against the fine-tuned model's outputs; here
they are where that training starts, which needs no data. The paper counts exact zeros as positive
(`zeros` "positive"). By default they stay zero: a mask says where they are, and they are no part of
the mean. The difference is that of bf16 checkpoints, where many small updates round to nothing.
"""

from collections.abc import Iterable
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec, TensorSpec
from personae.methods._codec import Bits, Codec, Context, Rest, Treatment
from personae.methods._registry import codec
from personae.methods._site import is_projection
from personae.ops.bits import pack, packed_size, unpack
from personae.ops.chunks import by_chunks, chosen, put
from personae.ops.masks import decode_mask, encode_mask, mask_layout
from personae.ops.parts import cut
from personae.ops.sums import absolute_sum


@codec(paper="arXiv:2402.10193")
class BitDelta(Codec):
    """Every entry but exact zeros becomes its sign times the mean magnitude of its tensor.

    By default only attention and MLP matrices (linear layers inside the numbered blocks) are
    coded, the rest stays exact.

    Parts:
        mask, gaps: the entries that are not zero (see `ops.masks`); absent if none is zero, or
            zeros are positive.
        signs: a bit for each of these, 1 for negative.
        scale: fp32, [1].

    A zero delta has no parts.
    """

    tensors: Literal["projections", "all"] = Field(
        default="projections", description="What is coded: attention and MLP matrices, or all."
    )
    rest: Rest = Field(
        default="exact", description="Tensors not coded: exact, or left as in the reference."
    )
    zeros: Literal["zero", "positive"] = Field(
        default="zero", description="Exact zeros stay zero, or become + scale as in the paper."
    )

    def treats(self, spec: TensorSpec) -> Treatment:
        """Attention and MLP matrices are coded, or everything."""
        if self.tensors == "all" or is_projection(spec.name, spec.shape):
            return "code"
        return self.rest

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Keep signs and the mean magnitude."""
        flat = delta.flatten()
        if not flat.any():
            return {}
        changed = flat != 0 if self.zeros == "zero" else torch.ones_like(flat, dtype=torch.bool)
        scale = absolute_sum(flat) / int(changed.count_nonzero())
        mask = {} if changed.all() else encode_mask(changed)
        negative = by_chunks(lambda part: part < 0, torch.uint8, flat)
        signs = pack(chosen(negative, changed) if mask else negative, 1)
        return mask | {"signs": signs, "scale": flat.new_full((1,), scale)}

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        scale = cut(parts, "scale", [1])[0]
        delta = torch.zeros(shape, device=scale.device)
        if "mask" in parts:
            changed = decode_mask(parts, delta.numel())
        else:
            changed = torch.ones(delta.numel(), dtype=torch.bool, device=scale.device)
        count = int(changed.count_nonzero())
        signs = unpack(cut(parts, "signs", [packed_size(count, 1)])[0], count, 1)
        put(delta, changed, lambda a, b: torch.where(signs[a:b].bool(), -scale, scale))
        return delta

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """A mask if some entry is zero, a sign for each other entry, a scale."""
        count = torch.Size(shape).numel()
        mask = {name: spec._replace(optional=True) for name, spec in mask_layout(count).items()}
        return {
            **mask,
            "signs": PartSpec(torch.uint8, 1, packed_size(count, 1)),
            "scale": PartSpec.of(torch.float32, 1),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """A bit an element; scales are not counted."""
        count = torch.Size(shape).numel()
        return Bits(count, count, 8 * (packed_size(count, 1) + 4) if count else 0)

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        """A bit an element, where zeros stay zero."""
        return 8 * packed_size(torch.Size(shape).numel(), 1) if self.zeros == "zero" else 0

    def remark(self, coded: Iterable[tuple[tuple[int, ...], Parts]]) -> str:
        """How many exact zeros there were, if any."""
        total = zeros = 0
        for shape, parts in coded:
            total += prod(shape)
            if "mask" in parts:
                zeros += prod(shape) - int(decode_mask(parts, prod(shape)).count_nonzero())
        if not zeros:
            return ""
        return (
            f"{100 * zeros / total:.2g} % of the coded entries are exactly zero and stay so; the "
            "paper makes them positive (zeros: positive)"
        )
