"""Blocks of tensors through a codec, with those it does not code kept exact or left out."""

from collections.abc import Collection, Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec
from personae.methods._codec import Bits, Codec, Context, Treatment
from personae.ops.bits import pack, unpack
from personae.ops.parts import cut
from personae.ops.rows import rows_spec, touched_rows


def encode_block(
    codec: Codec,
    treatment: Treatment,
    delta: Float[Tensor, "..."],
    svd: SVD | None = None,
    context: Context | None = None,
) -> Parts:
    """Parts of one block: the codec's; or what keeps it exact; or none."""
    if treatment == "code":
        return codec.encode(delta, svd, context)
    return _exact(delta) if treatment == "exact" and delta.any() else {}


def decode_block(
    codec: Codec, parts: Parts, shape: tuple[int, ...], shared: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Undo `encode_block`; parts that do not fit the shape are refused."""
    if parts.keys() == {"exact"}:
        return cut(parts, "exact", [prod(shape)])[0].reshape(shape).clone()
    if parts.keys() == {"exact", "rows"}:
        touched = unpack(parts["rows"], shape[0], 1).bool()
        columns = prod(shape[1:])
        kept = cut(parts, "exact", [int(touched.count_nonzero()) * columns])[0]
        delta = torch.zeros(len(touched), columns, device=kept.device)
        delta[touched] = kept.reshape(-1, columns)
        return delta.reshape(shape)
    return codec.decode(parts, shape, shared) if parts else torch.zeros(shape)


def block_layout(
    codec: Codec, parts: Collection[str], shape: tuple[int, ...], rank: int | None = None
) -> Layout:
    """The parts that a block with parts of these names may have; see `Codec.layout`."""
    numel = prod(shape)
    if not numel or not parts:
        return {}
    names = set(parts)
    if names == {"exact"}:
        return {"exact": PartSpec.of(torch.float32, numel)}
    if names == {"exact", "rows"} and len(shape) > 1:
        exact = PartSpec(torch.float32, numel // shape[0], numel)
        return {"exact": exact, "rows": rows_spec(shape[0])}
    return codec.layout(shape, rank)


def misfits(
    codec: Codec, parts: Mapping[str, int], shape: tuple[int, ...], rank: int | None = None
) -> list[str]:
    """What is wrong with a stored block that says it has parts of these lengths.

    Args:
        codec: What decodes it.
        parts: Part name to number of elements.
        shape: Shape of the block.
        rank: Rank it says it has: 0 without parts, None without decomposition.
    """
    layout = block_layout(codec, parts, shape, rank)
    missing = {name for name, spec in layout.items() if not spec.optional} - parts.keys()
    faults = [f"part '{name}' is missing" for name in sorted(missing)]
    for name, length in parts.items():
        spec = layout.get(name, PartSpec.of(torch.uint8, 0))
        if name not in layout:
            faults.append(f"it has no part '{name}'")
        elif not spec.least <= length <= spec.most:
            faults.append(
                f"part '{name}' has {length} elements, expected {spec.least} to {spec.most}"
            )
    expected = {parts.get("singular_values")} if parts else {0, None}
    if rank not in expected:
        faults.append(f"rank {rank} is not the number of its singular values")
    return faults


def block_bits(
    codec: Codec, treatment: Treatment, shape: tuple[int, ...], rank: int | None = None
) -> Bits:
    """What `encode_block` stores of a delta without exact zeros; see `Codec.bits`."""
    if treatment == "code":
        return codec.bits(shape, rank)
    whole = 32 * prod(shape) if treatment == "exact" else 0
    return Bits(whole, whole, whole)


def _exact(delta: Float[Tensor, "..."]) -> Parts:
    """`exact`, its elements in fp32; of a matrix those of the rows marked in `rows`, if shorter."""
    if delta.ndim > 1:
        matrix = delta.reshape(len(delta), -1)
        touched = touched_rows(matrix)
        rows = pack(touched.to(torch.uint8), 1)
        kept = int(touched.count_nonzero()) * matrix.shape[1]
        if kept * delta.itemsize + rows.nbytes < delta.nbytes:
            return {"exact": matrix[touched].flatten(), "rows": rows}
    return {"exact": delta.flatten().clone()}
