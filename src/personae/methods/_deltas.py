"""Deltas a block of entries at a time: few enough for a core's cache, from whatever holds them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from personae import kernels

BLOCK = 1 << 17
"""Entries of each expert in a block, at most, unless one row has more."""
_ROOM = 1 << 18
_LEAST = 1 << 12
_STORED = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
INFINITY = 0x7F80_0000
"""The bits of infinity in fp32: those of a magnitude that is no number are no fewer."""
ROUNDS_TO_INFINITY = {
    torch.bfloat16: 0x7F7F_8000,
    torch.float16: 0x477F_F000,
    torch.float32: INFINITY,
}
"""The bits of the smallest magnitude in fp32 that a dtype does not hold; the dtypes of `as_stored`
that need no conversion."""


class NotFinite(Exception):
    """A delta is NaN or infinite.

    Attributes:
        faults: What is to be said of it; nothing where the models that it is of are to be asked.
    """

    def __init__(self, faults: Sequence[str] = ()) -> None:
        """Raise it with what is known."""
        super().__init__(*faults)
        self.faults = faults


class DeltaBlocks:
    """The deltas of one tensor, or of rows of it, cut into blocks that can be overwritten.

    Or the models themselves, of methods that need these.

    Iterating gives the first entry of each block, and its deltas: (expert, entry), fp32. The next
    block takes their place.

    Attributes:
        experts: How many there are.
        entries: Entries of each.
        start: The first entry of the block given last.
        reference: The reference's values in that block, fp32.
        changed: Whether any delta given so far is not 0, or any model differs from the first.
    """

    def __init__(
        self,
        models: Iterable[Shaped[Tensor, "..."]],
        reference: Shaped[Tensor, "..."] | None = None,
        *,
        are_deltas: bool = False,
    ) -> None:
        """Take the values of models as they are stored; nothing is copied or converted yet.

        Args:
            models: One an expert, of one shape and any floating dtype.
            reference: What is subtracted; of models that are given as they are, nothing.
            are_deltas: Whether they are deltas already, so that nothing is to be subtracted.
        """
        self._models = list(map(as_stored, models))
        self._reference = None if reference is None else as_stored(reference)
        self._are_deltas = are_deltas
        self.experts, self.entries = len(self._models), self._models[0].size
        self._row = 1
        self.reference: Float[ndarray, " entry"] = np.empty(0, np.float32)
        self.start = 0
        self.changed = False

    @property
    def has_reference(self) -> bool:
        """Whether it is known what the deltas are taken from."""
        return self._reference is not None

    def in_rows(self, entries: int) -> "DeltaBlocks":
        """The same, in blocks of whole rows of so many entries."""
        self._row = entries
        return self

    def __iter__(self) -> Iterator[tuple[int, Float[ndarray, "expert entry"]]]:
        """See the class.

        Raises:
            NotFinite: if one of the models is not finite, or its delta; deltas are not asked.
        """
        step = min(block_entries(self.experts, self._row), max(self.entries, 1))
        room = np.empty(self.experts * step, np.float32)
        reference = np.empty(step if self.has_reference else 0, np.float32)
        for start in range(0, self.entries, step):
            count = min(step, self.entries - start)
            block = slice(start, start + count)
            deltas = room[: self.experts * count].reshape(self.experts, count)
            if self._reference is not None:
                self.reference = reference[:count]
                kernels.widen(self._reference[block], self.reference)
            for model, target in zip(self._models, deltas, strict=True):
                self._fill(target, model[block], deltas[0])
            self.start = start
            yield start, deltas

    def _fill(self, target: ndarray, model: ndarray, first: ndarray) -> None:
        """One model's entries of a block.

        Raises:
            NotFinite: if one is not finite.
        """
        if self._reference is not None and not self._are_deltas:
            largest = kernels.subtract(model, self.reference, target)
            self.changed = self.changed or largest > 0
        else:
            largest = kernels.widen(model, target)
            zero = 0 if self._are_deltas else first
            self.changed = self.changed or not np.array_equal(
                target, np.broadcast_to(zero, target.shape)
            )
        if largest >= INFINITY and not self._are_deltas:
            raise NotFinite


def delta_blocks(vectors: "Tensor | DeltaBlocks", row: int = 1) -> DeltaBlocks:
    """Task vectors (expert, *shape), or blocks of them, as blocks; of whole rows if given one's."""
    if isinstance(vectors, DeltaBlocks):
        return vectors if row == 1 else vectors.in_rows(row)
    return DeltaBlocks(list(vectors.cpu()), are_deltas=True).in_rows(row)


def joined(
    merged: Iterator[Float[ndarray, " entry"]], task_vectors: Float[Tensor, "expert *shape"]
) -> Float[Tensor, "*shape"]:
    """Blocks of what was made of task vectors, in one tensor on their device."""
    whole, start = np.empty(task_vectors[0].numel(), np.float32), 0
    for block in merged:
        whole[start : start + len(block)] = block
        start += len(block)
    return torch.from_numpy(whole).reshape(task_vectors.shape[1:]).to(task_vectors.device)


def block_entries(experts: int, row: int = 1) -> int:
    """Entries of each of so many experts in a block: whole rows, at least one."""
    return max(min(BLOCK, max(_LEAST, _ROOM // experts // _LEAST * _LEAST)) // row, 1) * row


def stored_bytes(dtype: torch.dtype) -> int:
    """Bytes an entry of what `as_stored` gives."""
    return dtype.itemsize if dtype in _STORED else torch.float32.itemsize


def as_stored(values: Shaped[Tensor, "..."]) -> ndarray:
    """The entries as loops take them (`kernels.stored`): bf16 as uint16, fp16 as int16, or fp32."""
    values = values.detach().reshape(-1)
    if values.dtype not in _STORED:
        values = values.float()
    return values.contiguous().view(_STORED[values.dtype]).numpy()
