"""UltraDelta: 4-bit levels, of which few are kept, drawn from each level in equal shares.

arXiv:2505.13563, as its released code for vision models does it: attention and MLP matrices alone,
the rest as in the reference. It counts an entry as pruned already if its *level* is zero, and the
level next to zero is not; here exact zeros of the delta are those pruned, and stay zero.
"""

import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from personae._types import SVD, Density, Layout, Parts, PartSpec, TensorSpec
from personae.methods._codec import Bits, Codec, Context, Rest, Treatment
from personae.methods._method import Pass, Passes, Statistics, scalars
from personae.methods._registry import codec
from personae.methods._site import is_projection
from personae.ops.bits import pack_planes, planes_size, unpack_planes
from personae.ops.chunks import by_chunks, chosen, chunk_bytes, put
from personae.ops.masks import decode_mask, encode_mask, mask_layout, mask_size
from personae.ops.parts import cut, part

_WIDTH = 4
_DENSEST_RATE = 0.99
"""Share that is dropped at most where the rest of the budget goes."""


@codec(paper="arXiv:2505.13563")
class UltraDelta(Codec):
    """Uniform 4-bit quantisation, pruned level by level at random, rescaled by trace norms.

    A delta is quantised to 16 levels from its least to its largest value. Tensors of one expert
    are sorted by standard deviation and cut into thirds by their number of entries: the first
    keeps `density - step` of its entries, the second `density`, the last what is left of the whole.
    Of each level the same share is kept, drawn at random. What is kept is divided by `density`
    and, with `rescale`, multiplied by the smallest trace norm in the family over the expert's own
    (sums over its matrices, after pruning).

    Parts:
        mask, gaps: the entries kept (see `ops.masks`).
        codes: uint8, their levels as 4 planes of bits.
        levels: fp32, [2]: value of level 0, and from each level to the next; all factors applied.

    A delta of which no entry is kept has no parts.
    """

    counts_stored: ClassVar = True
    bytes_per_entry: ClassVar = 9
    of_family: ClassVar = ("smallest_trace_norm",)

    density: Density = Field(default=0.03, description="Fraction of entries kept.")
    step: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="How much lower the density is for the third of "
        "tensors that varies least, and higher for the "
        "third that varies most.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the random draws, together with tensor and task."
    )
    rescale: Literal["trace_norm", "none"] = Field(
        default="trace_norm",
        description="Whether experts with a larger trace norm are scaled down.",
    )
    smallest_trace_norm: float | None = Field(
        default=None,
        ge=0,
        description="Trace norm that is not scaled down; none: the smallest in the family.",
    )
    tensors: Literal["projections", "all"] = Field(
        default="projections", description="What is coded: attention and MLP matrices, or all."
    )
    rest: Rest = Field(
        default="skip", description="Tensors not coded: exact, or left as in the reference."
    )

    @model_validator(mode="after")
    def _something_is_kept(self) -> "UltraDelta":
        if self.step >= self.density:
            raise ValueError("step must be below density, or a third of the tensors keeps nothing")
        return self

    def treats(self, spec: TensorSpec) -> Treatment:
        """Attention and MLP matrices are coded, or everything."""
        if self.tensors == "all" or is_projection(spec.name, spec.shape):
            return "code"
        return self.rest

    def passes(self) -> Passes:
        """Standard deviations, by which tensors are kept; then the trace norm of what is kept."""
        found = yield Pass("deviations", lambda delta, _: _deviation(delta), apart=True)
        thirds = self._thirds([tuple(pair.cpu().tolist()) for pair in found.values()])
        if self.rescale == "none":
            return scalars(thirds)
        norms = yield Pass("trace norms", lambda d, c: self._trace_norm(d, c, thirds), apart=True)
        return scalars({**thirds, "trace_norm": float(sum(norms.values()))})

    def for_family(self, statistics: Sequence[Statistics]) -> "UltraDelta":
        """Find the smallest trace norm."""
        norms = [float(one["trace_norm"]) for one in statistics if one.get("trace_norm")]
        if self.smallest_trace_norm is not None or not norms:
            return self
        return self.model_copy(update={"smallest_trace_norm": min(norms)})

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix with its trace norm: LAPACK's copy beside what is pruned, and its room."""
        usual, numel = super().working_bytes(shape), prod(shape)
        if self.rescale == "none" or len(shape) != 2:
            return usual
        return max(usual, chunk_bytes(numel) + 8 * numel + 16 * min(shape) ** 2)

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Quantise, draw what is kept of each level, and scale it."""
        context = context or self.alone(delta)
        thirds = context.numbers
        own = thirds.get("trace_norm", 0.0)
        smallest = own if self.smallest_trace_norm is None else self.smallest_trace_norm
        return self._encode(delta, context, thirds, smallest / own if own else 1.0)

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        delta = torch.zeros(shape, device=part(parts, "mask").device)
        kept = decode_mask(parts, delta.numel())
        count = int(kept.count_nonzero())
        codes = cut(parts, "codes", [planes_size(count, _WIDTH)])[0]
        least, step = cut(parts, "levels", [2])[0].cpu().tolist()
        levels = unpack_planes(codes, count, _WIDTH)
        put(delta, kept, lambda a, b: least + step * levels[a:b])
        return delta

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """A mask, the level of each entry it marks, the value of the levels."""
        count = torch.Size(shape).numel()
        return {
            **mask_layout(count),
            "codes": PartSpec(torch.uint8, _WIDTH, planes_size(count, _WIDTH)),
            "levels": PartSpec.of(torch.float32, 2),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """What is stored at `density`, with one entry more a level for rounding."""
        count = torch.Size(shape).numel()
        kept = min(count, int(self.density * count) + (1 << _WIDTH))
        stored = 8 * (mask_size(count, kept) + planes_size(kept, _WIDTH) + 8) if kept else 0
        return Bits(stored, stored, stored)

    def _encode(
        self, delta: Tensor, context: Context, thirds: Mapping[str, float], factor: float
    ) -> Parts:
        flat = delta.flatten()
        changed = flat != 0
        if not changed.any():
            return {}
        dropped = self._dropped(delta, thirds)
        least, most = (value.double() for value in flat.aminmax())
        step = (most - least) / ((1 << _WIDTH) - 1)
        levels = torch.zeros_like(flat, dtype=torch.uint8)
        if step:
            levels = by_chunks(lambda p: ((p - least) / step).round(), torch.uint8, flat)
        zeros = 1 - float(changed.count_nonzero()) / len(flat)
        share = max((dropped - zeros) / (1 - zeros), 0.0)
        kept = _draw(levels, changed, share, self._generator(context))
        if not kept.any():
            return {}
        gain = factor / self.density
        return encode_mask(kept) | {
            "codes": pack_planes(chosen(levels, kept), _WIDTH),
            "levels": torch.stack([gain * least, gain * step]).float(),
        }

    def _thirds(self, tensors: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Deviations up to which tensors belong to a third, and the share the last one drops.

        Args:
            tensors: Standard deviation and number of entries of each.
        """
        whole, passed = sum(count for _, count in tensors), 0.0
        limits = {"first": -1.0, "second": -1.0}
        for deviation, count in sorted(tensors):
            passed += count
            if passed <= whole / 3:
                limits["first"] = deviation
            elif passed <= 2 * whole / 3:
                limits["second"] = deviation
        first = sum(count for deviation, count in tensors if deviation <= limits["first"])
        second = sum(count for deviation, count in tensors if deviation <= limits["second"])
        second = max(second - first, 0.0)
        last = whole - first - second
        rate = 1 - self.density
        left = rate * whole - rate * second - (rate + self.step) * first
        return {**limits, "last": min(max(left / last, 0.0), _DENSEST_RATE) if last else rate}

    def _dropped(self, delta: Float[Tensor, "..."], thirds: Mapping[str, float]) -> float:
        """Share of this tensor's entries that is dropped."""
        deviation = float(_deviation(delta)[0])
        if deviation <= thirds.get("first", -1.0):
            return 1 - self.density + self.step
        if deviation <= thirds.get("second", -1.0):
            return 1 - self.density
        return thirds.get("last", 1 - self.density)

    def _trace_norm(
        self, delta: Tensor, context: Context, thirds: Mapping[str, float]
    ) -> Float[Tensor, ""]:
        """Sum of singular values of a matrix after pruning; 0 for other tensors."""
        if delta.ndim != 2:
            return delta.new_zeros((), dtype=torch.float64)
        pruned = self.decode(self._encode(delta, context, thirds, 1.0), tuple(delta.shape))
        return torch.linalg.svdvals(pruned).sum(dtype=torch.float64)

    def _generator(self, context: Context) -> torch.Generator:
        text = f"{self.seed}\n{context.site.name}\n{context.task}"
        if context.site.start:  # each matrix of a stack draws its own
            text += f"\n{context.site.start}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _deviation(delta: Float[Tensor, "..."]) -> Float[Tensor, "2"]:
    """Standard deviation of a tensor (of all its entries) and their number; fp64."""
    exact = delta.double()
    deviation = exact.std(correction=0) if exact.numel() else exact.new_zeros(())
    return torch.stack([deviation, torch.full_like(deviation, delta.numel())])


def _draw(
    levels: UInt8[Tensor, " entry"],
    candidates: Bool[Tensor, " entry"],
    dropped: float,
    generator: torch.Generator,
) -> Bool[Tensor, " entry"]:
    """Mark what is kept: of each level's candidates all but a share, at random (on the CPU)."""
    kept = torch.zeros_like(candidates)
    for level in range(1 << _WIDTH):
        places = candidates & (levels == level)
        count = int(places.count_nonzero())
        dtype = torch.int32 if count < 1 << 31 else torch.int64  # the order is the same
        order = torch.randperm(count, generator=generator, dtype=dtype)
        drawn = torch.zeros(count, dtype=torch.bool)
        drawn[order[round(count * dropped) :].long()] = True
        del order
        drawn = drawn.to(kept.device)
        put(kept, places, lambda a, b, ones=drawn: ones[a:b])
    return kept
