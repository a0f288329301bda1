"""Memory of chunks of tensors, which come and go by the thousand and are all of about one size."""

import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SMALLEST, _LARGEST = 1 << 18, 1 << 25
"""Bytes of what is kept for the next one; whole matrices may be larger, too much to keep."""
_CHUNK = 1 << 20
"""Entries of a usual chunk, in whose place there is room for smaller ones of its dtype's size."""
_PRIVATE: dict[str, Any] = (
    {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
)


def uninitialised(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU, of any values, in the place of one that is no longer needed.

    The place of the chunk before, to be exact: for an aligned block, as PyTorch asks for, glibc
    wants a hole larger than the block, so that a loop over chunks takes ever more memory, up to
    five times what is in use. Asking the system each time would have it clear every page.
    """
    size = math.prod(shape) * dtype.itemsize
    if not _SMALLEST <= size <= _LARGEST:
        return torch.empty(tuple(shape), dtype=dtype)
    block = _blocks.take(size, _CHUNK * dtype.itemsize)
    held = np.frombuffer(block, np.uint8, size)
    weakref.finalize(held, _blocks.give_back, block).atexit = False
    return torch.from_numpy(held).view(dtype).reshape(tuple(shape))


def give_back_freed() -> None:
    """Give the system what is kept for the next tensors."""
    _blocks.clear()


def kept_bytes() -> int:
    """How much that is."""
    return _blocks.size()


class _Blocks:
    """Blocks of memory that are not in use."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._taking = threading.Lock()

    def take(self, size: int, chunk: int) -> mmap.mmap:
        """The smallest block of this size, up to a quarter more, or at most as large as a chunk.

        Where there is none, as much is given back as is taken anew. So the last, short chunk of a
        tensor does not take the place of a whole one from that of the next tensor.
        """
        most = max(size + size // 4, chunk)
        with self._taking:
            fitting = [block for block in self._free if size <= len(block) <= most]
            if fitting:
                found = min(fitting, key=len)
                self._free.remove(found)
                return found
            given = 0
            while self._free and given < size:
                given += len(self._free.pop(0))
        return mmap.mmap(-1, size, **_PRIVATE)

    def give_back(self, block: mmap.mmap) -> None:
        """Keep a block. Called by the garbage collector, at any moment: it must not wait."""
        self._free.append(block)

    def size(self) -> int:
        """Bytes of all."""
        return sum(map(len, list(self._free)))

    def clear(self) -> None:
        """Keep none."""
        with self._taking:
            self._free.clear()


_blocks = _Blocks()
