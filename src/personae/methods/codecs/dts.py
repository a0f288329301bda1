"""DTS: decompose a delta, keep sign and magnitude level of its singular vectors, scale each group.

arXiv:2512.01461. The defaults are what the published numbers came from, where text and code of the
paper differ (groups over a whole factor, exact halves, stacked Q, K and V). Two departures: a
group takes 2 bits, since one of the paper's three masks follows from the others, and only singular
triplets above the numerical rank are kept: the papers' rule counts these, while the published
figures count the ranks asked for.

A group holds entries of one sign from all vectors of a factor, and the sign of a singular vector is
arbitrary: turning some of them changes the groups. The error does not tell the signs apart, but
single results moved by 4 to 17 % with them. By default the largest entry is positive, so that every
solver gives the same pack; `signs` "solver" keeps what comes out, as the published code does.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec, RankFraction, TensorSpec
from personae.errors import MethodError
from personae.methods._codec import Bits, Codec, Context, decompose_touched
from personae.methods._registry import codec
from personae.methods._site import Block, stacked_qkv
from personae.ops.bits import Width, pack, packed_size, unpack, unpack_values
from personae.ops.levels import Levels, Split, dequantise, groups, quantise, signed
from personae.ops.parts import cut, part
from personae.ops.rows import product_in_rows, restore_rows, rows_spec, touched_rows
from personae.ops.svd import svd_bytes
from personae.ops.zeros import decode_zeros, encode_zeros, zeros_layout


@codec(paper="arXiv:2512.01461")
class DTS(Codec):
    """Truncated SVD whose vectors are stored as sign and magnitude level, 2 bits an element.

    A matrix T ≈ U diag(σ) Vᵀ of `rank` triplets becomes Û diag(σ) V̂ᵀ, every entry of U and V
    replaced by the scale of its group and its sign. Biases, norms and (by default) convolutions
    are coded without a decomposition; scalars are exact.

    Parts:
        singular_values: σ, [k]; its length is the rank kept.
        scales: fp32, by factor, set and group code (see `ops.levels`).
        codes: uint8, those of U and then of Vᵀ, each vector after vector (so U by its columns),
            each factor padded to a byte.
        rows: one bit a row, set for the rows of U that have codes; only if some rows are zero.
        zeros, or zero_positions: where exact zeros are, only if there are any (see `ops.zeros`).
        exact: fp32, [1], a scalar as it is.

    A zero delta, or one of rank 0, has no parts.
    """

    bytes_per_entry: ClassVar = 9
    by_budget: ClassVar = "rank_fraction"
    free: ClassVar = frozenset(
        {
            "rank_fraction",
            "grouping",
            "split",
            "scales",
            "decomposition",
            "thresholding",
            "scaling",
            "singular_value_dtype",
        }
    )

    rank_fraction: RankFraction = Field(
        default=0.3, description="Singular triplets kept, as a fraction of the smaller dimension."
    )
    grouping: Literal["matrix", "vector"] = Field(
        default="matrix", description="Which values share scales: a whole factor, or one vector."
    )
    split: Literal["rank", "median"] = Field(
        default="rank", description="Large values: exactly half, or those above the median."
    )
    scales: Literal["rms", "mean"] = Field(
        default="rms", description="Scale of a group: keeps its norm, or its squared error least."
    )
    decomposition: bool = Field(default=True, description="Ablation: off codes the delta itself.")
    thresholding: bool = Field(default=True, description="Ablation: off keeps only signs, 1 bit.")
    scaling: bool = Field(default=True, description="Ablation: off makes every scale 1.")
    conv: Literal["flat", "matrix"] = Field(
        default="flat",
        description="Tensors of 3 or more axes: no decomposition, or seen as (out, rest).",
    )
    qkv: Literal["stacked", "split"] = Field(
        default="stacked", description="Fused Q, K, V: one matrix, or one of each."
    )
    signs: Literal["largest_positive", "solver"] = Field(
        default="largest_positive",
        description="Signs of singular vectors: largest entry positive, or as the solver returns "
        "them.",
    )
    solver: Literal["auto", "randomised", "gram", "full"] = Field(
        default="auto", description="Algorithm of the decomposition."
    )
    rank_tolerance: float | None = Field(
        default=None, ge=0, description="Fraction of σ₁ below which a singular value counts as 0."
    )
    singular_value_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Type the singular values are stored in."
    )

    def blocks(self, spec: TensorSpec) -> tuple[Block, ...]:
        """Three blocks for a fused Q, K, V weight if `qkv` is "split", else the whole tensor.

        See `Site.stacked_qkv`. Any split decodes right; it only decides what shares a basis.
        """
        fused = stacked_qkv(spec.name, spec.shape) if self.qkv == "split" else ()
        return fused or super().blocks(spec)

    def rank(self, shape: tuple[int, ...]) -> int:
        """`⌊rank_fraction · min(m, d)⌋`; 0 for what is coded without a decomposition.

        A matrix whose rank comes out as 0 (1 × 768 at 0.3) is dropped, as the paper's code does.
        """
        matrix = self._matrix(shape)
        return int(self.rank_fraction * min(matrix) + 1e-9) if matrix else 0

    def decompose(self, delta: Float[Tensor, "..."], rank: int) -> SVD:
        """Truncated SVD of the rows that changed; the other rows of `u` are exact zeros."""
        return decompose_touched(
            delta,
            rank,
            solver=self.solver,
            rank_tolerance=self.rank_tolerance,
            signs=self.signs,
        )

    def decomposing_bytes(self, matrix: tuple[int, int], rank: int) -> int:
        """With the solver asked for."""
        return svd_bytes(matrix, rank, self.solver)

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Code a delta; the rank kept is that of `svd` where it is below `rank(delta.shape)`."""
        shape = tuple(delta.shape)
        if not delta.any():
            return {}
        if not shape:
            return {"exact": delta.reshape(1).clone()}
        if not self._matrix(shape):
            return self._encode_factors([delta.reshape(1, -1)])
        rank = self.rank(shape)
        if rank == 0:
            return {}
        u, singular_values, vh = svd or self.decompose(delta, rank)
        if not singular_values.any():
            return {}
        touched = touched_rows(delta.reshape(len(delta), -1))
        left = u[:, :rank] if touched.all() else u[touched, :rank]
        parts = self._encode_factors([left.T, vh[:rank]])
        parts["singular_values"] = self._stored(singular_values[:rank])
        if not touched.all():
            parts["rows"] = pack(touched.to(torch.uint8), 1)
        return parts

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        if not shape:
            return cut(parts, "exact", [1])[0].reshape(()).clone()
        matrix = self._matrix(shape)
        if not matrix:
            return self._decode_factors(parts, [(1, prod(shape))])[0].reshape(shape)
        (left, singular_values, right), touched = self._decode_triplets(parts, matrix)
        return product_in_rows(left, singular_values[:, None] * right, touched).reshape(shape)

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> SVD | None:
        """Û, σ and V̂ᵀ."""
        matrix = self._matrix(shape)
        if not matrix or "singular_values" not in parts:
            return None
        found, touched = self._decode_triplets(parts, matrix)
        return found if touched is None else found._replace(u=restore_rows(found.u, touched))

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """Scales, codes and zeros of one factor, or of two, U with as few as one row."""
        if not shape:
            return {"exact": PartSpec.of(torch.float32, 1)}
        matrix = self._matrix(shape)
        if not matrix:
            return self._factors_layout([(1, prod(shape))], [(1, prod(shape))])
        rows, columns = matrix
        kept = min(rank or 0, rows, columns)
        value = getattr(torch, self.singular_value_dtype)
        return {
            **self._factors_layout([(kept, 1), (kept, columns)], [(kept, rows), (kept, columns)]),
            "singular_values": PartSpec(value, 1, min(matrix)),
            "rows": rows_spec(rows),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """3 bits an element of what is coded and 32 a singular value; scales are not counted."""
        if not shape:
            return Bits(32, 32, 32)
        rank, matrix = self.rank(shape) if rank is None else rank, self._matrix(shape)
        factors = [(rank, width) for width in matrix] if matrix else [(1, prod(shape))]
        elements = sum(vectors * width for vectors, width in factors)
        if elements == 0:
            return Bits(0, 0, 0)
        scales = sum(self._sets(vectors) for vectors, _ in factors) * groups(self._levels)
        code_bytes = sum(packed_size(vectors * width, self._width) for vectors, width in factors)
        value_bits = 8 * getattr(torch, self.singular_value_dtype).itemsize
        return Bits(
            paper=(3 if self.thresholding else 2) * elements + 32 * rank,
            paper_lean=self._width * elements + 32 * rank,
            stored=8 * code_bytes + 32 * scales + value_bits * rank,
        )

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        """A bit an element, each factor padded to a byte, and a bit a row."""
        if not shape:
            return 0
        matrix = self._matrix(shape)
        rows = packed_size(shape[0], 1) if matrix else 0
        factors = [self.rank(shape) * width for width in matrix] if matrix else [prod(shape)]
        return 8 * (sum(packed_size(count, 1) for count in factors) + rows) if any(factors) else 0

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Shape of the matrix that is decomposed; None for what is coded as it is."""
        if not self.decomposition or len(shape) < 2 or (len(shape) > 2 and self.conv == "flat"):
            return None
        return shape[0], prod(shape[1:])

    @property
    def _levels(self) -> Split:
        return self.split if self.thresholding else "none"

    @property
    def _width(self) -> Width:
        return 2 if self.thresholding else 1

    def _stored(self, singular_values: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
        """Cast to the stored type.

        Raises:
            MethodError: if the largest does not fit in float16.
        """
        stored = singular_values.to(getattr(torch, self.singular_value_dtype), copy=True)
        if not stored.isfinite().all():
            raise MethodError(
                f"A singular value of {float(singular_values.max()):.3g} does not fit in "
                f"{self.singular_value_dtype}. Set singular_value_dtype to float32."
            )
        return stored

    def _sets(self, vectors: int) -> int:
        """Number of sets with scales of their own in a factor of so many vectors."""
        return vectors if self.grouping == "vector" else 1

    def _encode_factors(self, factors: Sequence[Float[Tensor, "_ _"]]) -> Parts:
        """Scales, codes and, if there are any, zeros of factors whose rows are vectors."""
        scales: list[Tensor] = []
        codes: list[Tensor] = []
        for factor in factors:
            sets = factor.reshape(self._sets(len(factor)), -1)
            levels = quantise(
                sets, split=self._levels, scales=self.scales if self.scaling else "one"
            )
            scales.append(levels.scales.flatten())
            codes.append(pack(levels.codes.flatten(), self._width))
        parts = {"scales": torch.cat(scales), "codes": torch.cat(codes)}
        return parts | encode_zeros(factors)

    def _factors_layout(
        self, least: Sequence[tuple[int, int]], most: Sequence[tuple[int, int]]
    ) -> Layout:
        """Of what `_encode_factors` makes of factors of at least, and at most, these shapes."""
        fewest, largest = ([vectors * width for vectors, width in each] for each in (least, most))
        codes = [sum(packed_size(n, self._width) for n in each) for each in (fewest, largest)]
        scales = groups(self._levels) * sum(self._sets(vectors) for vectors, _ in most)
        return {
            "scales": PartSpec.of(torch.float32, scales),
            "codes": PartSpec(torch.uint8, codes[0], codes[1]),
            **zeros_layout(fewest, largest),
        }

    def _decode_triplets(
        self, parts: Parts, matrix: tuple[int, int]
    ) -> tuple[SVD, Bool[Tensor, " out"] | None]:
        """Û of the rows that have codes, σ and V̂ᵀ; and which rows these are, if not all."""
        rows, columns = matrix
        singular_values = part(parts, "singular_values").float()
        rank = len(singular_values)
        touched = unpack(parts["rows"], rows, 1).bool() if "rows" in parts else None
        kept = rows if touched is None else int(touched.count_nonzero())
        left, right = self._decode_factors(parts, [(rank, kept), (rank, columns)])
        return SVD(left.T, singular_values, right), touched

    def _decode_factors(
        self, parts: Parts, shapes: Sequence[tuple[int, int]]
    ) -> list[Float[Tensor, "_ _"]]:
        """Undo `_encode_factors` for factors of these shapes."""
        counts = [vectors * width for vectors, width in shapes]
        sets = [self._sets(vectors) for vectors, _ in shapes]
        per_set = groups(self._levels)
        scales = cut(parts, "scales", [per_set * number for number in sets])
        codes = cut(parts, "codes", [packed_size(count, self._width) for count in counts])
        zeros = decode_zeros(parts, counts)
        factors: list[Tensor] = []
        for n, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
            if sets[n] == 1:
                values = unpack_values(codes[n], count, self._width, signed(scales[n]))
            else:
                code = unpack(codes[n], count, self._width).reshape(sets[n], -1)
                values = dequantise(Levels(code, scales[n].reshape(sets[n], per_set)))
            values = values.reshape(shape)
            if (mask := zeros[n]) is not None:
                values.masked_fill_(mask.reshape(shape), 0)
            factors.append(values)
        return factors
