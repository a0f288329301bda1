"""Merge a trained family by every static method, each task with its own head; print the table.

`python benchmarks/families/merge_family.py text|vision`, once the family is trained.
"""

from pathlib import Path

import torch
import typer
from common import DATA, RUNS, say
from pack_family import read_tasks
from rich.console import Console

from personae import Work
from personae.evaluate import Record, records_to_json
from personae.evaluate.comparison import compare
from personae.evaluate.rows import static_rows
from personae.report.table import accuracy_size_table, markdown


def main(family: str, threads: int = 1, data: Path = DATA, runs: Path = RUNS) -> None:
    """Print the table, and write it to `runs/families/FAMILY-merged.{json,md}`."""
    torch.set_num_threads(threads)
    directory = runs / family
    if not (directory / "base").is_dir() or not (tasks := read_tasks(family, directory, data)):
        raise SystemExit(f"No experts in {directory}. Train them first: {family}.py")

    def report(one: Record) -> None:
        say(f"{one.method}: average {100 * one.average:.2f} %, ADR {one.adr:.2f} %")

    records = compare(
        directory / "base",
        {task.name: directory / task.name for task in tasks},
        tasks,
        static_rows(),
        work=Work(workers=threads),
        report=report,
    )
    (runs / f"{family}-merged.json").write_text(records_to_json(records), "utf-8")
    (runs / f"{family}-merged.md").write_text(markdown(records), "utf-8")
    console = Console()
    console.print(accuracy_size_table(records, console.width))


if __name__ == "__main__":
    typer.run(main)
