"""What a merge leaves open until all that votes has voted, kept beside its unfinished output.

TIES and DARE-TIES give entries on which no sign wins the sign of the majority, of the model or of
their tensor. A pass for that alone would cost as much as half the merge, so tensors
are written without it. What either sign would make of those entries waits, in files once it is
much, and is put in place at the end. Of bf16 models that is one entry in some hundreds; where votes
cancel often, the pass is taken.
"""

import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae._safetensors import load_safetensors, open_safetensors
from personae.family.chunks import Chunk, Item
from personae.methods import MOST_TOLD, DeltaBlocks, Undecided
from personae.run.work import Work
from personae.writers import CheckpointWriter, output_errors

_FOLDER = ".undecided"
_VOTES = "votes"
_FULL_FILES = "full_files"

FILE_ENTRIES = 1 << 15
"""Undecided entries that wait in memory before they go to a file."""
BYTES_ON_DISK = 12
"""Bytes of a file that an undecided entry takes: its place, and what either sign makes of it."""
_BYTES_TOLD = 48
"""Bytes of memory of an undecided entry that is told of, on its way to the buffer."""
_HEADER_BYTES = 3 * 160
"""What a file says of the entries of one chunk, beside the tensor's name."""
_FURTHEST = 1 << 31
"""Entries of a tensor that places in 32 bits reach."""


class Waiting:
    """Undecided entries in memory: one buffer, which is used again.

    In arrays of their own, some hundreds of entries each, they would lie between the blocks that
    are merged, and keep the C library from using the memory of those again.
    """

    def __init__(self) -> None:
        """Nothing waits."""
        self._places = np.empty(FILE_ENTRIES, np.int32)
        self._either = np.empty((2, FILE_ENTRIES), np.float32)
        self.clear()

    def clear(self) -> None:
        """Forget them all."""
        self._held = 0
        self._runs: list[tuple[str, int, int]] = []  # tensor, first place, where in the buffer

    @property
    def room(self) -> int:
        """How many more entries fit."""
        return FILE_ENTRIES - self._held

    def add(
        self,
        name: str,
        places: Int64[ndarray, " some"],
        positive: Float[ndarray, " some"],
        negative: Float[ndarray, " some"],
    ) -> None:
        """Take entries of a tensor, at least one, as many as there is room for at most.

        Places are ascending.
        """
        first = int(places[0])
        known, start = self._runs[-1][:2] if self._runs else ("", 0)
        if known != name or not start <= first <= int(places[-1]) < start + _FURTHEST:
            self._runs.append((name, first, self._held))
            start = first
        taken = slice(self._held, self._held + len(places))
        self._places[taken] = places - start
        self._either[0, taken], self._either[1, taken] = positive, negative
        self._held += len(places)

    def tensors(self) -> dict[str, Tensor]:
        """What waits, as it is written; views of the buffer."""
        found: dict[str, Tensor] = {}
        bounds = pairwise([*(start for _, _, start in self._runs), self._held])
        for (name, first, _), (start, end) in zip(self._runs, bounds, strict=True):
            where = f"{first}/{name}"
            found[f"entries/{where}"] = torch.from_numpy(self._places[start:end])
            found[f"positive/{where}"] = torch.from_numpy(self._either[0, start:end])
            found[f"negative/{where}"] = torch.from_numpy(self._either[1, start:end])
        return found


class LeftOpen:
    """The undecided entries of what one worker merges, and how all of its entries voted."""

    def __init__(self, path: Path, waiting: Waiting) -> None:
        """Nothing is merged yet; files are named after `path`, and entries wait in `waiting`."""
        self._path, self._waiting = path, waiting
        self._clear()

    def of(self, chunk: Chunk, blocks: DeltaBlocks) -> "UndecidedOfChunk":
        """Where to tell of a chunk, as its blocks are merged."""
        return UndecidedOfChunk(self, chunk, blocks)

    def add(
        self,
        name: str,
        places: Int64[ndarray, " some"],
        positive: Float[ndarray, " some"],
        negative: Float[ndarray, " some"],
    ) -> None:
        """Take some entries of a tensor, and what either sign makes of them.

        Raises:
            OutputError: if the disk refuses.
        """
        while len(places):
            now = slice(self._waiting.room)
            self._waiting.add(name, places[now], positive[now], negative[now])
            places, positive, negative = (told[now.stop :] for told in (places, positive, negative))
            if not self._waiting.room:
                _save(_full_file(self._path, self._full_files), self._waiting.tensors())
                self._full_files += 1
                self._waiting.clear()

    def keep(self) -> None:
        """Write what still waits in memory, and the votes: the sign that nothing is missing.

        Raises:
            OutputError: if the disk refuses.
        """
        counts = {_VOTES: torch.tensor(self._votes), _FULL_FILES: torch.tensor(self._full_files)}
        _save(self._path, {**counts, **self._waiting.tensors()})

    def decide(self, writer: CheckpointWriter) -> None:
        """Put what all that was added elects in place, and begin anew.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in the dtype of its tensor.
        """
        _replace(self._waiting.tensors(), self._votes, writer)
        for number in range(self._full_files):
            path = _full_file(self._path, number)
            _replace(load_safetensors(path), self._votes, writer)
            path.unlink()
        self._clear()

    def _clear(self) -> None:
        self._votes = self._full_files = 0
        self._waiting.clear()

    def count_votes(self, votes: int) -> None:
        """Take how a chunk voted."""
        self._votes += votes


class UndecidedOfChunk(Undecided):
    """Hands on what it is told of one chunk: nothing of it waits here."""

    def __init__(self, left_open: LeftOpen, chunk: Chunk, blocks: DeltaBlocks) -> None:
        """Nothing of the chunk is merged yet."""
        super().__init__()
        self._left_open, self._chunk, self._blocks = left_open, chunk, blocks

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
        self.count += len(places)
        own = self._blocks.reference[places - self._blocks.start]
        places = places + self._chunk.first_entry
        self._left_open.add(self._chunk.spec.name, places, positive + own, negative + own)

    def done(self) -> None:
        """The chunk is merged: its votes count."""
        self._left_open.count_votes(self.votes)


class UndecidedEntries:
    """The undecided entries of a merge, by item; what is kept outlives a run that is killed."""

    def __init__(self, directory: Path) -> None:
        """Keep them in the directory that the merge writes to."""
        self._folder = directory / _FOLDER
        self._of_worker = threading.local()

    def of(self, item: Item) -> LeftOpen:
        """Where an item that is to be merged leaves its own.

        Raises:
            OutputError: if the disk refuses.
        """
        with output_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        if not hasattr(self._of_worker, "waiting"):
            self._of_worker.waiting = Waiting()
        return LeftOpen(self._path(item.number), self._of_worker.waiting)

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
    entries = sum(chunk.numel for chunk in item.chunks)
    there_and_in_a_file = 3 * BYTES_ON_DISK * min(FILE_ENTRIES, entries)
    return there_and_in_a_file + _BYTES_TOLD * min(MOST_TOLD, entries)


def disk_bytes(chunks: Iterable[Chunk]) -> int:
    """Bytes of the files of these chunks' undecided entries, if all are: the most there can be."""
    return sum(
        BYTES_ON_DISK * chunk.numel
        + (chunk.numel // FILE_ENTRIES + 2) * (_HEADER_BYTES + 3 * len(chunk.spec.name.encode()))
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
