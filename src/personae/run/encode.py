"""Codes one expert's deltas, for one or several ranks from a single decomposition."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Parts
from personae.checkpoints import Checkpoint
from personae.errors import MethodError
from personae.family.chunks import rows_of
from personae.family.deltas import Deltas
from personae.family.effects import differs
from personae.family.finite import converging, is_finite
from personae.methods import Block, Codec, Context, Treatment, decode_block, encode_block
from personae.ops.sums import squared_norm
from personae.packs.writer import CodedTensor
from personae.run.costs import coding_bytes
from personae.run.known import Known, cut_out, whole
from personae.run.scan import TensorScan
from personae.run.work import Work


def encode_expert(
    deltas: Deltas,
    codecs: Sequence[Codec],
    scan: Mapping[str, TensorScan],
    known: Known,
    work: Work,
) -> list[dict[str, CodedTensor]]:
    """Code every changed tensor of one expert.

    Args:
        deltas: The expert's deltas.
        codecs: One codec, or several that differ in their `free` parameters alone.
        scan: What a first pass found, by reference name.
        known: What is known of the expert beside its deltas.
        work: Workers, memory, the device decompositions run on.

    Returns:
        For each codec, reference name to coded tensor, sorted by name.
    """
    names = [name for name in deltas.alignment.shared if scan[name].changed]
    coded: list[dict[str, CodedTensor]] = [{} for _ in codecs]
    for name, tensors in work.map(
        names,
        partial(_encode_tensor, deltas, codecs, known, work.torch_device),
        cost=lambda name: (
            deltas.alignment.kept_bytes + coding_bytes(codecs, deltas.reference.specs[name])
        ),
        stage=f"packing {deltas.alignment.name}",
    ):
        for place, tensor in zip(coded, tensors, strict=True):
            place[name] = tensor
    return [{name: place[name] for name in names} for place in coded]


def _encode_tensor(
    deltas: Deltas, codecs: Sequence[Codec], known: Known, device: torch.device, name: str
) -> list[CodedTensor]:
    """Code one tensor, block by block, with each codec."""
    delta = deltas.read(name)
    spec = deltas.reference.specs[name]
    treatment = codecs[0].treats(spec)
    blocks = (codecs[0].blocks(spec) if treatment == "code" else ()) or (whole(spec),)
    with converging(name):
        coded = [
            _encode_block(
                part, codecs, treatment, context, device, partial(_shows, deltas, name, block, part)
            )
            for block, context in zip(blocks, known.of(spec, blocks), strict=True)
            for part in [cut_out(delta, block)]
        ]
    energy = squared_norm(delta)
    for of_block in coded:
        for parts, lost, _ in of_block:
            _check_finite(name, parts, lost)
    return [
        CodedTensor(
            shape=spec.shape,
            blocks=blocks,
            parts=tuple(parts for parts, _, _ in of_codec),
            ranks=tuple(_rank(parts) for parts, _, _ in of_codec),
            energy=energy,
            relative_error=sum(lost for _, lost, _ in of_codec) / energy,
            shows=any(shows for _, _, shows in of_codec),
        )
        for of_codec in zip(*coded, strict=True)
    ]


def _encode_block(
    delta: Float[Tensor, "..."],
    codecs: Sequence[Codec],
    treatment: Treatment,
    context: Context,
    device: torch.device,
    shows: Callable[[Tensor], bool],
) -> list[tuple[Parts, float, bool]]:
    """Parts and squared error of one block for each codec, and whether `shows` its decoding.

    All are from a single decomposition.
    """
    shape = tuple(delta.shape)
    rank = max(codec.rank(shape) for codec in codecs) if treatment == "code" else 0
    svd = None
    if rank and bool(delta.any()):
        svd = SVD(*(factor.cpu() for factor in codecs[0].decompose(delta.to(device), rank)))
    coded: list[tuple[Parts, float, bool]] = []
    for codec in codecs:
        parts = encode_block(codec, treatment, delta, svd, context)
        decoded = decode_block(codec, parts, shape, context.shared)
        seen = bool(parts) and shows(decoded)
        coded.append((parts, squared_norm(torch.sub(delta, decoded, out=decoded)), seen))
    return coded


def _shows(
    deltas: Deltas,
    name: str,
    block: Block,
    delta: Float[Tensor, "..."],
    decoded: Float[Tensor, "..."],
) -> bool:
    """Whether a block's decoded delta changes any value of the reference in the dtype rebuilt.

    So it does, too, where the expert has the reference's own values, rounded to its dtype. Nearly
    always the largest entry shows: only that entry's row is read again.
    """
    dtype, reference = deltas.alignment.spec(name).dtype, deltas.reference
    if not decoded.ndim:
        own = reference.read(name).float()
        return differs(own + decoded, own, dtype) or not differs(
            own + delta, own, deltas.read_dtype(name)
        )
    extremes = [decoded.argmax(), decoded.argmin()]
    peak = max(extremes, key=lambda place: float(decoded.flatten()[place].abs()))
    place = list(torch.unravel_index(peak, decoded.shape))
    largest = decoded[tuple(place)]
    if decoded.ndim < len(reference.specs[name].shape):  # one matrix of a stack
        place.insert(0, torch.tensor(0))
    place[block.axis] = place[block.axis] + block.start
    row = int(place[0])
    own = reference.read_rows(name, row, row + 1)[0][tuple(place[1:])]
    if differs(own.float() + largest, own, dtype):
        return True
    moved, read_dtype = False, deltas.read_dtype(name)
    for rows, own in _reference_rows(reference, name, block, tuple(decoded.shape)):
        if differs(own + decoded[rows], own, dtype):
            return True
        moved = moved or differs(own + delta[rows], own, read_dtype)
    return not moved


def _reference_rows(
    reference: Checkpoint, name: str, block: Block, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Float[Tensor, "row ..."]]]:
    """The reference's values of a block of this shape, fp32, a few rows at a time."""
    if len(shape) < len(reference.specs[name].shape):  # one matrix of a stack
        yield slice(None), reference.read_rows(name, block.start, block.stop)[0].float()
        return
    whole = replace(reference.specs[name], shape=shape)
    for chunk in rows_of(whole):
        first = block.start if block.axis == 0 else 0
        own = reference.read_rows(name, first + chunk.start, first + chunk.stop)
        if block.axis:
            own = own.narrow(block.axis, block.start, block.stop - block.start)
        yield slice(chunk.start, chunk.stop), own.float()


def _check_finite(name: str, parts: Parts, lost: float) -> None:
    """Refuse a code that rebuilds no finite values.

    Raises:
        MethodError: naming the tensor and the part.
    """
    bad = [key for key, part in parts.items() if part.is_floating_point() and not is_finite(part)]
    if bad or not math.isfinite(lost):
        raise MethodError(
            f"Tensor '{name}' cannot be coded: {', '.join(bad) or 'what is rebuilt'} of its code "
            "leaves the range of its dtype. Leave the tensor out with 'skip', keep it whole with "
            "'private', or take another method."
        )


def _rank(parts: Parts) -> int | None:
    """Singular directions stored: 0 where the rank came out as 0, None without decomposition."""
    if not parts:
        return 0
    return len(parts["singular_values"]) if "singular_values" in parts else None
