"""What a person sees: progress on a terminal, plain lines elsewhere, tables, sizes."""

import json
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from personae.errors import OutputError
from personae.run.work import Progress as Report

_SHOWN = "\t\u200c\u200d"
"""Not printable by themselves, and yet a part of texts: the joiners of many scripts."""


def plain(text: str) -> str:
    """One line without what a terminal obeys: names come from files that anybody may have written.

    Texts of several lines are shown line by line, so that no name can add one.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in _SHOWN
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message, *traceback = super().format(record).partition("\nTraceback ")
        lines = "".join(traceback).split("\n")
        return plain(message) + "\n".join(map(plain, lines))


def show_warnings_plainly() -> None:
    """Make what is logged harmless too: it names tensors and files."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Plain())


def drop_output() -> None:
    """Let what is left for standard output go nowhere: it failed, and that is told."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _report() -> Generator[None]:
    """Say of a report that cannot be written that it is the report alone.

    Raises:
        BrokenPipeError: if its reader has left, as it is.
        OutputError: whatever else the system refuses.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise OutputError(
            f"The report cannot be written: {error.strerror}. The files that the command writes "
            "are complete."
        ) from error


class _Console(Console):
    """One that shows texts as they are, and lets the command say what a reader that left means."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, with texts made harmless; each is a line of its own."""
        with _report():
            shown = (plain(o) if isinstance(o, str) else o for o in objects)
            super().print(*shown, sep="\n", **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raise, where rich would leave with the code of a failed check."""
        raise BrokenPipeError


# Away from a terminal there is no width to fit: a name is never folded in a pipe.
out = _Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = _Console(stderr=True, highlight=False)


@contextmanager
def progress() -> Generator[Report]:
    """Yield a report function: a bar on a terminal, a line at the end of each stage elsewhere."""
    if not err.is_terminal:
        yield _line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        rows: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(plain(stage), total=total)
            bars.update(rows[stage], completed=done)

        yield report


def _line(stage: str, done: int, total: int) -> None:
    if done == total:
        sys.stderr.write(f"{plain(stage)}: {total} done\n")


def note(text: str) -> None:
    """Tell the person something beside the result."""
    terminal = err.is_terminal
    err.print(text, style="dim" if terminal else None, markup=False, soft_wrap=not terminal)


def facts(values: Any) -> None:
    """Print plain values as JSON on standard output."""
    with _report():
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
        sys.stdout.flush()


def table(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1) -> None:
    """Print a table: the first `left` columns to the left, numbers to the right."""
    grid = _grid(title, columns, rows, left, whole_numbers=True)
    if out.measure(grid).minimum > out.width:
        grid = _grid(title, columns, rows, left, whole_numbers=False)
    out.print(grid)


def _grid(
    title: str, columns: list[str], rows: list[list[str]], left: int, whole_numbers: bool
) -> Table:
    """A table whose numbers are on one line each, or folded like all else."""
    grid = Table(
        title=Text(plain(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for place, column in enumerate(columns):
        is_number = place >= left
        grid.add_column(
            column,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number and whole_numbers,
        )
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    return grid


def size(count: int) -> str:
    """Bytes as a person reads them."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["KB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


def percent(value: float) -> str:
    """A percentage with three digits after the point, as the papers' tables need."""
    return f"{value:.3f}"
