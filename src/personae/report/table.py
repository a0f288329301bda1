"""The accuracy–size table: one row a method, one column a task, then what it costs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from personae.evaluate.records import Record

NARROWEST_TASK = 4
"""Columns of `97.3`, a score in percent."""
NARROWEST_METHOD = 15
"""Columns a long method name is folded to, where the room is needed for tasks."""
EXPLANATION = (
    "Scores and their average in %. ADR: drop of the average against the individual models. "
    "AMR: additional memory per task, as the papers count it and as bytes on disk, "
    "over the shared model."
)
EXPLANATION_OF_MEASURES = (
    " Interval: where the average lies with 95 % certainty, by drawing the examples anew. Time and "
    "memory are what making it took; /n where n methods were made at once."
)


class Cost(NamedTuple):
    """A column beside the tasks.

    Attributes:
        title: On a terminal.
        name: In full.
        width: On a terminal; 0 for what is said below the table there.
        cell: What a record has in it.
        always: Whether it is there for records that know nothing of it, too.
    """

    title: str
    name: str
    width: int
    cell: Callable[[Record], str]
    always: bool = True


def costs_of(records: Sequence[Record]) -> list[Cost]:
    """The columns beside the tasks: all that some record knows something of."""
    return [one for one in _COSTS if one.always or any(map(one.cell, records))]


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
    costs = [cost for cost in costs_of(records) if cost.width]
    costs_width = sum(cost.width + 1 for cost in costs)
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
        _table(records, block, method_width, cap, costs if block is blocks[-1] else [])
        for block in blocks
    ]
    cut = max(widths) > cap
    names = [Text(f"Tasks: {', '.join(tasks)}.", style="dim")] if cut else []
    seen = [Text(f"{one.method} sees {one.data}.", style="dim") for one in records if one.data]
    return Group(*tables, *names, *seen, Text(explanation_of(records), style="dim"))


def explanation_of(records: Sequence[Record]) -> str:
    """What the columns beside the tasks mean."""
    measured = len(costs_of(records)) > len([one for one in _COSTS if one.always])
    return EXPLANATION + (EXPLANATION_OF_MEASURES if measured else "")


def markdown(records: Sequence[Record]) -> str:
    """Return the same table in Markdown, with full names, ending in a newline."""
    header, *rows = cells_of(records)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, rule, *rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


def cells_of(records: Sequence[Record]) -> list[list[str]]:
    """The table as text: its header, and a row a record."""
    tasks, costs = list(records[0].scores), costs_of(records)
    rows = [
        [
            one.method,
            *(_score(one.scores[task]) for task in tasks),
            *(cost.cell(one) for cost in costs),
        ]
        for one in records
    ]
    return [["method", *tasks, *(cost.name for cost in costs)], *rows]


def _table(
    records: Sequence[Record],
    tasks: Sequence[str],
    method_width: int,
    cap: int,
    costs: Sequence[Cost],
) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column("method", width=method_width, overflow="fold", vertical="bottom")
    for task in tasks:
        pieces = "\n".join(piece[:cap] for piece in task.split("_"))
        table.add_column(pieces, width=min(_natural_width(task), cap), justify="right")
    for cost in costs:
        table.add_column(cost.title, width=cost.width, justify="right")
    for one in records:
        scores = (_score(one.scores[task]) for task in tasks)
        table.add_row(one.method, *scores, *(cost.cell(one) for cost in costs))
    return table


def _natural_width(task: str) -> int:
    return max(NARROWEST_TASK, *(len(piece) for piece in task.split("_")))


def _blocks(tasks: Sequence[str], size: int) -> list[Sequence[str]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def _score(fraction: float) -> str:
    """Percent with one decimal, without it where it would not fit: 97.3, 100, -12."""
    percent = f"{100 * fraction:.1f}"
    return percent if len(percent) <= NARROWEST_TASK else f"{100 * fraction:.0f}"


def _rate(percent: float) -> str:
    # Rounded first, and 0 added: nobody loses -0.00 %.
    return f"{round(percent, 2) + 0.0:.2f}" if abs(percent) < 99.995 else f"{percent:.0f}"


def _interval(one: Record) -> str:
    return "" if one.interval is None else "–".join(f"{100 * end:.1f}" for end in one.interval)


def _time(one: Record) -> str:
    if one.seconds is None:
        return ""
    seconds = f"{one.seconds:.1f}" if one.seconds < 1000 else f"{one.seconds:.0f}"
    return f"{seconds}/{one.made_with}" if one.made_with > 1 else seconds


def _memory(one: Record) -> str:
    return "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.0f}"


_COSTS = (
    Cost("avg", "average", 5, lambda one: f"{100 * one.average:.2f}"),
    Cost("ADR\n%", "ADR %", 5, lambda one: _rate(one.adr)),
    Cost("AMR %\ncount", "AMR % paper", 5, lambda one: _rate(one.amr_paper)),
    Cost("AMR %\ndisk", "AMR % on disk", 5, lambda one: _rate(one.amr_on_disk)),
    Cost("interval", "95 % interval", 9, _interval, always=False),
    Cost("time\ns", "seconds", 6, _time, always=False),
    Cost("mem\nMB", "peak MB", 5, _memory, always=False),
    Cost("sees", "sees", 0, lambda one: one.data, always=False),
)
