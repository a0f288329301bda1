"""Hold tasks out of a trained family and score what every method offers them.

`python benchmarks/families/unseen_family.py text|vision --hold-out a,b`, once it is trained.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from common import DATA, RUNS, say
from pack_family import read_tasks
from rich.console import Console

from personae import Work, text_encoder
from personae.evaluate import Record
from personae.evaluate.unseen import Unseen, compare_unseen, packed_rows, static_rows
from personae.report.table import accuracy_size_table, markdown

HOLD_OUT = {"text": "banking77,sst2", "vision": "kmnist,sign_digits"}


def main(
    family: str,
    hold_out: str = "",
    encoder: str = "minilm",
    gamma: str = "ratio",
    temperature: float | None = None,
    threads: int = 1,
    data: Path = DATA,
    runs: Path = RUNS,
    out: Path = RUNS,
) -> None:
    """Print the table, and write it to `OUT/FAMILY-unseen.{json,md}`; experts are read in RUNS."""
    if family not in HOLD_OUT:
        raise SystemExit(f"No family '{family}'. Give text or vision.")
    torch.set_num_threads(threads)
    directory = runs / family
    if not (directory / "base").is_dir() or not (tasks := read_tasks(family, directory, data)):
        raise SystemExit(f"No experts in {directory}. Train them first: {family}.py")
    held = (hold_out or HOLD_OUT[family]).split(",")
    say(f"{family}: {len(tasks)} experts, {', '.join(held)} held out")

    def report(one: Record) -> None:
        say(f"{one.method}: average {100 * one.average:.2f} %")

    found = compare_unseen(
        directory / "base",
        {task.name: directory / task.name for task in tasks},
        tasks,
        held,
        text_encoder(encoder),
        out / "unseen" / family,
        statics=static_rows(),
        packs=packed_rows(),
        gamma=gamma,
        temperature=temperature,
        work=Work(workers=threads),
        report=report,
    )
    content = {
        "records": [asdict(one) for one in found.records],
        "weightings": {task: one.to_json() for task, one in found.weightings.items()},
    }
    written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (out / f"{family}-unseen.json").write_text(written, "utf-8")
    (out / f"{family}-unseen.md").write_text(
        markdown(found.records) + "\n" + weights_table(found), "utf-8"
    )
    console = Console()
    console.print(accuracy_size_table(found.records, console.width))
    console.print(weights_table(found), markup=False)


def weights_table(found: Unseen) -> str:
    """Weights in Markdown, the cosine behind each in brackets: a row a held-out task."""
    seen = list(next(iter(found.weightings.values())).weights)
    rows = [["weights of", *seen], ["---", *["---:"] * len(seen)]]
    for task, one in found.weightings.items():
        cosines = one.cosines or {}
        rows.append([task, *(f"{one.weights[n]:.3f} ({cosines[n]:.2f})" for n in seen)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    typer.run(main)
