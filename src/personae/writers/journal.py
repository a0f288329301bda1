"""Which steps of a run are done: kept in its unfinished output, so that a killed run goes on.

Steps are numbered by what is to be done, so the note also says what the numbers mean: the
*identity* of inputs, settings and tool. Another identity begins anew.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personae._version import __version__
from personae.errors import OutputError, PersonaeError
from personae.writers.atomic import output_errors

JOURNAL = ".journal"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity_text(identity: Mapping[str, Any]) -> str:
    """The one line that tells a run from every other: tool, inputs and settings, in order."""
    return json.dumps({"tool_version": __version__, **identity})


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
        self.done: dict[int, str] = {}
        path = directory / JOURNAL
        # What was written but not yet on disk is lost with a machine, not with a process.
        boot = _BOOT.read_text("ascii").strip() if _BOOT.exists() else ""
        found, _, rest = _read(path).partition("\n")
        booted, _, steps = rest.partition("\n")
        with output_errors(path):
            if (found, booted) == (identity, boot):
                whole, _, _ = steps.rpartition("\n")  # a line cut short was never finished
                steps = (line.partition(" ") for line in whole.splitlines())
                self.done = {int(number): told for number, _, told in steps}
            else:
                _clear(directory)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            lines = [identity, boot, *(_line(*step) for step in sorted(self.done.items()))]
            os.write(self._file, ("\n".join(lines) + "\n").encode())

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


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _clear(directory: Path) -> None:
    for child in directory.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
