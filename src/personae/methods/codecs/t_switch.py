"""T-Switch: the largest entries of a delta as signs, with one scale.

arXiv:2412.00054. Defaults are those of the released code for its vision models: per tensor, 40 %
of each sign (it keeps 30 % for RoBERTa). `scope` "model" is the form the DTS paper compares with:
one threshold for each sign and one scale over the whole flattened vector, there with 35 or 30 %.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Density, Layout, Parts, PartSpec, TensorSpec
from personae.methods._codec import Bits, Codec, Context, Treatment
from personae.methods._method import Pass, Passes, scalars
from personae.methods._registry import codec
from personae.ops.bits import pack, packed_size, unpack
from personae.ops.chunks import by_chunks, chosen, chunks, put
from personae.ops.masks import decode_mask, encode_mask, mask_layout, mask_size
from personae.ops.parts import cut, part
from personae.ops.select import TOP, Window, count_magnitudes, kth_magnitude, narrow

_SIGNS = {"positive": 1.0, "negative": -1.0}
_NOTHING = Window(TOP, TOP + 1)
"""Infinity, which no entry reaches."""


@codec(paper="arXiv:2412.00054")
class TSwitch(Codec):
    """The largest entries of each sign become ± one scale, the root mean square of those kept.

    Of n₊ positive entries the ⌊density · n₊⌋ largest are kept and all that tie with the least of
    them; if that number is 0, all. Likewise of the negative ones. Every other entry becomes 0.
    Scalars are exact.

    Parts:
        mask, gaps: which entries are kept (see `ops.masks`).
        signs: a bit for each of these, 1 for negative.
        scale: fp32, [1].

    A delta of which no entry is kept has no parts.
    """

    bytes_per_entry: ClassVar = 7

    density: Density = Field(default=0.4, description="Fraction of each sign's entries kept.")
    scope: Literal["tensor", "model"] = Field(
        default="tensor",
        description="Whether thresholds and scale are computed over each "
        "tensor or over the whole model.",
    )

    def treats(self, spec: TensorSpec) -> Treatment:
        """Everything but scalars is coded."""
        return "code" if spec.shape else "exact"

    def passes(self) -> Passes:
        """With `scope` "model": both thresholds by counting, then the scale of what they keep."""
        if self.scope == "tensor":
            return {}
        windows = [Window(0, TOP)] * len(_SIGNS)
        while not all(window.found for window in windows):
            counts = yield Pass("thresholds", partial(_counts, windows))
            windows = [
                narrow(of_sign, window, kept or count) if count else _NOTHING
                for of_sign, window in zip(counts, windows, strict=True)
                for count in [int(of_sign[0])]
                for kept in [_kept(count, self.density)]
            ]
        thresholds = {name: window.magnitude for name, window in zip(_SIGNS, windows, strict=True)}
        energies = yield Pass("scale", lambda delta, _: _energy(delta, thresholds), apart=True)
        total = torch.stack(list(energies.values())).sum(dim=0) if energies else torch.zeros(2)
        return scalars({**thresholds, "scale": _root_mean(*total.cpu().tolist())})

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Keep the largest entries of each sign."""
        flat = delta.flatten()
        if self.scope == "tensor":
            kept = _largest(flat, self.density)
            scale = _root_mean(*_energy_of(flat, kept).tolist())
        else:
            found = (context or self.alone(delta)).numbers
            kept, scale = _above(flat, found), found.get("scale", 0.0)
        if not kept.any():
            return {}
        return encode_mask(kept) | {
            "signs": pack(chosen(by_chunks(lambda part: part < 0, torch.uint8, flat), kept), 1),
            "scale": delta.new_full((1,), scale),
        }

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        delta = torch.zeros(shape, device=part(parts, "mask").device)
        kept = decode_mask(parts, delta.numel())
        count = int(kept.count_nonzero())
        signs = unpack(cut(parts, "signs", [packed_size(count, 1)])[0], count, 1)
        scale = cut(parts, "scale", [1])[0]
        put(delta, kept, lambda a, b: torch.where(signs[a:b].bool(), -scale, scale))
        return delta

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """A mask, a sign for each entry it marks, a scale."""
        count = torch.Size(shape).numel()
        return {
            **mask_layout(count),
            "signs": PartSpec(torch.uint8, 1, packed_size(count, 1)),
            "scale": PartSpec.of(torch.float32, 1),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """2 bits an element counted; lean, a bit each and a sign for those kept.

        Where all entries tie, or the threshold is the model's, a tensor may be kept whole.
        """
        count = torch.Size(shape).numel()
        stored = mask_size(count, count) + packed_size(count, 1) + 4 if count else 0
        return Bits(2 * count, count + _kept(count, self.density), 8 * stored)


def _kept(count: int, density: float) -> int:
    """⌊density · count⌋, where 0.29 · 100 = 28.999… is 29; 0 stands for all, as in their code."""
    return int(density * count + 1e-9)


def _largest(flat: Float[Tensor, " entry"], density: float) -> Bool[Tensor, " entry"]:
    """Mark the share of each sign that is largest, with all that tie at its threshold."""
    marked = torch.zeros_like(flat, dtype=torch.bool)
    for sign in _SIGNS.values():
        sizes = by_chunks(lambda part, s=sign: (s * part).clamp_(min=0), flat.dtype, flat)
        count = int(sizes.count_nonzero())
        if count:
            least, _ = kth_magnitude(sizes, _kept(count, density) or count)
            marked |= sizes >= least
        del sizes  # before there are those of the other sign
    return marked


def _above(delta: Float[Tensor, "..."], thresholds: Mapping[str, float]) -> Bool[Tensor, " entry"]:
    """Mark what reaches the threshold of its sign; all that tie with it."""
    positive = thresholds.get("positive", torch.inf)
    negative = -thresholds.get("negative", torch.inf)
    return by_chunks(lambda part: (part >= positive) | (part <= negative), torch.bool, delta)


def _energy(delta: Float[Tensor, "..."], thresholds: Mapping[str, float]) -> Float[Tensor, "2"]:
    """Sum of squares of the entries kept, and their number; fp64."""
    return _energy_of(delta, _above(delta, thresholds))


def _energy_of(delta: Float[Tensor, "..."], kept: Bool[Tensor, " entry"]) -> Float[Tensor, "2"]:
    """Sum of squares of these entries, and their number; fp64."""
    total = delta.new_zeros(2, dtype=torch.float64)
    for some, here in chunks(delta, kept):
        exact = some[here].double()
        total[0] += exact @ exact
        total[1] += len(exact)
    return total


def _root_mean(energy: float, count: float) -> float:
    return (energy / count) ** 0.5 if count else 0.0


def _counts(windows: list[Window], delta: Float[Tensor, "..."], _: Context) -> Tensor:
    """Magnitudes of each sign, counted by window."""
    bins = max(window.bins for window in windows)
    counts = torch.zeros(len(windows), 2 + bins, dtype=torch.int64)
    for (some,) in chunks(delta):
        for total, sign, window in zip(counts, _SIGNS.values(), windows, strict=True):
            own = sign * some
            total += count_magnitudes(own[own > 0], window, bins)
    return counts
