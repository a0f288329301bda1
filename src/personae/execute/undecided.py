"""What a merge leaves open until all of the model has voted, kept beside its unfinished output.

TIES and DARE-TIES give entries on which no sign wins the sign of the model's majority. To look at
everything for that alone would cost as much as half the merge, so units are written without it.
What either sign would make of those entries waits in a file a unit, and is put in place at the end.
Of bf16 models that is one entry in some hundreds; where votes cancel often, the look is taken.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from personae.execute import pool
from personae.execute.pieces import Piece, Unit
from personae.execute.work import Work
from personae.methods import Undecided
from personae.writers import CheckpointWriter, output_errors

_FOLDER = ".undecided"
_VOTES = "votes"

BYTES_LEFT_OPEN = 44
"""Bytes of memory that an entry takes at most if it is undecided: told, kept, copied to a file."""


class LeftOpen:
    """The undecided entries of one unit, and how it voted."""

    def __init__(self) -> None:
        """Nothing is merged yet."""
        self._votes = 0
        self._values: dict[str, Tensor] = {}

    def add(self, piece: Piece, told: Undecided, reference: Float[Tensor, "..."]) -> None:
        """Take what was told of a piece, whose result is relative to the reference's values."""
        self._votes += told.votes
        entries = told.places
        if len(entries):
            own = reference.reshape(-1)[entries]
            self._values[_key(piece, "entries")] = entries.int()
            self._values[_key(piece, "positive")] = told.positive + own
            self._values[_key(piece, "negative")] = told.negative + own

    def to_bytes(self) -> bytes:
        """As a file of safetensors."""
        return safetensors.torch.save({_VOTES: torch.tensor(self._votes), **self._values})


class UndecidedEntries:
    """The undecided entries of a merge, a file a unit; they outlive a run that is killed."""

    def __init__(self, directory: Path) -> None:
        """Keep them in the directory that the merge writes to."""
        self._folder = directory / _FOLDER

    def put(self, unit: Unit, left_open: LeftOpen) -> None:
        """Keep what a unit leaves open.

        Raises:
            OutputError: if the disk refuses.
        """
        path = self._path(unit)
        with output_errors(path):
            self._folder.mkdir(exist_ok=True)
            path.write_bytes(left_open.to_bytes())

    def decide(self, units: Sequence[Unit], writer: CheckpointWriter, work: Work) -> None:
        """Count the votes of all units, and give undecided entries the sign of the majority.

        Raises:
            OutputError: if the disk refuses.
            WorkError: if a finite value does not fit in the dtype of its tensor.
        """
        votes = sum(self._votes(unit) for unit in units)
        if not votes:
            return
        which: Literal["positive", "negative"] = "positive" if votes > 0 else "negative"

        def write(unit: Unit) -> None:
            kept = safetensors.torch.load_file(self._path(unit))
            for piece in unit.pieces:
                entries = kept.get(_key(piece, "entries"))
                if entries is not None:
                    values = kept[_key(piece, which)]
                    writer.replace(piece.spec.name, piece.first_entry + entries.long(), values)

        stage = "deciding by majority"
        work.progress(stage, 0, len(units))
        results = pool.run(
            units,
            write,
            cost=lambda unit: 8 * unit.largest.numel,
            workers=work.threads,
            memory=work.memory,
            in_order=True,
        )
        for done, _ in enumerate(results, 1):
            work.progress(stage, done, len(units))

    def has(self, number: int) -> bool:
        """Whether what the unit of this number leaves open is here, whole."""
        try:
            with safetensors.safe_open(self._folder / f"{number}.safetensors", "pt"):
                return True
        except (OSError, safetensors.SafetensorError):
            return False

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _votes(self, unit: Unit) -> int:
        with safetensors.safe_open(self._path(unit), "pt") as file:
            return int(file.get_tensor(_VOTES))

    def _path(self, unit: Unit) -> Path:
        return self._folder / f"{unit.number}.safetensors"


def _key(piece: Piece, what: Literal["entries", "positive", "negative"]) -> str:
    return f"{what}/{piece.start}/{piece.spec.name}"
