"""personae demo: train a small family on real digits, pack it, rebuild it, show what was lost."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.errors import RecipeError
from personae.writers import atomic_file


def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Directory for checkpoints (kept and reused), packs and results.json.",
        ),
    ] = Path("personae-demo"),
    workers: options.Workers = None,
    json: options.Json = False,
) -> None:
    """Train five experts on scikit-learn's digit images, pack them and compare; two minutes."""
    try:
        import sklearn  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise RecipeError(f"The demo needs {error.name}: pip install 'personae[demo]'.") from error
    from personae.demo import run_demo
    from personae.evaluate import records_to_json
    from personae.report.table import accuracy_size_table

    with options.working(workers, None) as work:
        records = run_demo(out, console.note, work)
    with atomic_file(out / "results.json") as partial:
        partial.write_text(records_to_json(records), encoding="utf-8")
    if json:
        console.facts([asdict(one) for one in records])
        return
    console.out.print(accuracy_size_table(records, max(60, console.out.width)))
    console.note(f"Checkpoints, packs and results.json are in {out}")
