"""How a killed run goes on: a note in its unfinished output says whose work lies there.

Its first line is the *identity* of the run: inputs, settings and tool. A run of another identity
begins anew. What is done already, a merge tells by the numbers of its steps (`Journal`), and a pack
by the tasks in its pack.json. What moves finished work to its place removes the note
(`output_directories`), and does so for a run that was killed just then (`finish`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personae._version import __version__
from personae.errors import OutputError, PersonaeError
from personae.writers.atomic import begins, output_errors, remove

JOURNAL = ".journal"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity_text(identity: Mapping[str, Any]) -> str:
    """The one line that tells a run from every other: tool, inputs and settings, in order."""
    return json.dumps({"tool_version": __version__, **identity})


def resume(directory: Path, identity: str) -> str | None:
    """Keep what an earlier run of this identity left in its unfinished output, else clear it.

    Returns:
        What its note says below the identity; None if the run begins anew.

    Raises:
        OutputError: if the disk refuses.
    """
    path = directory / JOURNAL
    with output_errors(path):
        if begins(path, f"{identity}\n"):
            return path.read_text("utf-8", "replace").removeprefix(f"{identity}\n")
        _clear(directory)
    return None


def note(directory: Path, *lines: str) -> None:
    """Write the note of a run: its identity, and what else it says.

    Raises:
        OutputError: if the disk refuses.
    """
    path = directory / JOURNAL
    with output_errors(path):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class Journal:
    """The steps of a run that are done.

    Attributes:
        done: Numbers of the steps done by this run and those before it, with what each told.
        directory: Where the run writes; what is in it belongs to the run.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        """Go on with what an earlier run of this identity left, or clear the directory.

        Raises:
            OutputError: if the disk refuses.
        """
        self.directory = directory
        # What was written but not yet on disk is lost with a machine, not with a process: the boot
        # is part of the identity.
        boot = _BOOT.read_text("ascii").strip() if _BOOT.exists() else ""
        steps = resume(directory, f"{identity}\n{boot}") or ""
        whole, _, _ = steps.rpartition("\n")  # a line cut short was never finished
        lines = (line.partition(" ") for line in whole.splitlines())
        self.done = {int(number): told for number, _, told in lines if number.isdecimal()}
        note(directory, identity, boot, *(_line(*step) for step in sorted(self.done.items())))
        with output_errors(directory / JOURNAL):
            self._file = os.open(directory / JOURNAL, os.O_WRONLY | os.O_APPEND)

    def add(self, step: int, told: str = "") -> None:
        """Note a step as done, with a line to remember: all it wrote has been handed over."""
        self.done[step] = told
        with output_errors(self.directory / JOURNAL):
            os.write(self._file, f"{_line(step, told)}\n".encode())

    def __enter__(self) -> "Journal":
        """Begin the run."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Release the note; what renames the complete directory removes it (`output_directory`).

        What a run wrote before it failed stays for the next, unless its inputs are at fault.
        """
        os.close(self._file)
        if isinstance(error, PersonaeError) and not isinstance(error, OutputError):
            _clear(self.directory)


def _line(step: int, told: str) -> str:
    return f"{step} {told}".rstrip()


def _clear(directory: Path) -> None:
    for child in directory.iterdir():
        remove(child)
