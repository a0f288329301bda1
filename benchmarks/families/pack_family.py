"""Pack a trained family by DTS-T and DTS-D, rebuild every expert, score it, print the table.

python benchmarks/families/pack_family.py text|vision
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

import text
import torch
import typer
import vision
from common import DATA, RUNS, say
from rich.console import Console
from transformers import AutoTokenizer

from personae import PackSettings, Work, inspect, pack_many, unpack
from personae.evaluate import (
    Record,
    Task,
    evaluate_averaged,
    evaluate_checkpoint,
    record,
    records_to_json,
)
from personae.report.table import accuracy_size_table, markdown

RANK_FRACTION = 0.3
BUDGETS = ("5%", "2%", "1%")


def read_tasks(family: str, directory: Path, data: Path) -> list[Task]:
    """Read the tasks whose experts are there; of the training examples only one each."""
    if family == "text":
        tokenizer = AutoTokenizer.from_pretrained(directory / "base")
        names = [name for name in text.TASKS if (directory / name).is_dir()]
        return [text.read_task(name, tokenizer, data, limit=1) for name in names]
    names = [name for name in vision.TASKS if (directory / name).is_dir()]
    return [vision.read_task(name, data, limit=1) for name in names]


def settings_of(vector: Literal["task", "difference"]) -> dict[str, PackSettings]:
    """The packs made of one kind of delta: the papers' rank, and each budget on disk."""
    codec = "DTS-T" if vector == "task" else "DTS-D"
    settings = {
        f"{codec} r={RANK_FRACTION}": PackSettings(
            vector=vector, parameters={"rank_fraction": RANK_FRACTION}
        )
    }
    for budget in BUDGETS:
        settings[f"{codec} {budget}"] = PackSettings(vector=vector, budget=budget)
    return settings


def scores_of_pack(pack: str | Path, base: Path, tasks: Sequence[Task]) -> dict[str, float]:
    """Rebuild each expert into a temporary directory and score it."""
    scores: dict[str, float] = {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            rebuilt = Path(folder) / task.name
            unpack(pack, task.name, rebuilt, base=base)
            scores[task.name] = evaluate_checkpoint(rebuilt, task)
    return scores


def packed(
    base: Path, experts: Mapping[str, Path], tasks: Sequence[Task], out: Path, work: Work
) -> Iterator[tuple[str, dict[str, float], float, float]]:
    """Pack, rebuild and score; yields method, scores and the mean of both AMR over the tasks."""
    for vector in ("task", "difference"):
        settings = settings_of(vector)
        outs: dict[str | Path, PackSettings] = {
            out / name.replace(" ", "-").replace("%", ""): settings[name] for name in settings
        }
        pack_many(base, experts, outs, overwrite=True, work=work)
        for name, pack in zip(settings, outs, strict=True):
            amr = [facts["amr_percent"] for facts in inspect(pack)["tasks"].values()]
            yield (
                name,
                scores_of_pack(pack, base, tasks),
                fmean(one["counted"] for one in amr),
                fmean(one["on_disk_native"] for one in amr),
            )


def main(
    family: str,
    threads: int = 1,
    data: Path = DATA,
    runs: Path = RUNS,
) -> None:
    """Print the table and write it to `runs/families/FAMILY-results.{json,md}`."""
    torch.set_num_threads(threads)
    directory = runs / family
    tasks = read_tasks(family, directory, data)
    if not tasks:
        raise SystemExit(f"No experts in {directory}. Train them first: {family}.py")
    experts = {task.name: directory / task.name for task in tasks}
    say(f"{family}: {len(tasks)} experts")
    individual = {t.name: evaluate_checkpoint(experts[t.name], t) for t in tasks}
    averaged = evaluate_averaged(experts, tasks)
    records: list[Record] = []

    def add(method: str, scores: dict[str, float], counted: float, on_disk: float) -> None:
        one = record(
            method, scores, individual=individual, amr_counted=counted, amr_on_disk=on_disk
        )
        say(f"{method}: average {100 * one.average:.2f} %, ADR {one.adr:.2f} %")
        records.append(one)

    add("individual", individual, 100.0, 100.0)
    add("weight averaging", averaged, 0.0, 0.0)
    work = Work(workers=threads)
    for line in packed(directory / "base", experts, tasks, runs / "packs" / family, work):
        add(*line)
    (runs / f"{family}-results.json").write_text(records_to_json(records), "utf-8")
    (runs / f"{family}-results.md").write_text(markdown(records), "utf-8")
    console = Console()
    console.print(accuracy_size_table(records, console.width))


if __name__ == "__main__":
    typer.run(main)
