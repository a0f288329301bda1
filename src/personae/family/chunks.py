"""Tensors cut for streaming: chunks, and items of them.

A `Chunk` is what is held at once: a whole tensor, or a block of its rows where the method lets
rows be cut apart. An `Item` is what one worker does at a time: chunks enough that handing them out
costs nothing beside the work. Both follow from headers and method alone, never from workers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

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


def parts_of(chunk: Chunk, count: int) -> list[Chunk]:
    """A chunk of a matrix or stack in at most so many parts, by rows; of anything else itself."""
    rows = chunk.stop - chunk.start
    if len(chunk.spec.shape) < 2 or rows < 2:
        return [chunk]
    step = -(-rows // count)
    starts = range(chunk.start, chunk.stop, step)
    return [replace(chunk, start=start, stop=min(start + step, chunk.stop)) for start in starts]


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


ITEM_ENTRIES = 1 << 22
"""Entries of the chunks of one item, about: some ten milliseconds of work."""
ITEM_CHUNKS = 256
"""Chunks of one item, at most: of tiny tensors the number is the work."""


@dataclass(frozen=True, slots=True)
class Item:
    """Chunks that one worker works through, in order.

    Attributes:
        number: Its place among the items of a run.
        chunks: At least one.
        whole: Whether its one chunk is a tensor, or a matrix of a stack, given whole to a method
            that needs it so.
    """

    number: int
    chunks: tuple[Chunk, ...]
    whole: bool

    @property
    def largest(self) -> Chunk:
        """The chunk of most entries."""
        return max(self.chunks, key=lambda chunk: chunk.numel)


def items(
    specs: Iterable[TensorSpec],
    undivided: Callable[[TensorSpec], bool],
    together: bool,
    whole_vectors: bool = False,
) -> list[Item]:
    """Cut tensors into items: first those given whole, largest first, then the others in order.

    Args:
        specs: Tensors in the order of their names, which is about their order on disk.
        undivided: Whether a tensor must be given whole.
        together: Whether all rows of a tensor go to one item, as statistics of it alone need.
        whole_vectors: Whether vectors are not cut, as rows are not.
    """
    streamed: list[tuple[Chunk, ...]] = []
    entire: list[Chunk] = []
    batch: list[Chunk] = []
    held = 0
    for spec in specs:
        if undivided(spec):
            entire += whole_or_matrices(spec)
            continue
        for chunk in rows_of(spec, whole_vectors):
            is_full = held + chunk.numel > ITEM_ENTRIES or len(batch) == ITEM_CHUNKS
            if batch and is_full and not (together and batch[-1].spec is spec):
                streamed.append(tuple(batch))
                batch, held = [], 0
            batch.append(chunk)
            held += chunk.numel
    if batch:
        streamed.append(tuple(batch))
    entire.sort(key=lambda chunk: chunk.numel, reverse=True)
    if together:  # items differ in size: the large ones first, so that workers end together
        streamed.sort(key=lambda chunks: sum(p.numel for p in chunks), reverse=True)
    cut = [*(((chunk,), True) for chunk in entire), *((chunks, False) for chunks in streamed)]
    return [Item(number, chunks, is_whole) for number, (chunks, is_whole) in enumerate(cut)]
