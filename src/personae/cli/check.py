"""personae check: everything that can be wrong with a merge, without merging."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from personae.cli import console, options
from personae.commands.check import Checked, check_recipes
from personae.errors import CheckpointError, Faults, RecipeError
from personae.recipe import read_merge_recipes, recipe_kind

_OF_WEIGHTS = ("--no-weights reads no weights: leave out {}.", ("workers", "memory"))


def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A merge recipe.")],
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Read headers only, and no weight.")
    ] = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Find what is wrong with a merge before it is done; exit 2 where it would be refused."""
    options.refuse_unused(context, *([_OF_WEIGHTS] if no_weights else []))
    if recipe_kind(recipe) != "merge":
        raise RecipeError(
            f"{recipe} is a pack recipe, and check takes merge recipes. `personae plan` tells the "
            "faults that headers show, and `personae pack` reads every weight before it writes."
        )
    recipes = read_merge_recipes(recipe)
    began = perf_counter()
    with options.working(workers, memory) as work:
        checked = check_recipes(recipes, work, weights=not no_weights)
    took = perf_counter() - began
    if json:
        facts = {name: found.to_json() for name, found in checked.items()}
        console.facts(facts if len(recipes) > 1 else next(iter(facts.values())))
    else:
        for name, found in checked.items():
            _print(found, f"{name}: " if len(recipes) > 1 else "")
        read_bytes = sum(found.bytes_read for found in checked.values())
        console.out.print(f"read {console.size(read_bytes)} of weights in {took:.1f} s")
    faults = Faults()
    for name, found in checked.items():
        for text in found.faults:
            faults.add(f"{name}: {text}" if len(recipes) > 1 else text)
    faults.raise_if_any(CheckpointError)


def _print(found: Checked, prefix: str) -> None:
    for text in found.notes:
        console.note(f"{prefix}{text}")
    if found.norms:
        rows = [
            [n, f"{x.norm:.4g}", "-" if x.relative is None else f"{x.relative:.3g}"]
            for n, x in found.norms.items()
        ]
        console.table("", ["task vector", "norm", "relative"], rows)
    if not found.faults:
        console.out.print(f"{prefix}can be merged", markup=False)
