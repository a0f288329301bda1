"""Wall time of several recipes in one file, beside that of the longest of them alone.

`python benchmarks/documents.py` times whole commands on bf16 checkpoints of Qwen2's shapes with
random weights, a base and three experts. Each recipe is timed alone, too, on models in between that
lie on the disk.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

from merging import Taken, make_family, rest, run
from setting import machine, show

SUM = {"merge_method": "task_arithmetic", "base": True, "parameters": {"scale": 0.4}}
TIES = {"merge_method": "ties", "base": True, "parameters": {"density": 0.2}}
LINEAR = {"merge_method": "linear", "base": False, "parameters": {"weight": 1.0}}
CHAINS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "linear, task_arithmetic": [(LINEAR, "a b"), (SUM, "0 c")],
    "task_arithmetic, linear": [(SUM, "a b"), (LINEAR, "0 c")],
    "task_arithmetic, ties": [(SUM, "a b"), (TIES, "0 c")],
    "ties, linear": [(TIES, "a b c"), (LINEAR, "0 a")],
    "ties, task_arithmetic": [(TIES, "a b c"), (SUM, "0 a")],
    "linear, linear, task_arithmetic": [(LINEAR, "a b"), (LINEAR, "b c"), (SUM, "0 1")],
    "linear, task_arithmetic, ties": [(LINEAR, "a b"), (SUM, "0 c"), (TIES, "1 a b")],
}
"""Recipes and their models; a number is what that recipe gives."""


def document(root: Path, method: dict[str, Any], models: str, name: str | None) -> dict[str, Any]:
    """One recipe, whose models in between are named, or lie in the family's folder."""
    places = [
        f"step{model}"
        if model.isdigit() and name != "alone"
        else str(root / f"step{model}")
        if model.isdigit()
        else str(root / model)
        for model in models.split()
    ]
    content: dict[str, Any] = {
        "merge_method": method["merge_method"],
        "conventions": "papers",
        "models": [{"model": place, "parameters": {}} for place in places],
        "parameters": dict(method["parameters"]),
    }
    if method["base"]:
        content["base_model"] = str(root / "base")
    return content if name in (None, "alone") else content | {"name": name}


def timed(root: Path, documents: list[dict[str, Any]], out: Path) -> Taken:
    """What a whole command takes, without the wait for the disk to settle before it."""
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all(documents), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    rest()
    return run([Path(sys.executable).parent / "personae", "merge", recipe, out])


def main(
    size: str = "0.1b",
    turns: int = 3,
    chains: str = ";".join(CHAINS),
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time every chain, in turns with its recipes alone."""
    root = make_family(size)
    rows: list[dict[str, Any]] = []
    for chain in chains.split(";"):
        steps = CHAINS[chain]
        last = len(steps) - 1
        together: list[Taken] = []
        alone: list[list[Taken]] = [[] for _ in steps]
        for _ in range(turns):
            for n, (method, models) in enumerate(steps):
                out = root / ("out" if n == last else f"step{n}")
                alone[n].append(timed(root, [document(root, method, models, "alone")], out))
            documents = [
                document(root, method, models, None if n == last else f"step{n}")
                for n, (method, models) in enumerate(steps)
            ]
            together.append(timed(root, documents, root / "out"))
        for n in range(last):
            shutil.rmtree(root / f"step{n}")
        row: dict[str, Any] = {"chain": chain}
        for what in ("wall", "cpu"):
            whole = median(getattr(taken, what) for taken in together)
            each = [median(getattr(taken, what) for taken in one) for one in alone]
            row |= {f"{what}_s": whole, f"{what}_longest_s": max(each), f"{what}_sum_s": sum(each)}
            row[f"{what}_over_longest"] = whole / max(each)
        row["anonymous_mib"] = max(taken.anonymous_mib for taken in together)
        rows.append(row)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "machine": machine()}, indent=2))
    else:
        show("several recipes in one file", rows)


if __name__ == "__main__":
    typer.run(main)
