"""Triplets of small integers, each coding what those before it left, taken where bytes gain most.

Not of a paper, but of several: that one factor is fitted by least squares to the other as it was
quantised, and that triplets have as many bits as their size pays for, is in PrinMix
(arXiv:2506.11087); that each triplet is one of what is left, in the semi-discrete decomposition
(O'Leary and Peleg, 1983); that integers follow a trellis and are entropy-coded, in JPEG 2000 and
VVC. Here all tensors of an expert, vectors and embeddings too, share one budget: a triplet is taken
if each of its bytes saves squared norm enough.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec
from personae.errors import PackError
from personae.methods._codec import Bits, Codec, Context
from personae.methods._method import Pass, Passes, scalars
from personae.methods._registry import codec
from personae.methods._trellis import MODELS, MOST_SYMBOL_BITS, STATE_BYTES, Reader, Writer
from personae.methods._triplets import Triplet, greedy_triplets
from personae.ops.bits import pack, unpack
from personae.ops.chunks import chunk_bytes
from personae.ops.parts import cut, part
from personae.ops.rows import restore_rows, rows_spec, spread_rows, touched_rows
from personae.ops.sums import squared_norm
from personae.ops.zeros import decode_zeros, encode_zeros, zeros_layout

_OVERHEAD = 3
"""Bytes of a triplet beside its vectors: scale and model."""
_MOST_PER_RANK = 4
"""Triplets of a matrix at most, over its smaller side."""
_AT_ONCE = 32
"""Triplets decoded at a time."""
_BYTES_PER_NUMBER = 320
"""Peak memory of a row or column: of the vectors that are followed, or decoded at a time."""
_SLACK = 2.0
"""A price serves thresholds up to so many times higher or lower."""
_MOST_PASSES = 6


@codec(paper="arXiv:2506.11087")
class Residual(Codec):
    """Triplets of small integers, each of what those before left, where a byte gains most.

    A matrix is Σ s · p qᵀ. Integers of p and q are even, or else odd or 0, which follows from those
    before (see `kernels.trellis`). They are coded by one of a few models, the finer the larger the
    triplet is. p is quantised, q fitted to it and quantised, p fitted and quantised anew, so that
    later triplets correct the coding errors of earlier ones.
    Vectors are matrices of one row; of three and more axes all but the first are one. Scalars are
    exact.

    Parts:
        singular_values: s, bfloat16, [k].
        models: uint8, of each triplet, [k].
        codes: uint8, one code, which from the last triplet to the first gives q and then p.
        rows: one bit a row, set for the rows of a matrix that have codes; only if some are zero.
        zeros, or zero_positions: of what is no matrix, where exact zeros are (see `ops.zeros`).
        exact: fp32, [1], a scalar as it is.

    A delta of which no triplet is worth its bytes has no parts.
    """

    counts_stored: ClassVar = True
    by_budget: ClassVar = "size"

    gain: float = Field(
        default=10.0,
        gt=0,
        description="What a byte has to save, over the delta's squared norm per byte of fp32.",
    )
    size: int | None = Field(
        default=None, ge=1, description="Most bytes of a task's code; it then sets the gain."
    )

    def passes(self) -> Passes:
        """The squared norm of all; then what triplets gain, until the size is used up.

        How fine a step pays depends on the price of a byte, and that on the size: a first guess is
        mended until the price and the threshold found at it are about the same.
        """
        energy, entries = (yield Pass("energy", _energy)).tolist()
        if not energy:
            return {}
        unit = energy / (4 * entries)
        if self.size is None:
            return scalars({"price": self.gain * unit, "least": self.gain * unit})
        paid = price = _guess(self.size / (4 * entries)) * unit
        least = 0.0
        for _ in range(_MOST_PASSES):
            term = partial(self._worths, price=price, least=price / _SLACK)
            found = yield Pass("gains", term, apart=True)
            paid, least = price, _threshold(torch.cat(list(found.values())), self.size)
            if price / _SLACK < least <= price * _SLACK:
                break
            # Nothing fits, or all does: a triplet is too fine, or could be finer.
            price = least if 0 < least < math.inf else price * _SLACK ** (2 if least else -2)
        return scalars({"price": paid, "least": least or paid / _SLACK})

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Take triplets while they are worth their bytes."""
        if not delta.any():
            return {}
        if not delta.ndim:
            return {"exact": delta.reshape(1).clone()}
        known = (context or self.alone(delta)).numbers
        values: list[float] = []
        models: list[int] = []
        writer = Writer()
        for triplet, worth, _ in self._priced(delta, known["price"]):
            if worth < known["least"]:
                break
            values.append(triplet.value)
            models.append(triplet.model)
            for vector in (triplet.left, triplet.right):
                writer.add(vector, triplet.model)
        if not values:
            return {}
        return {
            "singular_values": torch.tensor(values, device=delta.device).bfloat16(),
            "models": torch.tensor(models, device=delta.device).byte(),
            "codes": writer.end().to(delta.device),
            **_places(delta),
        }

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta; parts that do not fit the shape are refused."""
        if not parts:
            return torch.zeros(shape)
        if not shape:
            return cut(parts, "exact", [1])[0].reshape(()).clone()
        (rows, columns), touched = _matrix(shape), _touched(parts, shape)
        kept = rows if touched is None else int(touched.count_nonzero())
        delta = torch.zeros(rows, columns, device=part(parts, "codes").device)
        for left, some, right in self._vectors(parts, kept, columns):
            delta[:kept].addmm_(left * some, right.T)
        if touched is not None:
            spread_rows(delta, touched)
        mask = decode_zeros(parts, [rows * columns])[0]
        if mask is not None:
            delta.masked_fill_(mask.reshape(delta.shape), 0)
        return delta.reshape(shape)

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> SVD | None:
        """p, s and q."""
        if len(shape) != 2 or "singular_values" not in parts:
            return None
        touched = _touched(parts, shape)
        kept = shape[0] if touched is None else int(touched.count_nonzero())
        found = list(self._vectors(parts, kept, shape[1]))[::-1]
        left = torch.cat([one for one, _, _ in found], dim=1)
        right = torch.cat([one for _, _, one in found], dim=1).T
        left = left if touched is None else restore_rows(left, touched)
        return SVD(left, part(parts, "singular_values").float(), right)

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """Scale, model and codes of each triplet; codes may be short, if they are always 0."""
        if not shape:
            return {"exact": PartSpec.of(torch.float32, 1)}
        rows, columns = _matrix(shape)
        most = _MOST_PER_RANK * min(rows, columns)
        kept, matrix = min(rank or 0, most), len(shape) == 2
        largest = STATE_BYTES + -(-MOST_SYMBOL_BITS * kept * (rows + columns) // 8)
        entries = [prod(shape)]
        return {
            "singular_values": PartSpec(torch.bfloat16, 1, most),
            "models": PartSpec.of(torch.uint8, kept),
            "codes": PartSpec(torch.uint8, STATE_BYTES, largest),
            **({"rows": rows_spec(rows)} if matrix else zeros_layout(entries, entries)),
        }

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """As much as the gain lets be stored, were all of the delta gained; or the size."""
        numel = prod(shape)
        if not shape or not numel:
            return Bits(*[32 * numel] * 3)
        most = 32 * numel / self.gain if self.size is None else 8 * self.size
        return Bits(*[int(most)] * 3)

    def most_bits(self) -> int | None:
        """The size, if one is given."""
        return None if self.size is None else 8 * self.size

    def least_bits(self, shape: tuple[int, ...]) -> int:
        """One triplet whose codes cost nothing; or a scalar."""
        if not shape or not prod(shape):
            return 32 * prod(shape)
        return 8 * (_OVERHEAD + STATE_BYTES)

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        """What is left to code, or what is decoded, and vectors."""
        return chunk_bytes(prod(shape)) + self.decoding_bytes(shape, 0)

    def decoding_bytes(self, shape: tuple[int, ...], rank: int) -> int:
        """What is decoded, and the vectors of some triplets."""
        return 4 * prod(shape) + _BYTES_PER_NUMBER * sum(_matrix(shape) if shape else ())

    def _priced(
        self, delta: Float[Tensor, "..."], price: float
    ) -> Iterator[tuple[Triplet, float, float]]:
        """Triplets of a delta; what each of its bytes saves, or the least before; and its bytes.

        The first one pays for the last state of the code, and for the parts that say which rows are
        there and where zeros are.
        """
        rows, columns = _matrix(tuple(delta.shape))
        matrix = delta.reshape(rows, columns)
        extra = STATE_BYTES + sum(values.nbytes for values in _places(delta).values())
        kept = touched_rows(matrix)
        copied = delta.ndim == 2 and not kept.all()
        found = greedy_triplets(
            matrix[kept] if copied else matrix, price, _OVERHEAD, overwrite=copied
        )
        worth = math.inf
        for triplet in islice(found, _MOST_PER_RANK * min(rows, columns)):
            nbytes = triplet.nbytes + _OVERHEAD + extra
            worth, extra = min(worth, triplet.gain / nbytes), 0
            yield triplet, worth, nbytes

    def _worths(
        self, delta: Float[Tensor, "..."], context: Context, price: float, least: float
    ) -> Float64[Tensor, "triplet 2"]:
        """What a byte of each triplet saves, and its bytes; as far as that is more than `least`."""
        found: list[tuple[float, float]] = []
        if not delta.ndim:
            found.append((math.inf, 4))
        else:
            for _, worth, nbytes in self._priced(delta, price):
                if worth < least:
                    break
                found.append((worth, nbytes))
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)

    def _vectors(
        self, parts: Parts, rows: int, columns: int
    ) -> Iterator[
        tuple[Float[Tensor, "out some"], Float[Tensor, " some"], Float[Tensor, "in some"]]
    ]:
        """Vectors and scales of some triplets at a time, the last ones first.

        Raises:
            PackError: if models or codes are not those of triplets of these lengths.
        """
        codes = part(parts, "codes")
        values = part(parts, "singular_values").to(codes.device).float()
        models = cut(parts, "models", [len(values)])[0].cpu().tolist()
        if models and max(models) >= len(MODELS):
            raise PackError(
                f"Part 'models' has {max(models)}, expected less than {len(MODELS)}. The task file "
                "is damaged: fetch or write it again."
            )
        reader = Reader(codes)
        for stop in range(len(models), 0, -_AT_ONCE):
            some = models[max(stop - _AT_ONCE, 0) : stop]
            left, right = (torch.empty(length, len(some)) for length in (rows, columns))
            for place, model in reversed(list(enumerate(some))):
                for factor in (right, left):
                    factor[:, place] = reader.read(len(factor), model)
            sizes = values[stop - len(some) : stop]
            yield left.to(codes.device), sizes, right.to(codes.device)
        reader.end()


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the matrix that a delta is seen as."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], prod(shape[1:]))


def _places(delta: Float[Tensor, "..."]) -> Parts:
    """Of a matrix the rows that changed, if not all; of another tensor its exact zeros, if any."""
    if delta.ndim != 2:
        return encode_zeros([delta])
    touched = touched_rows(delta)
    return {} if touched.all() else {"rows": pack(touched.to(torch.uint8), 1)}


def _touched(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Bool[Tensor, " out"] | None:
    """The rows of a matrix that have codes; None: all."""
    return unpack(parts["rows"], shape[0], 1).bool() if "rows" in parts else None


def _energy(delta: Float[Tensor, "..."], _: Context) -> Float64[Tensor, "2"]:
    """Squared norm and number of entries."""
    return torch.tensor([squared_norm(delta), delta.numel()], dtype=torch.float64)


def _guess(share: float) -> float:
    """The gain at which trained deltas were found to take this share of their fp32 bytes."""
    return 0.03 * share**-1.25


def _threshold(worths: Float64[Tensor, "triplet 2"], size: int) -> float:
    """The least worth at which all triplets of at least that worth fit a size.

    0 if all fit whatever their worth, infinite if none does.
    """
    worth, nbytes = worths.unbind(dim=1)
    worth, order = worth.sort(descending=True, stable=True)
    used = nbytes[order].cumsum(dim=0)
    if not len(used) or used[-1] <= size:
        return 0.0
    beyond = float(worth[int((used <= size).count_nonzero())])  # the first that does not fit
    fitting = worth[worth > beyond]
    return float(fitting[-1]) if len(fitting) else math.inf
