"""Tensors cut for streaming.

A `Chunk` is what is held at once: a whole tensor, or a block of its rows where the method lets
rows be cut apart. It follows from headers and method alone, never from workers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from personae._types import TensorSpec
from personae.methods import stacked_matrices

CHUNK_ENTRIES = 1 << 20
"""Entries of one expert in a block of rows: the stack of a few experts stays near the cache."""


@dataclass(frozen=True, slots=True)
class Chunk:
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


def whole(spec: TensorSpec) -> Chunk:
    """All of a tensor as one chunk."""
    return Chunk(spec, 0, spec.shape[0] if spec.shape else 1)


def whole_or_matrices(spec: TensorSpec) -> list[Chunk]:
    """All of a tensor as one chunk, or the matrices of a stack as one each."""
    matrices = stacked_matrices(spec.name, spec.shape)
    return [Chunk(spec, m.start, m.stop, is_matrix=True) for m in matrices] or [whole(spec)]


def rows_of(spec: TensorSpec, whole_vectors: bool = False) -> Iterator[Chunk]:
    """A tensor as blocks of rows of at most `CHUNK_ENTRIES` entries, and at least one row.

    Args:
        spec: The tensor.
        whole_vectors: Whether a vector is one row, and not as many as it has entries.
    """
    if len(spec.shape) <= whole_vectors or spec.numel <= CHUNK_ENTRIES:
        yield whole(spec)
        return
    rows = max(1, CHUNK_ENTRIES * spec.shape[0] // spec.numel)
    for start in range(0, spec.shape[0], rows):
        yield Chunk(spec, start, min(start + rows, spec.shape[0]))
