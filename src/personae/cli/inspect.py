"""personae inspect: what a checkpoint or pack holds, or how a family's task vectors look."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.checkpoints.naming import shown
from personae.cli import console, options
from personae.commands import inspect as inspection
from personae.commands.analyse import analyse
from personae.errors import RecipeError
from personae.methods.analyses import ANALYSES, headline
from personae.recipe import read_merge_recipe, read_recipe, recipe_kind
from personae.report import plots

_OF_ANALYSES = (
    "Leave out {}, or give --analysis. To list tensors: --tensors.",
    ("tensor", "set_", "plot", "workers", "memory"),
)
_NOT_OF_ANALYSES = (
    "--analysis measures a family: leave out {}. To choose layers: --tensor PATTERN.",
    ("tensors",),
)


def inspect(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(help="A pack, checkpoint directory, file or hub id; a recipe to analyse."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    analysis: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Measure a recipe's family: {', '.join(ANALYSES)}."),
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Linear layers to analyse, by default all; repeatable."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the analysis; repeatable."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the analysis: .png, .svg or .pdf.")
    ] = None,
    workers: options.Workers = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint or pack holds, or analyse the task vectors of a recipe's family."""
    is_recipe = Path(path).suffix in (".yaml", ".yml")
    if is_recipe != (analysis is not None):
        raise RecipeError(
            f"{path} is a recipe: say how to analyse its family with --analysis "
            f"({', '.join(ANALYSES)}), or inspect a checkpoint or pack."
            if is_recipe
            else f"--analysis takes a merge or pack recipe (.yaml), not {path}."
        )
    options.refuse_unused(context, _OF_ANALYSES if analysis is None else _NOT_OF_ANALYSES)
    if analysis is not None:
        _analyse(
            Path(path), analysis, tensor, options.values(set_, "--set"), plot, workers, memory, json
        )
        return
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


def _analyse(
    path: Path,
    analysis: str,
    tensors: list[str] | None,
    parameters: dict[str, Any],
    plot: Path | None,
    workers: int | None,
    memory: str | None,
    json: bool,
) -> None:
    if plot is not None:
        plots.check(plot)
    recipe = read_merge_recipe(path) if recipe_kind(path) == "merge" else read_recipe(path)
    with options.working(workers, memory) as work:
        found = analyse(
            recipe.base,
            recipe.experts,
            analysis,
            tensors=tensors or (),
            parameters=parameters,
            skip=recipe.settings.skip,
            work=work,
        )
    if plot is not None:
        left_out = plots.draw(found, plot)
        console.note(f"drawn: {plot}" + (f"; without {left_out} more" if left_out else ""))
    if json:
        console.facts(found)
    else:
        _print_analysis(found)


def _print_analysis(found: dict[str, Any]) -> None:
    given = ", ".join(f"{key} {value}" for key, value in found["parameters"].items())
    console.out.print(found["summary"], f"{found['analysis']}: {given}", markup=False)
    columns = ANALYSES[found["analysis"]].headlines
    narrow = console.out.width < 120
    names, around = _abridged(list(found["tensors"])) if narrow else (list(found["tensors"]), "")
    if around:
        console.out.print(f"tensors: {around}", markup=False)
    rows = [
        [name, *(f"{headline(findings, column):.4f}" for column in columns)]
        for name, findings in zip(names, found["tensors"].values(), strict=True)
    ]
    headings = [column.replace(".", "\n") if narrow else column for column in columns]
    console.table("", ["tensor", *headings], rows)


def _abridged(names: list[str]) -> tuple[list[str], str]:
    """Names without the parts that all begin and end with; and those parts, around "*"."""
    parts = [name.split(".") for name in names]
    first = _agreeing(parts)
    last = _agreeing([name[first:][::-1] for name in parts])
    if len(names) < 2 or first + last == 0:
        return names, ""
    start, end = parts[0][:first], parts[0][len(parts[0]) - last :]
    kept = [".".join(name[first : len(name) - last]) for name in parts]
    return kept, ".".join([*start, "*", *end])


def _agreeing(rows: Sequence[Sequence[str]]) -> int:
    """How many of their first items all rows have in common."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*rows, strict=False)))


def print_pack(described: dict[str, Any], *, tensors: bool = False, uncoded: bool = True) -> None:
    """Print a pack's tasks as a table; what is not coded, and each task's tensors, if asked."""
    reference = described["reference"]
    made = f"{reference['source']}" if reference["kind"] == "base" else reference["method"]
    console.out.print(
        described["path"],
        f"{described['method']}, {described['vector']} vectors, "
        f"reference: {reference['kind']} ({made})",
        markup=False,
    )
    rows = [
        [
            name,
            console.size(task["bytes"]),
            console.size(task["private_bytes"]),
            console.size(task["auxiliary_bytes"]),
            console.percent(task["amr_percent"]["on_disk_native"]),
            console.percent(task["amr_percent"]["amr_paper"]),
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
        "paper",
        "rank",
        "error",
    ]
    console.table("", columns, rows)
    console.out.print(
        "private: in the file, kept whole; beside: configuration, tokenizer; AMR %: on disk; "
        f"pack.json: {console.size(described['manifest_bytes'])}",
        markup=False,
    )
    shared = described["shared"]
    if shared is not None:
        console.out.print(
            f"all tasks share {console.size(shared['bytes'])} (shared.safetensors); "
            "AMR is with a task's share of it",
            markup=False,
        )
    router = described["router"]
    if router is not None:
        _print_router(router)
    for name, task in described["tasks"].items() if uncoded else ():
        _print_uncoded(name, task["tensors"])
    for name, task in described["tasks"].items() if tensors else ():
        console.out.print()
        console.table(
            name,
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


def _print_router(router: dict[str, Any]) -> None:
    """Say by what tasks are found for samples, and of which tasks that does not know."""
    examples = router["examples"].values()
    console.out.print(
        f"a router ({console.size(router['bytes'])}) tells {len(examples)} tasks apart by "
        f"{sum(examples)} examples: {router['mode']}, {router['neighbours']} neighbours",
        markup=False,
    )
    if router["unrouted"]:
        console.out.print(
            f"it has no example of {', '.join(router['unrouted'])}: fit it again", markup=False
        )


def _print_uncoded(task: str, tensors: dict[str, Any]) -> None:
    """Say which tensors (but scalars) are not coded, and what became of them."""
    meanings = {"exact": "not coded, kept exact", "skipped": "left as in the reference"}
    for treatment, meaning in meanings.items():
        names = [k for k, t in tensors.items() if t["shape"] and t["treatment"] == treatment]
        if names:
            console.out.print(f"{task}: {meaning}: {shown(names)}", markup=False)


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
