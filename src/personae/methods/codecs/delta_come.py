"""Delta-CoMe without calibration: singular vectors in bands of decreasing precision.

arXiv:2406.08903. There a GPTQ procedure on sample texts quantises the vectors; here each value goes
to the nearest level of the same quantiser, which needs no data. The bands are the paper's: 2
vectors at 8 bits, 32 at 3 bits, then as many at 2 bits as keep the whole at one bit a weight, 1/16
of fp16. As there, attention and MLP matrices alone are coded by default.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Float16, UInt8
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec, TensorSpec
from personae.methods._codec import Bits, Codec, Context, Rest, Treatment
from personae.methods._registry import codec
from personae.methods._site import has_matrices, is_projection
from personae.ops.bits import pack, pack_planes, packed_size, planes_size, unpack, unpack_planes
from personae.ops.chunks import CHUNK
from personae.ops.parts import cut, part
from personae.ops.rows import product_in_rows, restore_rows, rows_spec, touched_rows

Count = Annotated[int, Field(ge=1)]
Precision = Annotated[int, Field(ge=1, le=8)]

GROUP = 128
"""Consecutive values of a vector that share a scale."""


@codec(paper="arXiv:2406.08903")
class DeltaCoMe(Codec):
    """Truncated SVD whose leading vectors take more bits than those that follow.

    A value of a vector at b bits becomes s · (c - z), c one of 0 … 2ᵇ - 1. Its `GROUP` neighbours
    share s, the step that cuts the range from their least to their largest value, 0 included, into
    2ᵇ - 1, and the zero point z, the code that stands for 0. What is not coded stays exact.

    Parts:
        singular_values: σ, fp32, [k].
        scales: fp16, s of each group: vector after vector of U, then of Vᵀ.
        codes: uint8: for each factor and each precision in it the codes of its vectors, each vector
            followed by the zero points of its groups, as planes of bits.
        rows: one bit a row, set for the rows of U that have codes; only if some rows are zero.

    A zero delta has no parts.
    """

    bands: tuple[tuple[Count, Precision], ...] = Field(
        default=((2, 8), (32, 3)), description="Leading vectors: how many, and bits a value."
    )
    rest_bits: Precision = Field(default=2, description="Bits a value of the vectors after these.")
    bits_per_weight: float = Field(
        default=1.0, gt=0, description="Vectors are kept while codes take no more than this."
    )
    tensors: Literal["projections", "all"] = Field(
        default="projections",
        description="What is coded: attention and MLP matrices, or all matrices.",
    )
    rest: Rest = Field(
        default="exact", description="Tensors not coded: exact, or left as in the reference."
    )

    def treats(self, spec: TensorSpec) -> Treatment:
        """Matrices are coded, or those of attention and MLP alone."""
        wanted = self.tensors == "all" or is_projection(spec.name, spec.shape)
        return "code" if has_matrices(spec.name, spec.shape) and wanted else self.rest

    def rank(self, shape: tuple[int, ...]) -> int:
        """The most vectors that stay below `bits_per_weight`, but at least one."""
        if len(shape) != 2 or not all(shape):
            return 0
        rows, columns = shape
        room = self.bits_per_weight * rows * columns / (rows + columns)
        rank, used = 0, 0
        for count, width in self.bands:
            fits = min(count, int((room - used) / width))
            rank, used = rank + fits, used + fits * width
            if fits < count:
                return min(max(rank, 1), *shape)
        return min(max(rank + int((room - used) / self.rest_bits), 1), *shape)

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Quantise the leading vectors, each band at its precision."""
        rank = self.rank(tuple(delta.shape))
        if rank == 0 or not delta.any():
            return {}
        u, singular_values, vh = svd or self.decompose(delta, rank)
        if not singular_values.any():
            return {}
        touched = touched_rows(delta)
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        for vectors in (u[touched, :rank].T, vh[:rank]):
            for width, start, stop in self._runs(len(vectors)):
                few = max(1, CHUNK // vectors.shape[1])
                pairs = [_quantise(some, width) for some in vectors[start:stop].split(few)]
                scales += [steps.flatten() for _, steps in pairs]
                codes.append(pack_planes(torch.cat([c for c, _ in pairs]).flatten(), width))
        parts = {
            "singular_values": singular_values[:rank].clone(),
            "scales": torch.cat(scales),
            "codes": torch.cat(codes),
        }
        return parts if touched.all() else parts | {"rows": pack(touched.to(torch.uint8), 1)}

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        (left, singular_values, right), touched = self._decode_triplets(parts, shape)
        return product_in_rows(left, singular_values[:, None] * right, touched)

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> SVD | None:
        """U, σ and Vᵀ, dequantised."""
        if len(shape) != 2 or "singular_values" not in parts:
            return None
        found, touched = self._decode_triplets(parts, shape)
        return found if touched is None else found._replace(u=restore_rows(found.u, touched))

    def _decode_triplets(
        self, parts: Parts, shape: tuple[int, ...]
    ) -> tuple[SVD, Bool[Tensor, " out"] | None]:
        """U of the rows that have codes, σ and Vᵀ; and which rows these are, if not all."""
        rows, columns = shape
        singular_values = part(parts, "singular_values")
        rank = len(singular_values)
        touched = unpack(parts["rows"], rows, 1).bool() if "rows" in parts else None
        lengths = [rows if touched is None else int(touched.count_nonzero()), columns]
        runs = list(self._runs(rank))
        sizes = [planes_size((b - a) * _codes(n), width) for n in lengths for width, a, b in runs]
        codes = iter(cut(parts, "codes", sizes))
        scales = cut(parts, "scales", [rank * _count(n) for n in lengths])
        factors: list[Tensor] = []
        for length, of_factor in zip(lengths, scales, strict=True):
            levels = [
                unpack_planes(next(codes), (b - a) * _codes(length), width).reshape(b - a, -1)
                for width, a, b in runs
            ]
            steps = of_factor.float().reshape(rank, -1)
            few = max(1, CHUNK // length)
            pairs = zip(torch.cat(levels).split(few), steps.split(few), strict=True)
            factors.append(torch.cat([_dequantise(*pair, length) for pair in pairs]))
        left, right = factors
        return SVD(left.T, singular_values, right), touched

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """Singular values, scales and codes of both factors, U with as few as one row."""
        if len(shape) != 2:
            return {}
        kept, (rows, columns) = min(rank or 0, *shape), shape
        runs = [(width, b - a) for width, a, b in self._runs(kept)]
        lengths = (1, rows, columns)
        codes = [sum(planes_size(k * _codes(n), width) for width, k in runs) for n in lengths]
        groups = [kept * _count(n) for n in lengths]
        return {
            "singular_values": PartSpec(torch.float32, 1, min(shape)),
            "scales": PartSpec(torch.float16, groups[0] + groups[2], groups[1] + groups[2]),
            "codes": PartSpec(torch.uint8, codes[0] + codes[2], codes[1] + codes[2]),
            "rows": rows_spec(rows),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """Codes and 32 bits a singular value; scales and zero points are not counted."""
        rank = self.rank(shape) if rank is None else rank
        if not rank:
            return Bits(0, 0, 0)
        runs = list(self._runs(rank))
        counted = sum(width * (b - a) for width, a, b in runs) * sum(shape) + 32 * rank
        code_bytes = sum(
            planes_size((b - a) * _codes(n), width) for n in shape for width, a, b in runs
        )
        groups = rank * sum(_count(n) for n in shape)
        return Bits(counted, counted, 8 * code_bytes + 16 * groups + 32 * rank)

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        """A bit a row."""
        return 8 * packed_size(shape[0], 1) if self.rank(shape) else 0

    def _runs(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """Bits a value, first and last vector of each run of one precision."""
        bands = ((min(count, rank), width) for count, width in self.bands)
        widths: Sequence[int] = [width for count, width in bands for _ in range(count)]
        widths = [*widths, *[self.rest_bits] * (rank - len(widths))][:rank]
        start = 0
        for width, run in groupby(widths):
            stop = start + len(list(run))
            yield width, start, stop
            start = stop


def _count(length: int) -> int:
    """Groups of a vector."""
    return -(-length // GROUP)


def _codes(length: int) -> int:
    """Codes of a vector, with the zero points of its groups."""
    return length + _count(length)


def _groups(vectors: Float[Tensor, "vector value"]) -> Float[Tensor, "vector group _"]:
    """Cut every vector into groups, the last one padded with zeros."""
    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % GROUP))
    return padded.reshape(len(vectors), -1, GROUP)


def _quantise(
    vectors: Float[Tensor, "vector value"], width: int
) -> tuple[UInt8[Tensor, "vector code"], Float16[Tensor, "vector group"]]:
    """Codes of the values of each vector, then zero points of its groups; and steps."""
    groups, top = _groups(vectors), (1 << width) - 1
    least, most = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    steps = ((most - least) / top).half()
    step = steps.float().where(steps > 0, torch.inf)  # codes of nothing but zeros are 0
    zeros = (-least / step).round().clamp(0, top)
    codes = ((groups / step[:, :, None]).round() + zeros[:, :, None]).clamp(0, top)
    return torch.cat([codes.flatten(1)[:, : vectors.shape[1]], zeros], dim=1).byte(), steps


def _dequantise(
    codes: Tensor, steps: Float[Tensor, "vector group"], length: int
) -> Float[Tensor, "vector value"]:
    """Undo `_quantise`, but for rounding."""
    zeros = codes[:, length:].float().repeat_interleave(GROUP, dim=1)[:, :length]
    return (codes[:, :length].float() - zeros) * steps.repeat_interleave(GROUP, dim=1)[:, :length]
