"""Several recipes as one merge: what one gives is a model of the next.

A model in between is merged as it is read, and never written, where `computed_as_read` says so. The
others are written beside the output, each as an ordinary checkpoint, and removed when nothing more
is merged from them; a run that was killed leaves them to the next. Everything that headers tell
against any of them is told before the first weight is read: of each model in between there is first
a hollow one, with its headers and small files, whose weights take no room on the disk.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.opening import open_adapted
from personae.commands.merge import Between, identity_of, merge_parts, tell_lost
from personae.commands.merge_computed import ComputedModel, computed_as_read
from personae.commands.merge_parts import OpenedParts, open_parts
from personae.commands.merge_plan import MergePlan, plan_parts
from personae.errors import CheckpointError, Faults, MethodError, PersonaeError
from personae.family.opened import Family
from personae.methods import NotFinite
from personae.recipe import MergePart, MergeRecipe
from personae.run.output import check_output
from personae.run.work import Work
from personae.writers import (
    SHARD_BYTES,
    hollow_checkpoint,
    locked,
    output_errors,
    remove,
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
    if len(recipes) == 1:
        return _merge(recipes[0], out, _Made(), shard_bytes, work, overwrite)
    names = {recipe.name for recipe in recipes}
    given = [model for r in recipes for model in r.models if model not in names]
    check_output(out, overwrite, inputs=given)
    with _folder(out.with_name(f".{out.name}.between")) as folder:
        hollow = folder / "hollow"
        plans = plan_recipes(recipes, work, hollow)
        require_space(out, sum(plan.bytes_out for plan in plans.values()))
        shutil.rmtree(hollow)
        with ExitStack() as held:
            return _merge_all(recipes, out, folder, shard_bytes, work, overwrite, held)


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
    made, computed = _Made(), computed_as_read(recipes)
    found: dict[str, list[str]] = {}
    for recipe in recipes:
        name = called(recipe)
        if any(r.name in _named(recipe) and r.name not in made.models for r in recipes):
            continue
        faults = Faults()
        try:
            with made.opened(recipe, at_once=recipe.name in computed) as opened:
                see(name, opened)
                if recipe.name is not None:
                    _write_hollow(opened, hollow / recipe.name)
                    made.models[recipe.name] = hollow / recipe.name
                    if recipe.name in computed:
                        made.beside[recipe.name] = _beside(opened)
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
    copies = {copy: dtype for job in opened.jobs for copy, dtype in job.copies.items()}
    specs = [spec for job in opened.jobs for spec in job.specs]
    hollow_checkpoint(directory, specs, tied=tied, copies=copies)
    write_auxiliary_files(opened.auxiliary_files(), directory)


def _merge_all(
    recipes: Sequence[MergeRecipe],
    out: Path,
    folder: Path,
    shard_bytes: int,
    work: Work,
    overwrite: bool,
    held: ExitStack,
) -> Path:
    """Merge one recipe after the other, as `merge_recipes`.

    Args:
        recipes: As there.
        out: As there.
        folder: Where models in between are.
        shard_bytes: As there.
        work: As there.
        overwrite: As there.
        held: Closes at the end what models are merged from as they are read.
    """
    made, computed = _Made(), computed_as_read(recipes)
    streamed: list[tuple[ComputedModel, Family]] = []
    *before, last = recipes
    for n, recipe in enumerate(before):
        assert recipe.name is not None
        place = folder / recipe.name
        made.between[str(place)] = Between(recipe.name)
        with _telling(recipe.name):
            if recipe.name not in computed:
                made.models[recipe.name] = _merge(recipe, place, made, shard_bytes, work)
            else:
                opened = held.enter_context(made.opened(recipe, at_once=True))
                for text in plan_parts(opened, work).notes:
                    work.note(text)
                _write_hollow(opened, place)
                model = ComputedModel(recipe.name, open_checkpoint(place), opened, work)
                made.models[recipe.name] = model
                made.beside[recipe.name] = _beside(opened)
                told = identity_of(opened, made.between)
                made.between[str(place)] = Between(recipe.name, told)
                streamed.append((model, opened.families[0]))
        for name in _no_longer_read(recipes, n, computed):
            written = made.models.get(name)
            if isinstance(written, Path):
                shutil.rmtree(written)
                del made.models[name]
    with _telling(None):
        written = _merge(last, out, made, shard_bytes, work, overwrite)
    for model, family in streamed:
        tell_lost(model.lost(), family, work)
    return written


def _no_longer_read(
    recipes: Sequence[MergeRecipe], done: int, computed: Collection[str]
) -> set[str]:
    """Models of recipes up to that number from which nothing more is merged.

    What is merged as it is read still reads its own models then.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    waiting = [name for recipe in recipes[done + 1 :] for name in _named(recipe)]
    read = set[str]()
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in read:
            read.add(name)
            waiting += _named(by_name[name]) if name in computed else ()
    return {recipe.name for recipe in recipes[: done + 1] if recipe.name is not None} - read


