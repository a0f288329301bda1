"""Tensors a chunk of entries at a time: what is made on the way does not grow with the tensor."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool
from torch import Tensor

CHUNK = 1 << 18
"""Entries at a time: a few MiB of temporaries, and many entries beside the cost of a call."""


def chunk_bytes(numel: int) -> int:
    """What is made on the way from a tensor of so many entries, about: some fp64, some indices."""
    return 24 * min(numel, CHUNK)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of as many entries each, flattened, into views of at most `CHUNK` of them."""
    return zip(*(tensor.reshape(-1).split(CHUNK) for tensor in tensors), strict=True)


def by_chunks(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """`function(*tensors)` of an entry-wise function, of this dtype, flattened."""
    found = tensors[0].new_empty(tensors[0].numel(), dtype=dtype)
    for target, *parts in chunks(found, *tensors):
        target.copy_(function(*parts))
    return found


def chosen(
    entries: Tensor, marked: Bool[Tensor, " entry"], dtype: torch.dtype | None = None
) -> Tensor:
    """`entries[marked]`, flattened, without the indices of all; of another dtype if asked for."""
    found = entries.new_empty(int(marked.count_nonzero()), dtype=dtype or entries.dtype)
    stop = 0
    for part, here in chunks(entries, marked):
        values = part[here]
        start, stop = stop, stop + len(values)
        found[start:stop] = values
    return found


def put(
    target: Tensor, marked: Bool[Tensor, " entry"], values: Callable[[int, int], Tensor]
) -> None:
    """Fill the entries marked; `values(start, stop)` gives those of the marked ones so numbered."""
    stop = 0
    for part, here in chunks(target, marked):
        start, stop = stop, stop + int(here.count_nonzero())
        part[here] = values(start, stop)


def keep_first(marked: Bool[Tensor, " entry"], count: int) -> None:
    """Unmark all but the first so many marked entries, in place."""
    for (here,) in chunks(marked):
        found = int(here.count_nonzero())
        if found > count:
            here[here.nonzero()[count:, 0]] = False
        count = max(count - found, 0)
