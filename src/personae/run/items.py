"""Items: what one worker does at a time.

Chunks enough that handing them out costs nothing beside the work. They follow from headers and
method alone, never from workers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from personae._types import TensorSpec
from personae.family.chunks import Chunk, rows_of, whole_or_matrices

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
