"""How a family streams through a merge: tensors cut into rows, and their task vectors, stacked.

A `Piece` is what is held at once: a whole tensor, or a block of its rows where the method lets
rows be cut apart. A `Unit` is what one worker does at a time: pieces enough that handing them out
costs nothing beside the work. Both follow from headers and method alone, never from workers.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.vocabulary import has_vocabulary_axis
from personae.checkpoints.vocabulary_rows import settle
from personae.execute.deltas import Deltas, working_bytes
from personae.execute.family import Family
from personae.execute.scan import not_finite
from personae.methods import Factors, MergeMethod, Parameters, Site
from personae.ops.layout import transposed_weights

PIECE_ENTRIES = 1 << 20
"""Entries of one expert in a block of rows: the stack of a few experts stays near the cache."""
UNIT_ENTRIES = 1 << 22
"""Entries of the pieces of one unit, about: some ten milliseconds of work."""
UNIT_PIECES = 256
"""Pieces of one unit, at most: of tiny tensors the number is the work."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` of one tensor; a scalar is its one row."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return not self.spec.shape or (self.start, self.stop) == (0, self.spec.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return (self.stop - self.start, *self.spec.shape[1:]) if self.spec.shape else ()

    @property
    def numel(self) -> int:
        """Entries of one expert."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """Pieces that one worker works through, in order.

    Attributes:
        number: Its place among the units of a run.
        pieces: At least one.
        whole: Whether its one piece is a tensor given whole to a method that needs it so.
    """

    number: int
    pieces: tuple[Piece, ...]
    whole: bool

    @property
    def largest(self) -> Piece:
        """The piece of most entries."""
        return max(self.pieces, key=lambda piece: piece.numel)


def whole(spec: TensorSpec) -> Piece:
    """All of a tensor as one piece."""
    return Piece(spec, 0, spec.shape[0] if spec.shape else 1)


def rows_of(spec: TensorSpec) -> Iterator[Piece]:
    """A tensor as blocks of rows of at most `PIECE_ENTRIES` entries, and at least one row."""
    if not spec.shape or spec.numel <= PIECE_ENTRIES:
        yield whole(spec)
        return
    rows = max(1, PIECE_ENTRIES * spec.shape[0] // spec.numel)
    for start in range(0, spec.shape[0], rows):
        yield Piece(spec, start, min(start + rows, spec.shape[0]))


def units(
    specs: Iterable[TensorSpec], undivided: Callable[[TensorSpec], bool], together: bool
) -> list[Unit]:
    """Cut tensors into units: first those given whole, largest first, then the others in order.

    Args:
        specs: Tensors in the order of their names, which is about their order on disk.
        undivided: Whether a tensor must be given whole.
        together: Whether all rows of a tensor go to one unit, as statistics of it alone need.
    """
    streamed: list[tuple[Piece, ...]] = []
    entire: list[Piece] = []
    batch: list[Piece] = []
    held = 0
    for spec in specs:
        if undivided(spec):
            entire.append(whole(spec))
            continue
        for piece in rows_of(spec):
            is_full = held + piece.numel > UNIT_ENTRIES or len(batch) == UNIT_PIECES
            if batch and is_full and not (together and batch[-1].spec is spec):
                streamed.append(tuple(batch))
                batch, held = [], 0
            batch.append(piece)
            held += piece.numel
    if batch:
        streamed.append(tuple(batch))
    entire.sort(key=lambda piece: piece.numel, reverse=True)
    if together:  # units differ in size: the large ones first, so that workers end together
        streamed.sort(key=lambda pieces: sum(p.numel for p in pieces), reverse=True)
    cut = [*(((piece,), True) for piece in entire), *((pieces, False) for pieces in streamed)]
    return [Unit(number, pieces, is_whole) for number, (pieces, is_whole) in enumerate(cut)]


class Stacks:
    """The task vectors of a family (difference vectors where it has no base), piece by piece.

    Attributes:
        names: Reference names of the tensors that every expert has in full, sorted.
        experts: Number of experts.
    """

    def __init__(self, family: Family) -> None:
        """Take the tensors every expert shares with the reference."""
        self._family = family
        self._reference = family.base
        self._deltas = [Deltas(e, family.base, family.has_base) for e in family.experts.values()]
        shared = [{*e.shared} - {*e.grown} for e in family.experts.values()]
        self.names: Sequence[str] = sorted(set[str].intersection(*shared))
        self.experts = len(self._deltas)
        self._finite = set[tuple[str, int]]()
        self._own = threading.local()
        self._transposed = transposed_weights(family.base.specs)

    def site(self, piece: Piece) -> Site:
        """Where a piece is."""
        spec = piece.spec
        start = piece.start * (spec.numel // spec.shape[0]) if piece.start else 0
        return Site(spec.name, spec.shape, start, spec.name in self._transposed)

    def read(
        self, piece: Piece, *, reuse: bool = False
    ) -> tuple[Float[Tensor, "expert ..."], Float[Tensor, "..."]]:
        """The stacked deltas of a piece, and the reference's values; fp32.

        With `reuse` the stack is overwritten by this thread's next one: fresh memory costs as much
        as filling it.
        """
        stack = self._stack(piece, reuse)
        rows = self._rows_present(piece)
        if rows is not None:
            return self._read_settled(piece, stack, *rows)
        if not self._family.has_base:
            for place, deltas in zip(stack, self._deltas, strict=True):
                place.copy_(self._expert(deltas, piece))
            reference = stack.mean(dim=0)
            return stack.sub_(reference), reference
        reference = _rows(self._reference, piece.spec.name, piece).float()
        for place, deltas in zip(stack, self._deltas, strict=True):
            factors = deltas.factors(piece.spec.name)
            if factors is not None:
                torch.mm(factors[0][piece.start : piece.stop], factors[1], out=place)
            elif deltas.unchanged(piece.spec.name):
                place.zero_()
            else:
                place.copy_(self._expert(deltas, piece)).sub_(reference)
        return stack, reference

    def combined(self, piece: Piece, coefficients: Sequence[float]) -> Float[Tensor, "..."] | None:
        """(1 - Σ c_n) θ₀ + Σ c_n θ_n of a piece, fp32; the base is not read if that is 0.

        None where the experts' values are not simply stored in 16 bits, as of adapters, and for
        vocabularies that differ.
        """
        name, rest = piece.spec.name, 1.0 - math.fsum(coefficients)
        needs_base = abs(rest) > 1e-12
        if needs_base and not self._family.has_base:
            return None
        if self._rows_present(piece) is not None or not all(d.stored(name) for d in self._deltas):
            return None
        values = self._stack(piece, reuse=True)[0]
        total = torch.zeros(piece.shape)
        if needs_base:
            total.add_(values.copy_(_rows(self._reference, name, piece)), alpha=rest)
        for coefficient, deltas in zip(coefficients, self._deltas, strict=True):
            total.add_(values.copy_(self._expert(deltas, piece)), alpha=coefficient)
        return total

    def given(
        self, method: MergeMethod, parameters: Parameters, piece: Piece, undivided: bool
    ) -> tuple[Float[Tensor, "expert ..."], Callable[[Tensor], Tensor]]:
        """What a method is given of a piece, and what makes a task vector of its answer.

        For most that is the stack as it is. Matrices of adapters enter as small as the method's
        symmetry allows (`MergeMethod.in_bases`). Stacks of rows are reused, as `read` says.
        """
        factors = self.factors(piece.spec.name) if undivided else None
        if factors is None:
            return self.read(piece, reuse=not undivided)[0], lambda merged: merged
        return method.in_bases(factors, parameters, self.site(piece))

    def factors(self, name: str) -> list[Factors] | None:
        """The task vectors of a matrix as exact factors, if every expert is an adapter there.

        An adapter that leaves the matrix alone has factors of rank 0.
        """
        spec = self._reference.specs[name]
        if len(spec.shape) != 2:
            return None
        found: list[Factors] = []
        for deltas in self._deltas:
            factors = deltas.factors(name)
            if factors is None and deltas.unchanged(name):
                factors = torch.zeros(spec.shape[0], 0), torch.zeros(0, spec.shape[1])
            if factors is None:
                return None
            found.append(factors)
        return found if any(left.shape[1] for left, _ in found) else None

    def reference(self, piece: Piece) -> Tensor:
        """The reference's own values, of its own dtype; experts' means for rows it lacks."""
        rows = self._rows_present(piece)
        if rows is not None and not rows[1].all():
            return self.read(piece)[1]
        return _rows(self._reference, piece.spec.name, piece)

    def faults(self, stack: Float[Tensor, "..."], piece: Piece) -> list[str]:
        """What is not finite in a piece, told of base and experts; usually nothing.

        What was finite once is not asked again.
        """
        key = piece.spec.name, piece.start
        # One reduction tells: a sum is finite only if every term is.
        if key in self._finite or not stack.numel() or math.isfinite(float(stack.sum())):
            self._finite.add(key)
            return []
        name, found = piece.spec.name, list[str]()
        if self._family.has_base:
            found += not_finite("The base", name, self._reference.read(name))
        for deltas in self._deltas:
            raw = deltas.alignment.files[name]
            tensor = deltas.alignment.checkpoint.read(raw)
            found += not_finite(f"Expert '{deltas.alignment.name}'", raw, tensor)
        return found

    def working_bytes(self, piece: Piece, bytes_per_entry: int, undivided: bool) -> int:
        """Peak bytes of merging a piece: read, stacked, worked on, cast and written."""
        stacked = bytes_per_entry * self.experts * piece.numel
        return stacked + (working_bytes(piece.shape) if undivided else 24 * piece.numel)

    def _stack(self, piece: Piece, reuse: bool) -> Float[Tensor, "expert ..."]:
        shape = (self.experts, *piece.shape)
        if not reuse:
            return torch.empty(shape)
        held = getattr(self._own, "stack", None)
        if held is None or held.numel() < math.prod(shape):
            self._own.stack = held = torch.empty(math.prod(shape))
        return held[: math.prod(shape)].view(shape)

    def _rows_present(
        self, piece: Piece
    ) -> tuple[Bool[Tensor, "expert row"], Bool[Tensor, " row"]] | None:
        """Which rows of a vocabulary the experts and the base have; None if all have all."""
        vocabulary = self._family.vocabulary
        if vocabulary is None or not has_vocabulary_axis(piece.spec, vocabulary.size):
            return None
        span = piece.start, piece.stop
        present = torch.stack([rows.present(*span) for rows in vocabulary.experts.values()])
        base = vocabulary.base
        in_base = torch.zeros(present.shape[1:], dtype=torch.bool)
        if base is not None:
            in_base = base.present(*span)
        return None if present.all() and (base is None or in_base.all()) else (present, in_base)

    def _read_settled(
        self,
        piece: Piece,
        stack: Float[Tensor, "expert row *rest"],
        present: Bool[Tensor, "expert row"],
        in_base: Bool[Tensor, " row"],
    ) -> tuple[Float[Tensor, "expert row *rest"], Float[Tensor, "row *rest"]]:
        """As `read`, for rows of a vocabulary that some models lack."""
        for place, deltas in zip(stack, self._deltas, strict=True):
            place.copy_(self._expert(deltas, piece))
        reference = torch.zeros(piece.shape)
        if self._family.has_base:
            reference.copy_(_rows(self._reference, piece.spec.name, piece))
        settle(stack, reference, present, in_base)
        return stack, reference

    def _expert(self, deltas: Deltas, piece: Piece) -> Tensor:
        alignment = deltas.alignment
        return _rows(alignment.checkpoint, alignment.files[piece.spec.name], piece)


def _rows(checkpoint: Checkpoint, name: str, piece: Piece) -> Tensor:
    if piece.is_whole:
        return checkpoint.read(name)
    return checkpoint.read_rows(name, piece.start, piece.stop)
