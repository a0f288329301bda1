"""personae tune: the parameters of a method, by search on validation splits."""

from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.cli.evaluate import require_extra

_SHOWN = 10


def tune(
    suite: Annotated[Path, typer.Argument(help="A suite (YAML) that says what to search.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Recipe (YAML) with the best parameters."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="How many.", show_default="30, of a grid all"),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of tpe and random.")] = 0,
    overwrite: options.Overwrite = False,
    cache: options.AnswerCache = None,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Search a method's parameters on validation splits, and write the best ones as a recipe.

    An interrupted search goes on where it stopped.
    """
    require_extra("tune")
    from personae.evaluate.tuning import named, tune_suite

    with options.working(workers, memory, device) as work:
        tuned = tune_suite(
            suite,
            out,
            trials=trials,
            sampler=sampler,
            seed=seed,
            overwrite=overwrite,
            cache=cache,
            work=work,
            report=lambda one: console.note(f"{named(one.parameters)}: {100 * one.average:.2f} %"),
        )
    ordered = sorted(tuned.trials, key=lambda one: -one.average)
    if json:
        rows = [
            {"parameters": one.parameters, "average": one.average, "scores": one.scores}
            for one in ordered
        ]
        found = {"method": tuned.settings.method, "sampler": sampler, "seed": seed}
        console.facts(found | {"recipe": None if out is None else str(out), "trials": rows})
        return
    tasks = [*tuned.best.scores]
    shown = f"{min(_SHOWN, len(ordered))} best of {len(ordered)} trials"
    console.out.print(f"{tuned.settings.method}, {shown}; validation scores in %", markup=False)
    console.table(
        "",
        [*tuned.best.parameters, *tasks, "average"],
        [
            [
                *(f"{value}" for value in one.parameters.values()),
                *(f"{100 * one.scores[task]:.1f}" for task in tasks),
                f"{100 * one.average:.2f}",
            ]
            for one in ordered[:_SHOWN]
        ],
    )
    if out is not None:
        console.note(f"{out}: a recipe with the best parameters")
