"""Several recipes as one merge: what one gives is a model of the next.

Models in between are written beside the output, each as an ordinary checkpoint, and removed when
nothing more is merged from them; a run that was killed leaves them to the next, which begins anew.
Everything that headers tell against any of them is told before the first weight is read: of each
model in between there is first a hollow one, with its headers and small files, whose weights take
no room on the disk.
"""

import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personae.commands.merge import merge_parts
from personae.commands.merge_parts import OpenedParts, open_parts
from personae.commands.merge_plan import MergePlan, plan_parts
from personae.errors import CheckpointError, Faults, PersonaeError
from personae.recipe import MergePart, MergeRecipe
from personae.run.output import check_output
from personae.run.work import Work
from personae.writers import (
    SHARD_BYTES,
    hollow_checkpoint,
    locked,
    output_errors,
    require_space,
    write_auxiliary_files,
)


def merge_recipes(
    recipes: Sequence[MergeRecipe],
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    work: Work | None = None,
) -> Path:
    """Merge the recipes of a file into one checkpoint directory.

    Args:
        recipes: In the order in which they can be merged; the last is that of the output.
        out: Directory to write; must not exist, or be empty.
        overwrite: Replace `out` if it exists.
        shard_bytes: Most bytes in one weight file.
        work: Workers, memory bound, device, progress.

    Returns:
        The directory written.

    Raises:
        PersonaeError: as for `merge`, for all recipes at once.
    """
    work, out = work or Work(), Path(out).absolute()
    *before, last = recipes
    if not before:
        return _merge(last, out, {}, shard_bytes, work, overwrite)
    names = {recipe.name for recipe in recipes}
    given = [model for r in recipes for model in r.models if model not in names]
    check_output(out, overwrite, inputs=given)
    with _folder(out.with_name(f".{out.name}.between")) as folder:
        hollow = folder / "hollow"
        plans = plan_recipes(recipes, work, hollow)
        require_space(out, sum(plan.bytes_out for plan in plans.values()))
        shutil.rmtree(hollow)
        places: dict[str, Path] = {}
        for n, recipe in enumerate(before):
            assert recipe.name is not None
            place = folder / recipe.name
            places[recipe.name] = _merge(recipe, place, places, shard_bytes, work)
            later = {m.partition("+")[0] for r in recipes[n + 1 :] for m in r.models}
            for name in places.keys() - later:
                shutil.rmtree(places.pop(name))
        return _merge(last, out, places, shard_bytes, work, overwrite)


def plan_recipes(
    recipes: Sequence[MergeRecipe], work: Work, hollow: Path | None = None
) -> dict[str, MergePlan]:
    """Plan every recipe, from headers.

    Args:
        recipes: In the order in which they can be merged; the last is that of the output.
        work: Workers and memory bound.
        hollow: Where hollow models are written; by default a temporary folder.

    Returns:
        Name of each recipe to its plan.

    Raises:
        PersonaeError: for anything wrong that headers tell of any of them, all faults at once.
    """
    if hollow is None:
        with tempfile.TemporaryDirectory() as folder:
            return plan_recipes(recipes, work, Path(folder) / "hollow")
    plans: dict[str, MergePlan] = {}

    def plan(name: str, opened: OpenedParts) -> None:
        plans[name] = plan_parts(opened, work)

    faults = Faults()
    for name, found in visit(recipes, plan, hollow).items():
        for text in found:
            faults.add(text if len(recipes) == 1 else f"{name}: {text}")
    faults.raise_if_any(CheckpointError)
    return plans


def visit(
    recipes: Sequence[MergeRecipe],
    see: Callable[[str, OpenedParts], None],
    hollow: Path,
    kept: type[PersonaeError] = CheckpointError,
) -> dict[str, list[str]]:
    """Open every recipe of a file, one after the other; models in between are hollow ones.

    Args:
        recipes: In the order in which they can be merged; the last is that of the output.
        see: Called with the name of each and what was opened.
        hollow: Where hollow models are written.
        kept: Errors that do not keep the other recipes from being opened.

    Returns:
        Name of each recipe to what is wrong with it. Those are passed over that are merged of a
        model in which something is wrong.

    Raises:
        PersonaeError: of another class than what is kept.
    """
    places: dict[str, Path] = {}
    found: dict[str, list[str]] = {}
    for recipe in recipes:
        name = called(recipe)
        named = {model.partition("+")[0] for model in recipe.models}
        if any(r.name in named and r.name not in places for r in recipes):
            continue
        faults = Faults()
        try:
            with open_parts(*_placed(recipe, places)) as opened:
                see(name, opened)
                if recipe.name is not None:
                    _write_hollow(opened, hollow / recipe.name)
                    places[recipe.name] = hollow / recipe.name
        except kept as error:
            faults.take(error)
        found[name] = faults.messages
    return found


def called(recipe: MergeRecipe) -> str:
    """What messages call what a recipe gives."""
    return recipe.name or "the output"


def _write_hollow(opened: OpenedParts, directory: Path) -> None:
    """A model in between, but for its weights."""
    directory.mkdir(parents=True)
    bases = [job.family.base for job in opened.jobs]
    tied = {dropped: kept for base in bases for dropped, kept in base.tied.items()}
    copies = frozenset[str]().union(*(base.copies for base in bases))
    specs = [spec for job in opened.jobs for spec in job.specs]
    hollow_checkpoint(directory, specs, tied=tied, copies=copies)
    write_auxiliary_files(opened.auxiliary_files(), directory)


def _merge(
    recipe: MergeRecipe,
    out: Path,
    places: Mapping[str, Path],
    shard_bytes: int,
    work: Work,
    overwrite: bool = False,
) -> Path:
    parts, small_files = _placed(recipe, places)
    return merge_parts(
        parts,
        out,
        small_files=small_files,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        recipe=recipe.text,
        work=work,
        called={str(place): name for name, place in places.items()},
    )


def _placed(recipe: MergeRecipe, places: Mapping[str, Path]) -> tuple[list[MergePart], str | None]:
    """The parts of a recipe, with models in between where they are."""

    def place(model: Any) -> Any:
        name, plus, adapter = model.partition("+") if isinstance(model, str) else ("", "", "")
        return f"{places[name]}{plus}{adapter}" if name in places else model

    parts = [
        MergePart(
            base=place(part.base),
            experts={name: place(model) for name, model in part.experts.items()},
            settings=part.settings,
        )
        for part in recipe.parts
    ]
    return parts, place(recipe.small_files)


@contextmanager
def _folder(path: Path) -> Generator[Path, None, None]:
    """A new folder, in the place of what a killed run left, that is removed at the end.

    Raises:
        OutputError: if another run is at it, or the disk refuses.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        try:
            for child in path.iterdir():
                shutil.rmtree(child)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
