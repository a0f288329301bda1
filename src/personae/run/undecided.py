"""What a merge leaves open until all that votes has voted, kept beside its unfinished output.

TIES and DARE-TIES give entries on which no sign wins the sign of the majority, of the model or of
their tensor. A pass for that alone would cost as much as half the merge, so tensors are written
with a guess, the sign of the majority so far. What else could become of those entries waits, in
files once it is much, and is put in place at the end where the guess was wrong. Of bf16 models that
is one entry in some hundreds; where votes cancel often, the pass is taken.
"""

import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from personae._safetensors import open_safetensors
from personae.family.chunks import Chunk, Item
from personae.methods import MOST_TOLD, ROUNDS_TO_INFINITY, DeltaBlocks, Undecided
from personae.run.work import Work
from personae.writers import CheckpointWriter, output_errors

_FOLDER = ".undecided"
_VOTES = "votes"
_FULL_FILES = "full_files"

FILE_ENTRIES = 1 << 15
"""Undecided entries that wait in memory before they go to a file."""
BYTES_ON_DISK = 12
"""Bytes of a file that an undecided entry takes: its place, and two values that it could get."""
_BYTES_TOLD = 48
"""Bytes of memory of an undecided entry that is told of, on its way to the buffer."""
_HEADER_BYTES = 3 * 160
"""What a file says of the entries of one chunk, beside the tensor's name."""
_FURTHEST = 1 << 31
"""Entries of a tensor that places in 32 bits reach."""
_OUTCOMES = {1: "positive", -1: "negative", 0: "neither"}
"""What the majority may be, and what is made of undecided entries then."""


class Waiting:
    """Undecided entries in memory: one buffer, which is used again.

    In arrays of their own, some hundreds of entries each, they would lie between the blocks that
    are merged, and keep the C library from using the memory of those again.
    """

    def __init__(self) -> None:
        """Nothing waits."""
        self._places = np.empty(FILE_ENTRIES, np.int32)
        self._values = np.empty((2, FILE_ENTRIES), np.float32)
        self.clear()

    def clear(self) -> None:
        """Forget them all."""
        self._held = 0
        # Tensor, sign that was guessed, first place, where in the buffer.
        self._runs: list[tuple[str, int, int, int]] = []

    @property
    def room(self) -> int:
        """How many more entries fit."""
        return FILE_ENTRIES - self._held

    def add(
        self,
        name: str,
        guess: int,
        places: Int64[ndarray, " some"],
        values: Float[ndarray, "2 some"],
    ) -> None:
        """Take entries of a tensor, at least one, as many as there is room for at most.

        Args:
            name: Which tensor.
            guess: The sign that they got.
            places: Which, ascending.
            values: What else they could be: the values of the other `_OUTCOMES`, in their order.
        """
        first = int(places[0])
        *known, start = self._runs[-1][:3] if self._runs else ("", 0, 0)
        reached = start <= first <= int(places[-1]) < start + _FURTHEST
        if known != [name, guess] or not reached:
            self._runs.append((name, guess, first, self._held))
            start = first
        taken = slice(self._held, self._held + len(places))
        self._places[taken] = places - start
        self._values[:, taken] = values
        self._held += len(places)

    def tensors(self) -> dict[str, Tensor]:
        """What waits, as it is written; views of the buffer."""
        found: dict[str, Tensor] = {}
        bounds = pairwise([*(start for *_, start in self._runs), self._held])
        for (name, guess, first, _), (start, end) in zip(self._runs, bounds, strict=True):
            where = f"{first}/{name}"
            found[f"entries/{where}"] = torch.from_numpy(self._places[start:end])
            others = (outcome for sign, outcome in _OUTCOMES.items() if sign != guess)
            for outcome, values in zip(others, self._values, strict=True):
                found[f"{outcome}/{where}"] = torch.from_numpy(values[start:end])
        return found


@dataclass
class VotesSoFar:
    """Entries that elect + minus entries that elect -, of what guesses are made.

    Some may be lost where two workers count at once.
    """

    count: int = 0


