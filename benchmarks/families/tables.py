"""Put what was measured into the tables of `docs/results.md`.

`python benchmarks/families/tables.py`, once the scripts beside it and the suites have run
(`personae eval suites/FAMILY.yaml --out runs/suites/FAMILY`). A table lies between
`<!-- table: NAME -->` and `<!-- end -->`; NAME is that of the file in `runs/families` without its
ending, or FAMILY-merged, -papers or -tuned, which are rows of a suite. One that was not measured
stays as it is. What is said about them is written by hand.
"""

import re
from pathlib import Path

import typer
from common import REPOSITORY, RUNS, say

from personae.evaluate import Record
from personae.evaluate.records import records_from_json
from personae.evaluate.rows import static_rows
from personae.report.table import markdown

RESULTS = REPOSITORY / "docs" / "results.md"
SWEEP = "sweep"
"""Averages and sizes of both families side by side."""
FAMILIES = ("text", "vision")
SUITES = REPOSITORY / "runs" / "suites"
PAPERS = (
    "individual",
    "pre-trained",
    "weight averaging",
    "task arithmetic 0.3",
    "task arithmetic 0.4",
    "TIES",
    "DARE-TIES",
    "TSV-M",
    "DRM-H",
    "DRM-V",
    "Fisher",
    "RegMean",
    "RegMean++",
    "AdaMerging task-wise",
    "AdaMerging layer-wise",
    "AdaMerging++",
    "WEMoE",
    "Twin-Merging",
    "Auto-Switch",
    "SVD",
    "EMR",
    "TALL-Mask",
    "T-Switch",
    "DTS-T r=0.3",
    "DTS-T 1%",
    "DTS-D r=0.3",
    "DTS-D 1%",
)
"""The methods of both papers' tables, and those that came to be compared with them."""


def table(name: str, runs: Path) -> str | None:
    """The Markdown of one table; None if it was not measured."""
    if name == SWEEP:
        return _sweep([runs / f"{family}-sweep-results.json" for family in FAMILIES])
    if name.endswith("-unseen"):
        written = runs / f"{name}.md"  # with its weights
        return written.read_text("utf-8") if written.is_file() else None
    family, _, kind = name.partition("-")
    if kind in ("merged", "papers", "tuned"):
        return _of_suite(SUITES / family / "results.json", kind)
    measured = runs / f"{name}.json"
    if not measured.is_file():
        return None
    return markdown(records_from_json(measured.read_text("utf-8")))


def _of_suite(measured: Path, kind: str) -> str | None:
    """Some rows of a suite; None if they were not all measured."""
    if not measured.is_file():
        return None
    found = {one.method: one for one in records_from_json(measured.read_text("utf-8"))}
    tuned = ["individual", *(name for name in found if name.endswith(" tuned"))]
    wanted = {"merged": [*static_rows()], "papers": PAPERS, "tuned": tuned}[kind]
    if not {*wanted} <= {*found}:
        return None
    written = markdown([found[name] for name in wanted])
    return _without_sizes(written) if kind == "merged" else written


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
