"""The accuracy–size table: one row a method, one column a task, then what it costs."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from personae.evaluate.records import Record

NARROWEST_TASK = 4
"""Columns of `97.3`, a score in percent."""
NARROWEST_METHOD = 15
"""Columns a long method name is folded to, where the room is needed for tasks."""
COST_WIDTH = 5
COSTS = ("avg", "ADR\n%", "AMR %\ncount", "AMR %\ndisk")
EXPLANATION = (
    "Scores and their average in %. ADR: drop of the average against the individual models. "
    "AMR: additional memory per task, as the papers count it and as bytes on disk, "
    "over the shared model."
)


def accuracy_size_table(records: Sequence[Record], width: int) -> RenderableType:
    """Lay out the records for a terminal of `width` columns.

    Task names are folded at their underscores and, where they have to be, cut; the full names
    then follow below. Tasks that do not fit side by side are continued in further tables.

    Args:
        records: One row each, at least one; all cover the same tasks.
        width: Columns of the terminal, at least 60.

    Returns:
        Something rich can print.
    """
    tasks = list(records[0].scores)
    longest_method = max(len(one.method) for one in records)
    costs_width = len(COSTS) * (COST_WIDTH + 1)
    widths = [_natural_width(task) for task in tasks]
    method_width = longest_method
    if method_width + sum(widths) + len(widths) + costs_width > width:
        method_width = min(longest_method, NARROWEST_METHOD)
    room = width - method_width - costs_width
    blocks = _blocks(tasks, max(1, room // (NARROWEST_TASK + 1)))
    cap = max(max(widths), NARROWEST_TASK)
    while cap > NARROWEST_TASK and any(
        sum(min(_natural_width(task), cap) + 1 for task in block) > room for block in blocks
    ):
        cap -= 1
    tables = [
        _table(records, block, method_width, cap, with_costs=block is blocks[-1])
        for block in blocks
    ]
    cut = max(widths) > cap
    names = [Text(f"Tasks: {', '.join(tasks)}.", style="dim")] if cut else []
    return Group(*tables, *names, Text(EXPLANATION, style="dim"))


def markdown(records: Sequence[Record]) -> str:
    """Return the same table in Markdown, with full names, ending in a newline."""
    tasks = list(records[0].scores)
    header = ["method", *tasks, "average", "ADR %", "AMR % paper", "AMR % on disk"]
    rows = [
        [one.method, *(_score(one.scores[task]) for task in tasks), *_costs(one)] for one in records
    ]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def _table(
    records: Sequence[Record],
    tasks: Sequence[str],
    method_width: int,
    cap: int,
    *,
    with_costs: bool,
) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column("method", width=method_width, overflow="fold", vertical="bottom")
    for task in tasks:
        pieces = "\n".join(piece[:cap] for piece in task.split("_"))
        table.add_column(pieces, width=min(_natural_width(task), cap), justify="right")
    for cost in COSTS if with_costs else ():
        table.add_column(cost, width=COST_WIDTH, justify="right")
    for one in records:
        costs = _costs(one) if with_costs else []
        table.add_row(one.method, *(_score(one.scores[task]) for task in tasks), *costs)
    return table


def _natural_width(task: str) -> int:
    return max(NARROWEST_TASK, *(len(piece) for piece in task.split("_")))


def _blocks(tasks: Sequence[str], size: int) -> list[Sequence[str]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def _score(fraction: float) -> str:
    """Percent with one decimal, without it where it would not fit: 97.3, 100, -12."""
    percent = f"{100 * fraction:.1f}"
    return percent if len(percent) <= NARROWEST_TASK else f"{100 * fraction:.0f}"


def _costs(one: Record) -> list[str]:
    """Average, ADR and both AMR, in percent."""
    return [f"{100 * one.average:.2f}", *map(_rate, (one.adr, one.amr_paper, one.amr_on_disk))]


def _rate(percent: float) -> str:
    # Rounded first, and 0 added: nobody loses -0.00 %.
    return f"{round(percent, 2) + 0.0:.2f}" if abs(percent) < 99.995 else f"{percent:.0f}"
