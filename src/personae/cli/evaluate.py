"""personae eval: every method of a suite on every task, in one table."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.errors import RecipeError
from personae.writers import require_folder


def evaluate(
    suite: Annotated[Path, typer.Argument(help="A suite (YAML): family, tasks, methods.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory for results.json, results.csv, results.md and report.html.",
        ),
    ] = None,
    cache: options.AnswerCache = None,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Score merges, packs and individual models on your tasks: accuracy, size, time, memory.

    An interrupted run goes on where it stopped.
    """
    require_extra("eval")
    from personae.evaluate.suite_records import evaluate_suite
    from personae.report.files import write_results
    from personae.report.plots import check
    from personae.report.table import accuracy_size_table

    if out is not None:
        require_folder(out / "results.json")
        check(out / "plot.svg")
    with options.working(workers, memory, device) as work:
        records = evaluate_suite(
            suite,
            cache=cache,
            work=work,
            report=lambda one: console.note(f"{one.method}: average {100 * one.average:.2f} %"),
        )
    if out is not None:
        write_results(records, out, suite.stem)
    if json:
        console.facts([asdict(one) for one in records])
    else:
        console.out.print(accuracy_size_table(records, max(60, console.out.width)))
    if out is not None:
        console.note(f"results.json, results.csv, results.md and report.html are in {out}")


def require_extra(command: str) -> None:
    """Refuse a command that scores models where what it needs is not installed.

    Raises:
        RecipeError: naming what is missing, and how to install it.
    """
    try:
        import scipy  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import sklearn  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise RecipeError(f"{command} needs {error.name}: pip install 'personae[eval]'.") from error
