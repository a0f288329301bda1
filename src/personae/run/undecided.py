"""What a merge leaves open until all that votes has voted, kept beside its unfinished output.

TIES and DARE-TIES give entries on which no sign wins the sign of the majority, of the model or of
their tensor. A pass for that alone would cost as much as half the merge, so tensors
are written without it. What either sign would make of those entries waits, in files once it is
much, and is put in place at the end. Of bf16 models that is one entry in some hundreds; where votes
cancel often, the pass is taken.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae._safetensors import load_safetensors, open_safetensors
from personae.family.chunks import Chunk, Item
from personae.methods import BLOCK, DeltaBlocks, Undecided
from personae.run.work import Work
from personae.writers import CheckpointWriter, output_errors

_FOLDER = ".undecided"
_VOTES = "votes"
_FULL_FILES = "full_files"

FILE_ENTRIES = 1 << 15
"""Undecided entries that wait in memory before they go to a file, about."""
FEW = 1 << 14
"""Undecided entries of one chunk that are handed on together, at least, but for its last ones."""
BYTES_ON_DISK = 12
"""Bytes of a file that an undecided entry takes: its place, and what either sign makes of it."""
_BYTES_WAITING = 4 * BYTES_ON_DISK
"""Bytes of memory of an entry that waits: itself, and its way to a file or back."""
_HEADER_BYTES = 3 * 160
"""What a file says of the entries told together, beside the tensor's name."""


class LeftOpen:
    """The undecided entries of what one worker merges, and how all of its entries voted."""

    def __init__(self, path: Path) -> None:
        """Nothing is merged yet; files are named after `path`."""
        self._path = path
        self._clear()

    def of(self, chunk: Chunk, blocks: DeltaBlocks) -> "UndecidedOfChunk":
        """Where to tell of a chunk, as its blocks are merged."""
        return UndecidedOfChunk(self, chunk, blocks)

    def add(
        self,
        chunk: Chunk,
        places: Int64[Tensor, " some"],
        positive: Float[Tensor, " some"],
        negative: Float[Tensor, " some"],
    ) -> None:
        """Take some entries of a chunk, and what either sign makes of them.

        Raises:
            OutputError: if the disk refuses.
        """
        first = int(places[0])
        where = f"{chunk.first_entry + first}/{chunk.spec.name}"
        self._values[f"entries/{where}"] = (places - first).int()
        self._values[f"positive/{where}"] = positive
        self._values[f"negative/{where}"] = negative
        self._held += len(places)
        if self._held >= FILE_ENTRIES:
            _save(_full_file(self._path, self._full_files), self._values)
            self._full_files += 1
            self._values, self._held = {}, 0

    def keep(self) -> None:
        """Write what still waits in memory, and the votes: the sign that nothing is missing.

        Raises:
            OutputError: if the disk refuses.
        """
        counts = {_VOTES: torch.tensor(self._votes), _FULL_FILES: torch.tensor(self._full_files)}
        _save(self._path, {**counts, **self._values})

    def decide(self, writer: CheckpointWriter) -> None:
        """Put what all that was added elects in place, and begin anew.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in the dtype of its tensor.
        """
        _replace(self._values, self._votes, writer)
        for number in range(self._full_files):
            path = _full_file(self._path, number)
            _replace(load_safetensors(path), self._votes, writer)
            path.unlink()
        self._clear()

    def _clear(self) -> None:
        self._votes = self._full_files = self._held = 0
        self._values: dict[str, Tensor] = {}

    def count_votes(self, votes: int) -> None:
        """Take how a chunk voted."""
        self._votes += votes


