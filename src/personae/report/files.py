"""What an evaluation leaves: results as JSON, CSV and Markdown, and a page to read."""

import csv
import html
from collections.abc import Sequence
from pathlib import Path

from personae.evaluate.records import Record, records_to_json
from personae.report.accuracy_plot import accuracy_over_size
from personae.report.table import cells_of, explanation_of, markdown
from personae.writers import atomic_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td.best { font-weight: 600; }
svg { height: auto; max-width: 100%; }
p { color: #555; }
"""


def write_results(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Write results.json, results.csv, results.md and report.html.

    Args:
        records: At least one; all cover the same tasks.
        folder: Made if it is not there; files of these names are replaced.
        title: Of the page.

    Returns:
        The files.

    Raises:
        OutputError: if they cannot be written.
        RecipeError: if matplotlib is not installed.
    """
    texts = {
        "results.json": records_to_json(records),
        "results.md": markdown(records),
        "report.html": page(records, title),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with atomic_file(folder / name) as partial:
            partial.write_text(text, "utf-8")
    with (
        atomic_file(folder / "results.csv") as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file).writerows(_plain_rows(records))
    return [folder / name for name in (*texts, "results.csv")]


def _plain_rows(records: Sequence[Record]) -> list[list[object]]:
    """The numbers as they are: fractions, percent, seconds, bytes."""
    tasks = list(records[0].scores)
    facts = ("average", "adr", "amr_paper", "amr_on_disk", "seconds", "peak_bytes", "made_with")
    header: list[object] = ["method", *tasks, *facts, "interval_low", "interval_high", "data"]
    rows: list[list[object]] = [
        [
            one.method,
            *(one.scores[task] for task in tasks),
            *(getattr(one, fact) for fact in facts),
            *(one.interval or (None, None)),
            one.data,
        ]
        for one in records
    ]
    return [header, *rows]


def page(records: Sequence[Record], title: str) -> str:
    """One HTML page that needs nothing else: the plot of accuracy over size, and the table."""
    header, *rows = [[html.escape(cell) for cell in cells] for cells in cells_of(records)]
    tasks = list(records[0].scores)
    best = {task: max(one.scores[task] for one in records) for task in tasks}
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{cell}</td>'
            if 0 < n <= len(tasks) and one.scores[tasks[n - 1]] == best[tasks[n - 1]]
            else f"<td>{cell}</td>"
            for n, cell in enumerate(cells)
        )
        + "</tr>\n"
        for one, cells in zip(records, rows, strict=True)
    )
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<figure>\n{accuracy_over_size(records)}</figure>\n"
        f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n'
        f"</table>\n</div>\n<p>{html.escape(explanation_of(records))}</p>\n</body>\n</html>\n"
    )
