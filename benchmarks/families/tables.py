"""Put what was measured into the tables of `docs/results.md`.

`python benchmarks/families/tables.py`, once the scripts beside it have run. A table lies between
`<!-- table: NAME -->` and `<!-- end -->`; NAME is that of the file in `runs/families` without its
ending. One that was not measured stays as it is. What is said about them is written by hand.
"""

import re
from pathlib import Path

import typer
from common import REPOSITORY, RUNS, say

from personae.evaluate import Record
from personae.evaluate.records import records_from_json
from personae.report.table import markdown

RESULTS = REPOSITORY / "docs" / "results.md"
SWEEP = "sweep"
"""Averages and sizes of both families side by side."""
FAMILIES = ("text", "vision")


def table(name: str, runs: Path) -> str | None:
    """The Markdown of one table; None if it was not measured."""
    if name == SWEEP:
        return _sweep([runs / f"{family}-sweep-results.json" for family in FAMILIES])
    if name.endswith("-unseen"):
        written = runs / f"{name}.md"  # with its weights
        return written.read_text("utf-8") if written.is_file() else None
    measured = runs / f"{name}.json"
    if not measured.is_file():
        return None
    written = markdown(records_from_json(measured.read_text("utf-8")))
    return _without_sizes(written) if name.endswith("-merged") else written


def _sweep(files: list[Path]) -> str | None:
    if not all(file.is_file() for file in files):
        return None
    found = [records_from_json(file.read_text("utf-8")) for file in files]
    cells = ("average", "ADR %", "AMR % paper", "on disk")
    header = [""] + [f"{f}: {c}" if c == cells[0] else c for f in FAMILIES for c in cells]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    rows += [[one.method, *_facts(one), *_facts(other)] for one, other in zip(*found, strict=True)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _facts(one: Record) -> list[str]:
    """Average, ADR and both AMR, as the other tables show them."""
    return [cell.strip() for cell in markdown([one]).splitlines()[-1].split("|")[-5:-1]]


def _without_sizes(written: str) -> str:
    """A merged model has no size of its own."""
    return "".join(f"{line.rsplit('|', 3)[0]}|\n" for line in written.splitlines())


def main(runs: Path = RUNS, results: Path = RESULTS) -> None:
    """Rewrite `docs/results.md`."""

    def filled(match: re.Match[str]) -> str:
        made = table(match[2], runs)
        say(f"{match[2]}: {'not measured, left' if made is None else 'written'}")
        return match[0] if made is None else f"{match[1]}\n{made}\n<!-- end -->"

    page = results.read_text("utf-8")
    pattern = r"(<!-- table: ([\w-]+) -->\n).*?<!-- end -->"
    results.write_text(re.sub(pattern, filled, page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    typer.run(main)
