"""personae diff: what differs between two models."""

import json as to_json
from typing import Annotated, Any

import typer

from personae.checkpoints.naming import shown
from personae.cli import console, options
from personae.commands import diff as comparison
from personae.commands.diff import SMALL_SIDE, Change, Diff, Ranks

_OF_TABLES = ("--json lists every tensor: leave out {}.", ("limit", "every"))
_ALL = ("--all lists every tensor: leave out {}.", ("limit",))


def diff(
    context: typer.Context,
    a: Annotated[
        str, typer.Argument(help="The old model: a path or hub id, or MODEL+ADAPTER.", metavar="A")
    ],
    b: Annotated[
        str, typer.Argument(help="The new one; or an adapter, taken on top of A.", metavar="B")
    ],
    limit: Annotated[int, typer.Option(min=0, help="Tensors listed, largest change first.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="List every tensor that differs.")] = False,
    rank: Annotated[
        Ranks,
        typer.Option(
            help=f"Matrices of which ranks are computed: small means a side up to {SMALL_SIDE}."
        ),
    ] = "small",
    workers: options.Workers = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Compare two models: which tensors differ, how much, how; exit 0 if equal, 1 if not."""
    options.refuse_unused(context, *([_OF_TABLES] if json else [_ALL] if every else []))
    with options.working(workers, memory) as work:
        found = comparison.diff(a, b, ranks=rank, work=work)
    if json:
        console.facts(found.to_json())
    else:
        _print(found, None if every else limit)
    if not found.equal:
        raise typer.Exit(1)


def _print(found: Diff, limit: int | None) -> None:
    for text in found.notes:
        console.note(text)
    if found.equal:
        console.out.print(f"equal: {found.compared} tensors", markup=False)
        return
    norm = "not finite" if found.norm is None else f"{found.norm:.4g}"
    console.out.print(
        f"{len(found.tensors)} of {found.compared} tensors differ: ‖B − A‖ {norm}, over ‖A‖ "
        f"{_number(found.relative)}, {100 * found.changed:.3g} % of all entries",
        markup=False,
    )
    listed = list(found.tensors.items())[:limit]
    if listed:
        columns = ["tensor", "shape", "‖B − A‖", "over ‖A‖", "entries %", "rank", "effective"]
        console.table("", columns, [_row(name, change) for name, change in listed])
    if len(listed) < len(found.tensors):
        rest = len(found.tensors) - len(listed)
        console.out.print(f"… and {rest} more: --all, --limit N", markup=False)
    _print_lists(found)


def _row(name: str, change: Change) -> list[str]:
    rank, side = "-", min(change.shape) if len(change.shape) == 2 else 0
    if change.rank is not None:
        rank = f"{change.rank}/{side}"
    return [
        name,
        "x".join(map(str, change.shape)) or "scalar",
        "not finite" if change.norm is None else f"{change.norm:.4g}",
        _number(change.relative),
        f"{100 * change.changed:.3g}",
        rank,
        _number(change.effective_rank),
    ]


def _print_lists(found: Diff) -> None:
    """What differs beside values."""
    lines = {
        "only in A": shown(found.only_in_a),
        "only in B": shown(found.only_in_b),
        "other shape": shown([f"{n} {a} → {b}" for n, (a, b) in found.shapes.items()]),
        "other dtype": shown([f"{n} {a} → {b}" for n, (a, b) in found.dtypes.items()]),
    }
    for title, text in lines.items():
        if text:
            console.out.print(f"{title}: {text}", markup=False)
    for key, (one, other) in found.config.items():
        console.out.print(f"config.json: {key}: {_value(one)} → {_value(other)}", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _value(value: Any) -> str:
    return to_json.dumps(value, ensure_ascii=False)
