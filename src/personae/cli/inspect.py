"""personae inspect: what a checkpoint or pack holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.errors import RecipeError
from personae.execute import inspect as inspection


def inspect(
    path: Annotated[str, typer.Argument(help="A pack, checkpoint directory, file or hub id.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint or pack holds, from headers: sizes, ranks, errors."""
    swept = sorted(found.parent for found in Path(path).glob("*/pack.json"))
    if swept and not (Path(path) / "pack.json").exists():  # what a sweep of ranks has left
        raise RecipeError(
            f"{path} holds {len(swept)} packs; inspect one of them: {', '.join(map(str, swept))}."
        )
    described = inspection.inspect(path)
    if json:
        console.facts(described)
    elif described["kind"] == "pack":
        print_pack(described, tensors=tensors)
    else:
        _print_checkpoint(described, tensors=tensors)


def print_pack(described: dict[str, Any], *, tensors: bool = False) -> None:
    """Print a pack's tasks as a table, and each task's tensors if asked."""
    reference = described["reference"]
    made = f"{reference['source']}" if reference["kind"] == "base" else reference["method"]
    console.out.print(
        f"{described['path']}\n{described['method']}, {described['vector']} vectors, "
        f"reference: {reference['kind']} ({made})",
        markup=False,
    )
    rows = [
        [
            name,
            console.size(task["bytes"]),
            console.size(task["private_bytes"]),
            console.size(task["companion_bytes"]),
            console.percent(task["amr_percent"]["on_disk_native"]),
            console.percent(task["amr_percent"]["counted"]),
            "-" if task["rank_fraction"] is None else f"{task['rank_fraction']:.3f}",
            f"{task['relative_error']:.4f}",
        ]
        for name, task in described["tasks"].items()
    ]
    columns = [
        "task",
        "file",
        "private",
        "beside",
        "AMR %",
        "counted",
        "rank",
        "error",
    ]
    console.table("", columns, rows)
    console.out.print(
        "private: in the file, kept whole; beside: configuration, tokenizer; AMR %: on disk; "
        f"pack.json: {console.size(described['manifest_bytes'])}",
        markup=False,
    )
    for name, task in described["tasks"].items() if tensors else ():
        console.table(
            f"\n{name}",
            ["tensor", "shape", "rank", "bytes", "error"],
            [
                [
                    key,
                    "x".join(str(n) for n in t["shape"]) or "scalar",
                    "-" if t["rank"] is None else str(t["rank"]),
                    f"{t['bytes']:,}",
                    f"{t['relative_error']:.4f}",
                ]
                for key, t in task["tensors"].items()
            ],
        )


def _print_checkpoint(described: dict[str, Any], *, tensors: bool) -> None:
    console.out.print(
        f"{described['source']}: {described['parameters']:,} parameters, "
        f"{console.size(described['bytes'])}, {len(described['tensors'])} tensors",
        markup=False,
    )
    if tensors:
        console.table(
            "",
            ["tensor", "shape", "dtype", "bytes"],
            [
                [key, "x".join(str(n) for n in t["shape"]), t["dtype"], f"{t['bytes']:,}"]
                for key, t in described["tensors"].items()
            ],
        )