class LeftOpen:
    """The undecided entries of what one worker merges, and how all of its entries voted."""

    def __init__(self, path: Path, waiting: Waiting, so_far: VotesSoFar) -> None:
        """Nothing is merged yet.

        Args:
            path: What files are named after.
            waiting: Where entries wait.
            so_far: Counts the votes of the model, or of one tensor after the other.
        """
        self._path, self._waiting, self._so_far = path, waiting, so_far
        self._clear()

    def of(self, chunk: Chunk, blocks: DeltaBlocks, dtype: torch.dtype) -> "UndecidedOfChunk":
        """Where to tell of a chunk that comes out in this dtype, as its blocks are merged."""
        return UndecidedOfChunk(self, chunk, blocks, dtype)

    def guess(self, votes: int) -> int:
        """The sign of the majority so far, with so many more votes."""
        return 1 if self._so_far.count + votes >= 0 else -1

    def add(
        self,
        name: str,
        guess: int,
        places: Int64[ndarray, " some"],
        values: Float[ndarray, "2 some"],
    ) -> None:
        """Take some entries of a tensor; see `Waiting.add`.

        Raises:
            OutputError: if the disk refuses.
        """
        while len(places):
            now = self._waiting.room
            self._waiting.add(name, guess, places[:now], values[:, :now])
            places, values = places[now:], values[:, now:]
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
        """Put what all that was added elects in place where it is not, and begin anew.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in the dtype of its tensor.
        """
        waiting = self._waiting.tensors()
        _replace(waiting, waiting.__getitem__, self._votes, writer)
        for number in range(self._full_files):
            path = _full_file(self._path, number)
            _replace_kept(path, self._votes, writer)
            path.unlink()
        self._so_far.count = 0
        self._clear()

    def _clear(self) -> None:
        self._votes = self._full_files = 0
        self._waiting.clear()

    def count_votes(self, votes: int) -> None:
        """Take how a chunk voted."""
        self._votes += votes
        self._so_far.count += votes


class UndecidedOfChunk(Undecided):
    """Hands on what it is told of one chunk: nothing of it waits here."""

    def __init__(
        self, left_open: LeftOpen, chunk: Chunk, blocks: DeltaBlocks, dtype: torch.dtype
    ) -> None:
        """Nothing of the chunk is merged yet."""
        super().__init__()
        self._left_open, self._chunk, self._blocks = left_open, chunk, blocks
        self._limit = ROUNDS_TO_INFINITY.get(dtype, 0)

    def add(
        self,
        places: Int64[ndarray, " some"],
        positive: Float[ndarray, " some"],
        negative: Float[ndarray, " some"],
    ) -> int:
        """See `Undecided.add`. The sign is a guess; none where a sign's values may not fit.

        Raises:
            OutputError: if the disk refuses.
        """
        self.count += len(places)
        own = self._blocks.reference[places - self._blocks.start]
        made = {1: positive + own, -1: negative + own, 0: own}
        largest = max(np.abs(made[1]).max(), np.abs(made[-1]).max())
        fits = int(largest.view(np.uint32)) < self._limit
        guess = self._left_open.guess(self.votes) if fits else 0
        others = np.stack([values for sign, values in made.items() if sign != guess])
        first = self._chunk.first_entry
        self._left_open.add(self._chunk.spec.name, guess, places + first, others)
        return guess

    def done(self) -> None:
        """The chunk is merged: its votes count."""
        self._left_open.count_votes(self.votes)


class UndecidedEntries:
    """The undecided entries of a merge, by item; what is kept outlives a run that is killed."""

    def __init__(self, directory: Path, *, per_tensor: bool) -> None:
        """Keep them in the directory that the merge writes to.

        Args:
            directory: That directory.
            per_tensor: Whether the majority is that of each tensor, not of the model.
        """
        self._folder = directory / _FOLDER
        self._so_far = None if per_tensor else VotesSoFar()
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
        so_far = self._so_far or VotesSoFar()
        return LeftOpen(self._path(item.number), self._of_worker.waiting, so_far)

    def decide(self, items: Sequence[Item], writer: CheckpointWriter, work: Work) -> None:
        """Count the votes of all items, and give undecided entries the sign of the majority.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in the dtype of its tensor.
        """
        votes = sum(self._count(item.number, _VOTES) for item in items)
        files = {item.number: self._files(item.number) for item in items}

        def write(item: Item) -> None:
            for path in files[item.number]:
                _replace_kept(path, votes, writer)

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


def _replace_kept(path: Path, votes: int, writer: CheckpointWriter) -> None:
    """As `_replace`, of what a file holds."""
    values = safetensors.torch.load(path.read_bytes())
    _replace(values, values.__getitem__, votes, writer)


def _replace(
    names: Collection[str], read: Callable[[str], Tensor], votes: int, writer: CheckpointWriter
) -> None:
    """Write what the votes make of undecided entries, where they have not got that already.

    Args:
        names: Of what waits, as `Waiting.tensors` names it.
        read: Gives what has one of the names.
        votes: Entries that elect + minus entries that elect -.
        writer: Where the entries are.
    """
    decided = _OUTCOMES[(votes > 0) - (votes < 0)]
    for name in names:
        outcome, _, where = name.partition("/")
        if outcome == decided:
            first, tensor = where.split("/", 1)
            entries = int(first) + read(f"entries/{where}").long()
            writer.replace(tensor, entries, read(name))