class UndecidedOfChunk(Undecided):
    """Hands on what it is told of one chunk, so that not all of it waits in memory."""

    def __init__(self, left_open: LeftOpen, chunk: Chunk, blocks: DeltaBlocks) -> None:
        """Nothing of the chunk is merged yet."""
        super().__init__()
        self._left_open, self._chunk, self._blocks = left_open, chunk, blocks
        self._waiting = 0

    def add(
        self,
        places: Int64[ndarray, " some"],
        positive: Float[ndarray, " some"],
        negative: Float[ndarray, " some"],
    ) -> None:
        """See `Undecided.add`.

        Raises:
            OutputError: if the disk refuses.
        """
        own = self._blocks.reference[places - self._blocks.start]
        super().add(places, positive + own, negative + own)
        self._waiting += len(places)
        if self._waiting >= FEW:
            self._hand_on()

    def done(self) -> None:
        """The chunk is merged: its votes count.

        Raises:
            OutputError: if the disk refuses.
        """
        self._hand_on()
        self._left_open.count_votes(self.votes)

    def _hand_on(self) -> None:
        if not self._waiting:
            return
        told = map(torch.from_numpy, (self.places, self.positive, self.negative))
        self._left_open.add(self._chunk, *told)
        self._told.clear()
        self._waiting = 0


class UndecidedEntries:
    """The undecided entries of a merge, by item; what is kept outlives a run that is killed."""

    def __init__(self, directory: Path) -> None:
        """Keep them in the directory that the merge writes to."""
        self._folder = directory / _FOLDER

    def of(self, item: Item) -> LeftOpen:
        """Where an item that is to be merged leaves its own.

        Raises:
            OutputError: if the disk refuses.
        """
        with output_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        return LeftOpen(self._path(item.number))

    def decide(self, items: Sequence[Item], writer: CheckpointWriter, work: Work) -> None:
        """Count the votes of all items, and give undecided entries the sign of the majority.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in the dtype of its tensor.
        """
        votes = sum(self._count(item.number, _VOTES) for item in items)
        if not votes:
            return

        def write(item: Item) -> None:
            for path in self._files(item.number):
                _replace(load_safetensors(path), votes, writer)

        work.each(items, write, cost=waiting_bytes, stage="deciding by majority", in_order=True)

    def has(self, number: int) -> bool:
        """Whether what the item of this number leaves open is here, whole."""
        try:
            for path in self._files(number):
                with open_safetensors(path):
                    pass
        except (OSError, safetensors.SafetensorError):
            return False
        return True

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self, number: int) -> list[Path]:
        path = self._path(number)
        full = range(self._count(number, _FULL_FILES))
        return [path, *(_full_file(path, each) for each in full)]

    def _count(self, number: int, what: str) -> int:
        with open_safetensors(self._path(number)) as file:
            return int(file.get_tensor(what))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"


def waiting_bytes(item: Item) -> int:
    """Memory of the undecided entries of an item that wait for their file, at most."""
    block = max(BLOCK, *(chunk.spec.shape[-1] for chunk in item.chunks if chunk.spec.shape), 0)
    entries = min(FILE_ENTRIES + FEW + block, sum(chunk.numel for chunk in item.chunks))
    return _BYTES_WAITING * entries


def disk_bytes(chunks: Iterable[Chunk]) -> int:
    """Bytes of the files of these chunks' undecided entries, if all are: the most there can be."""
    return sum(
        BYTES_ON_DISK * chunk.numel
        + (chunk.numel // FEW + 2) * (_HEADER_BYTES + 3 * len(chunk.spec.name.encode()))
        for chunk in chunks
    )


def _full_file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}.safetensors")


def _save(path: Path, values: Mapping[str, Tensor]) -> None:
    with output_errors(path):
        path.write_bytes(safetensors.torch.save(dict(values)))


def _replace(kept: Mapping[str, Tensor], votes: int, writer: CheckpointWriter) -> None:
    """Write what the sign of the votes makes of undecided entries; they are 0 if no sign wins."""
    if not votes:
        return
    sign = "positive" if votes > 0 else "negative"
    for key, entries in kept.items():
        what, _, where = key.partition("/")
        if what == "entries":
            first, name = where.split("/", 1)
            writer.replace(name, int(first) + entries.long(), kept[f"{sign}/{where}"])
