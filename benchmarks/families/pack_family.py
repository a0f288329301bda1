"""Pack a trained family, rebuild every expert from each pack, score it, print the table.

`python benchmarks/families/pack_family.py text|vision`, once the family is trained. `--rows` says
which packs: `dts` (DTS-T and DTS-D at r = 0.3 and under budgets), `methods` (every personalised
method, on task and on difference vectors; TALL-masks also at thresholds chosen on validation
examples) or `sweep` (DTS-T over ranks, ablations and budgets).
"""

from pathlib import Path

import text
import torch
import typer
import vision
from common import DATA, RUNS, say
from rich.console import Console
from transformers import AutoTokenizer

from personae import MergeSettings, Work
from personae.evaluate import Record, Task, choose_thresholds, records_to_json
from personae.evaluate.comparison import compare
from personae.evaluate.rows import Row, demo_rows, method_rows, sweep_rows
from personae.report.table import accuracy_size_table, markdown

ROWS = ("dts", "methods", "sweep")


def read_tasks(family: str, directory: Path, data: Path) -> list[Task]:
    """Read the tasks whose experts are there; of the training examples only one each."""
    if family == "text":
        tokenizer = AutoTokenizer.from_pretrained(directory / "base")
        names = [name for name in text.TASKS if (directory / name).is_dir()]
        return [text.read_task(name, tokenizer, data, limit=1) for name in names]
    names = [name for name in vision.TASKS if (directory / name).is_dir()]
    return [vision.read_task(name, data, limit=1) for name in names]


def main(
    family: str, rows: str = "dts", threads: int = 1, data: Path = DATA, runs: Path = RUNS
) -> None:
    """Print the table, and write it to `runs/families/FAMILY-results.{json,md}`.

    Rows other than those of DTS go to `FAMILY-ROWS-results.{json,md}`.
    """
    if rows not in ROWS:
        raise SystemExit(f"No rows '{rows}'. Give {', '.join(ROWS)}.")
    if family not in ("text", "vision"):
        raise SystemExit(f"No family '{family}'. Give text or vision.")
    torch.set_num_threads(threads)
    directory = runs / family
    if not (directory / "base").is_dir() or not (tasks := read_tasks(family, directory, data)):
        raise SystemExit(f"No experts in {directory}. Train them first: {family}.py")
    say(f"{family}: {len(tasks)} experts")

    def report(one: Record) -> None:
        say(f"{one.method}: average {100 * one.average:.2f} %, ADR {one.adr:.2f} %")

    base, experts = directory / "base", {task.name: directory / task.name for task in tasks}
    packed = demo_rows() if rows == "dts" else sweep_rows()
    if rows == "methods":
        chosen = choose_thresholds(base, experts, tasks, work=Work(workers=threads))
        say(f"thresholds of TALL-masks: {chosen}")
        packed = method_rows(chosen)
    compared: dict[str, Row] = {"individual": "individual", "weight averaging": MergeSettings()}
    records = compare(
        base,
        experts,
        tasks,
        compared | packed,
        keep=runs / "packs" / family,
        work=Work(workers=threads),
        report=report,
    )
    name = family if rows == "dts" else f"{family}-{rows}"
    (runs / f"{name}-results.json").write_text(records_to_json(records), "utf-8")
    (runs / f"{name}-results.md").write_text(markdown(records), "utf-8")
    console = Console()
    console.print(accuracy_size_table(records, console.width))


if __name__ == "__main__":
    typer.run(main)
