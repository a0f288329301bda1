"""Tensors cut for streaming.

A `Piece` is what is held at once: a whole tensor, or a block of its rows where the method lets
rows be cut apart. A `Unit` is what one worker does at a time: pieces enough that handing them out
costs nothing beside the work. Both follow from headers and method alone, never from workers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from personae._types import TensorSpec
from personae.methods import stacked_matrices

PIECE_ENTRIES = 1 << 20
"""Entries of one expert in a block of rows: the stack of a few experts stays near the cache."""
UNIT_ENTRIES = 1 << 22
"""Entries of the pieces of one unit, about: some ten milliseconds of work."""
UNIT_PIECES = 256
"""Pieces of one unit, at most: of tiny tensors the number is the work."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` of one tensor; a scalar is its one row.

    Attributes:
        spec: The tensor.
        start: First row.
        stop: Row after the last one.
        is_matrix: Whether its one row is a matrix of a stack, and has two axes.
    """

    spec: TensorSpec
    start: int
    stop: int
    is_matrix: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return not self.spec.shape or (self.start, self.stop) == (0, self.spec.shape[0])

    @property
    def first_entry(self) -> int:
        """Flat index, in the tensor, of its first entry."""
        return self.start * (self.spec.numel // self.spec.shape[0]) if self.start else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows, or of the matrix."""
        if self.is_matrix:
            return self.spec.shape[1:]
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
        whole: Whether its one piece is a tensor, or a matrix of a stack, given whole to a method
            that needs it so.
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


def whole_or_matrices(spec: TensorSpec) -> list[Piece]:
    """All of a tensor as one piece, or the matrices of a stack as one each."""
    matrices = stacked_matrices(spec.name, spec.shape)
    return [Piece(spec, m.start, m.stop, is_matrix=True) for m in matrices] or [whole(spec)]


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
            entire += whole_or_matrices(spec)
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