@contextmanager
def _telling(name: str | None) -> Generator[None, None, None]:
    """Say in which recipe something is wrong with weights, and what that was if not yet told.

    Raises:
        CheckpointError: with the name before each fault.
        MethodError: likewise, where a value does not fit in its dtype.
    """
    faults = Faults()
    try:
        yield
    except NotFinite as error:  # of a model in between, found as the next one was opened
        for fault in error.faults:
            faults.add(fault)
        faults.raise_if_any(CheckpointError)
    except (CheckpointError, MethodError) as error:
        for fault in error.faults or (str(error),):
            faults.add(fault if name is None else f"{name}: {fault}")
        faults.raise_if_any(type(error))


def _merge(
    recipe: MergeRecipe,
    out: Path,
    made: "_Made",
    shard_bytes: int,
    work: Work,
    overwrite: bool = False,
) -> Path:
    parts, small_files = made.placed(recipe)
    return merge_parts(
        parts,
        out,
        small_files=small_files,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        recipe=recipe.text,
        work=work,
        between=made.between,
        beside=made.beside_of(recipe),
    )


def _named(recipe: MergeRecipe) -> set[str]:
    """What a recipe names as models, without adapters of these."""
    return {model.partition("+")[0] for model in recipe.models}


def _beside(opened: OpenedParts) -> int:
    """Bytes that merging some rows of a model takes, while whoever reads it is at work."""
    return max(job.cost(item) for job in opened.jobs for item in job.items)


@dataclass(frozen=True)
class _Made:
    """The models in between that there are.

    Attributes:
        models: Name to where it was written, or to one that is merged as it is read.
        between: The source of each to what is known of it.
        beside: Name of one that is merged as it is read to the bytes that this takes.
    """

    models: dict[str, Path | Checkpoint] = field(default_factory=dict[str, Path | Checkpoint])
    between: dict[str, Between] = field(default_factory=dict[str, Between])
    beside: dict[str, int] = field(default_factory=dict[str, int])

    def beside_of(self, recipe: MergeRecipe) -> int:
        """Bytes that it takes to read the models of a recipe, beside these."""
        return sum(self.beside.get(name, 0) for name in _named(recipe))

    def opened(self, recipe: MergeRecipe, *, at_once: bool) -> AbstractContextManager[OpenedParts]:
        """The parts of a recipe, opened; see `open_parts`."""
        parts, small_files = self.placed(recipe)
        return open_parts(parts, small_files, at_once=at_once, beside=self.beside_of(recipe))

    def placed(self, recipe: MergeRecipe) -> tuple[list[MergePart], Any]:
        """The parts of a recipe and the model of its small files, with these in place of names."""
        parts = [
            MergePart(
                base=self._placed(part.base),
                experts={name: self._placed(model) for name, model in part.experts.items()},
                settings=part.settings,
            )
            for part in recipe.parts
        ]
        return parts, self._placed(recipe.small_files)

    def _placed(self, model: Any) -> Any:
        name, plus, adapter = model.partition("+") if isinstance(model, str) else ("", "", "")
        made = self.models.get(name)
        if made is None:
            return model
        if isinstance(made, Path):
            return f"{made}{plus}{adapter}"
        return open_adapted(f"{made.source}+{adapter}", made, adapter) if adapter else made


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
                remove(child)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
