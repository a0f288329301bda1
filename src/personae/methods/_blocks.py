"""Blocks of tensors through a codec, with those it does not code kept exact or left out."""

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Parts
from personae.methods._codec import Bits, Codec, Context, Treatment
from personae.ops.parts import cut


def encode_block(
    codec: Codec,
    treatment: Treatment,
    delta: Float[Tensor, "..."],
    svd: SVD | None = None,
    context: Context | None = None,
) -> Parts:
    """Parts of one block: the codec's; or `exact`, its elements in fp32; or none."""
    if treatment == "code":
        return codec.encode(delta, svd, context)
    return {"exact": delta.flatten().clone()} if treatment == "exact" and delta.any() else {}


def decode_block(
    codec: Codec, parts: Parts, shape: tuple[int, ...], shared: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Undo `encode_block`; parts that do not fit the shape are refused."""
    if parts.keys() == {"exact"}:
        return cut(parts, "exact", [prod(shape)])[0].reshape(shape).clone()
    return codec.decode(parts, shape, shared) if parts else torch.zeros(shape)


def block_bits(
    codec: Codec, treatment: Treatment, shape: tuple[int, ...], rank: int | None = None
) -> Bits:
    """What `encode_block` stores of a delta without exact zeros; see `Codec.bits`."""
    if treatment == "code":
        return codec.bits(shape, rank)
    whole = 32 * prod(shape) if treatment == "exact" else 0
    return Bits(whole, whole, whole)
